"""The lab's runner, on small notebooks: what it leaves behind, and what it says when a cell fails."""

import json
from pathlib import Path

import nbformat
import openai
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from labkit import lab
from labkit.errors import LabkitError
from tests.conftest import BASE_NAME, RunningService, posts, supervised, upload

RESULTS = {
    "dataset_source": "20newsgroups", "n_train": 957, "n_valid": 240, "train_seconds": 1, "trained_tokens": 1000,
    "accuracy": {"majority": 0.5, "tfidf": 0.9, "zero_shot": 0.6, "few_shot": 0.7, "fine_tuned": 0.95},
    "accuracy_author_disjoint": None, "accuracy_by_date": 0.875,
}


@pytest.fixture
def run_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a notebook of these cells as if it were the lab; returns the folder of its results."""

    def run(*sources: str) -> Path:
        path = tmp_path / "lab.ipynb"
        nbformat.write(new_notebook(cells=[new_markdown_cell("# A heading"), *map(new_code_cell, sources)]), path)
        monkeypatch.setattr(lab, "NOTEBOOK", path)
        monkeypatch.setattr(lab.paths, "COURSE", tmp_path)
        monkeypatch.setattr(lab.assets, "base_model", lambda: None)
        monkeypatch.setattr(lab.assets, "posts", lambda: None)
        lab.run(tmp_path / "out")
        return tmp_path / "out"

    return run


def test_a_run_leaves_notebook_html_figures_and_a_table(run_cells, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_cells("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()",
                    f"open('results.json', 'w').write({json.dumps(json.dumps(RESULTS))})")
    assert {"lab.ipynb", "lab.html", "results.json", "figures"} <= {path.name for path in out.iterdir()}
    (figure,) = (out / "figures").iterdir()
    assert figure.read_bytes().startswith(b"\x89PNG")
    executed = nbformat.read(out / "lab.ipynb", 4)
    assert executed.cells[1].execution_count == 1
    table = capsys.readouterr().out
    assert "fine-tuned                     0.950" in table and "authors disjoint   –" in table


def test_the_page_has_a_text_for_each_figure(tmp_path: Path) -> None:
    notebook = nbformat.read(lab.NOTEBOOK, 4)
    notebook.cells = [cell for cell in notebook.cells if "alt" in cell.metadata]
    lab._save_html(notebook, tmp_path)
    page = (tmp_path / lab.NOTEBOOK.with_suffix(".html").name).read_text("utf-8")
    assert page.count('<img alt="') == len(list((tmp_path / "figures").iterdir())) > 3
    assert 'alt="Bar chart of the accuracy' in page and "No description" not in page


def test_the_lab_leaves_the_exercises_to_the_learner() -> None:
    sources = ["## 1. Connect", "## Exercises", "### Exercise 07.1", "answer = 1", "## Quiz", "## What we saw"]
    kept = lab._without_exercises([new_markdown_cell(source) for source in sources])
    assert [cell.source for cell in kept] == ["## 1. Connect", "## What we saw"]
    assert len(lab._without_exercises(kept)) == 2
    whole = nbformat.read(lab.NOTEBOOK, 4).cells
    kept = lab._without_exercises(whole)
    assert len(kept) < len(whole) and not any("nbgrader" in cell.metadata for cell in kept)


def test_a_failing_cell_is_named_and_the_notebook_saved(run_cells, tmp_path: Path) -> None:
    with pytest.raises(LabkitError, match="A cell of the lab failed: ZeroDivisionError: division by zero"):
        run_cells("1 / 0", "print('not reached')")
    executed = nbformat.read(tmp_path / "out" / "lab.ipynb", 4)
    assert executed.cells[1].outputs[0].ename == "ZeroDivisionError" and not executed.cells[2].outputs


def test_an_interrupted_lab_leaves_no_job_behind(
    run_cells, service: RunningService, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(service.home))
    file = upload(client, posts(80))
    create = (f"import labkit; labkit.connect().fine_tuning.jobs.create(model={BASE_NAME!r}, training_file={file!r}, "
              f"method={supervised(n_epochs=50, batch_size=1)!r})")
    with pytest.raises(LabkitError):
        run_cells(create, "raise SystemError('stop here')")
    newest = next(iter(client.fine_tuning.jobs.list()))
    assert newest.training_file == file and newest.status == "cancelled"
    assert service.process.poll() is None  # it was running before, so it goes on
