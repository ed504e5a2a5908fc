"""Make what is derived from the notebooks in solutions/.

    python notebooks/build.py          write the learner versions, notebooks/NN_*.ipynb
    python notebooks/build.py 01       execute solution 01 first and store its outputs, cleaned

The learner versions are made by nbgrader's own preprocessors, in the order in which its
`generate_assignment` applies them; only the step that writes to its gradebook is left out.
"""

import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbgrader.converters import GenerateAssignment
from nbgrader.preprocessors import SaveCells
from traitlets.config import PyFileConfigLoader

HERE = Path(__file__).resolve().parent
SOLUTIONS = HERE / "solutions"


def learner_version(solution: Path) -> str:
    """The notebook that a learner gets, as the text of its file."""
    config = PyFileConfigLoader("nbgrader_config.py", path=str(HERE)).load_config()
    notebook = nbformat.read(solution, as_version=4)
    for step in GenerateAssignment().preprocessors:
        if step is not SaveCells:
            notebook, _ = step(config=config).preprocess(notebook, {})
    return nbformat.writes(notebook) + "\n"


def execute(solution: Path) -> None:
    """Run a solution from a fresh kernel, and store it with its outputs and the seconds that it took."""
    notebook = nbformat.read(solution, as_version=4)
    begin = time.monotonic()
    NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(solution.parent)}},
                   extra_arguments=["--IPKernelApp.log_level=40"]).execute()
    clean(notebook)
    notebook.metadata["seconds"] = round(time.monotonic() - begin)
    nbformat.write(notebook, solution)


def clean(notebook: NotebookNode) -> None:
    """Leave in the outputs what a reader wants: no progress bars, no widgets' scripts, no paths of this machine."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if not _is_debris(cell, output)]
        for output in cell.outputs:
            if "text" in output:
                output.text = _without_paths(output.text)
            for kind, content in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = _without_paths(content)


def _is_debris(cell: NotebookNode, output: NotebookNode) -> bool:
    """Whether an output is a progress bar, a quiz (which a stored page cannot show), or standard error."""
    data = output.get("data", {})
    bar = data.get("text/html") == "" or "application/vnd.jupyter.widget-view+json" in data
    return bar or "labkit.quiz(" in cell.source or output.get("name") == "stderr"


def _without_paths(text: str) -> str:
    """The text with this machine's folders shortened to `…/`."""
    for folder in (str(HERE.parent), str(Path.home())):
        text = text.replace(folder, "…")
    return re.sub(r"(?:/[\w.-]+){2,}/(?=[\w.-]+\.(?:py|json|ipynb|jsonl|log)\b)", "…/", text)


def main(numbers: list[str]) -> None:
    """Execute the solutions with these numbers, then derive every learner version."""
    for number in numbers:
        (solution,) = SOLUTIONS.glob(f"{number}_*.ipynb")
        execute(solution)
        print(f"{solution.name}: {nbformat.read(solution, as_version=4).metadata.seconds} s")
    for solution in sorted(SOLUTIONS.glob("*.ipynb")):
        (HERE / solution.name).write_text(learner_version(solution), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
