"""`labkit lab`: the flagship notebook from top to bottom without a browser."""

import copy
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from labkit import assets, paths
from labkit.client.connect import connect, running_service, stop_service
from labkit.client.jobs import ENDED
from labkit.errors import LabkitError

NOTEBOOK = paths.COURSE / "notebooks" / "solutions" / "07_lab_fine_tuned_classification.ipynb"
CELL_SECONDS = 1800  # one cell waits for the training; slow machines take their time


def run(out: Path) -> int:
    """Fetch model and data, execute the notebook in `out`, print its results.

    Leaves the executed notebook, an HTML of it, `figures/` and `results.json` in `out`. A
    service that was not running before is stopped at the end. Raises `LabkitError` when a
    cell fails, after saving the notebook up to there.
    """
    begin = time.monotonic()
    assets.base_model()
    assets.posts()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    was_running, started = running_service() is not None, time.time()
    try:
        notebook = _execute(out)
    except BaseException:
        _cancel_jobs(started)
        raise
    finally:
        if not was_running:
            stop_service()
    _save_html(notebook, out)
    results = json.loads((out / "results.json").read_text())
    print(_summary(results))
    print(f"\n{time.monotonic() - begin:.0f} s in all. Read {out / NOTEBOOK.with_suffix('.html').name}, "
          f"or open {NOTEBOOK.relative_to(paths.COURSE)} in JupyterLab: make course")
    return 0


def _execute(out: Path) -> Any:
    """Run every cell with `out` as the working folder; a progress bar counts cells and names sections."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from tqdm import tqdm

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = _without_exercises(notebook.cells)
    bar = tqdm(total=len(notebook.cells), unit="cell", desc="Running the lab", dynamic_ncols=True)

    def started(cell: Any, cell_index: int) -> None:
        heading = next((line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")), None)
        if cell.cell_type == "markdown" and heading:
            bar.set_postfix_str(heading[:60])
        bar.n = cell_index
        bar.refresh()

    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", on_cell_start=started,
                            resources={"metadata": {"path": str(out)}},
                            extra_arguments=["--IPKernelApp.log_level=40"])  # no warnings meant for servers
    try:
        client.execute()
    except CellExecutionError as error:
        lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
        raise LabkitError(f"A cell of the lab failed: {lines[-1]}\n"
                          f"The notebook up to there, with the whole message: {out / NOTEBOOK.name}") from error
    finally:
        bar.n = len(notebook.cells)
        bar.close()
        nbformat.write(notebook, out / NOTEBOOK.name)
    return notebook


def _without_exercises(cells: list[Any]) -> list[Any]:
    """The cells without exercises and quiz: those are the learner's, and count in the record of progress."""
    titles = [cell.source.split("\n")[0] for cell in cells]
    if "## Exercises" not in titles:
        return cells
    return cells[:titles.index("## Exercises")] + cells[titles.index("## What we saw"):]


def _cancel_jobs(since: float) -> None:
    """Cancel what the lab has started: a job left running would go on at the service's next start."""
    url = running_service()
    if not url:
        return
    client = connect(url)
    for job in client.fine_tuning.jobs.list():  # newest first
        if job.created_at < int(since):
            return
        if job.status not in ENDED:
            client.fine_tuning.jobs.cancel(job.id)


def _save_html(notebook: Any, out: Path) -> None:
    """Write the HTML, and each figure as a PNG of its own."""
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExtractOutputPreprocessor

    html, _ = HTMLExporter(template_name="classic").from_notebook_node(notebook)  # the one that writes figures' texts
    paths.write_text(out / NOTEBOOK.with_suffix(".html").name, html)
    figures = ExtractOutputPreprocessor(output_filename_template="figure_{cell_index:02d}_{index}{extension}")
    _, resources = figures.preprocess(copy.deepcopy(notebook), {"outputs": {}})
    for name, content in resources["outputs"].items():
        if name.endswith(".png"):
            paths.write_bytes(out / "figures" / name, content)


def _summary(results: dict[str, Any]) -> str:
    """The results as a short table of text."""
    titles = {"majority": "always the larger class", "zero_shot": "zero-shot", "few_shot": "few-shot",
              "fine_tuned": "fine-tuned", "tfidf": "TF-IDF + logistic regression"}
    rows = [f"  {title:<30} {results['accuracy'][name]:.3f}" for name, title in titles.items()]
    more = {"accuracy_author_disjoint": "fine-tuned, authors disjoint", "accuracy_by_date": "fine-tuned, by date"}
    rows += [f"  {title:<30} {'–' if results[name] is None else format(results[name], '.3f')}"
             for name, title in more.items()]
    return (f"\nAccuracy on {results['n_valid']} held-out posts (data: {results['dataset_source']})\n" + "\n".join(rows)
            + f"\n\nFine-tuned on {results['n_train']} posts, {results['trained_tokens']:,} tokens, "
              f"in {results['train_seconds']:.0f} s")
