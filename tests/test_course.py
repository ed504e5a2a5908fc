"""The course holds together: slides mirror notebooks, learner versions are current, stored pages are clean."""

import csv
import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from labkit import paths
from labkit.lessons.exercises import exercises

NOTEBOOKS = paths.COURSE / "notebooks"
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
LESSONS = [path for path in SOLUTIONS if exercises(path.name[:2])]
DECKS = sorted((paths.COURSE / "slides").glob("[0-9]*.md"))
GUIDE = paths.COURSE / "slides" / "INSTRUCTORS.md"
FRAME = ("Exercises", "Quiz", "What we saw", "Next")  # the sections that every lesson ends with

each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
each_deck = pytest.mark.parametrize("path", DECKS, ids=lambda path: path.stem)

specification = spec_from_file_location("build", NOTEBOOKS / "build.py")
assert specification and specification.loader
build = module_from_spec(specification)
specification.loader.exec_module(build)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def prose(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def headings(text: str) -> list[tuple[int, str]]:
    """Level and title of each heading of a Markdown text, leaving out its code blocks."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [(len(marks), title.strip()) for marks, title in re.findall(r"^(#+) (.+)$", text, re.MULTILINE)]


def stated_minutes(notebook: NotebookNode) -> int:
    found = re.search(r"\*\*Minutes on two cores\*\*: (?:about )?(\d+)", notebook.cells[0].source)
    assert found, "the first cell says: **Minutes on two cores**: N"
    return int(found[1])


# Notebooks

@each_solution
def test_a_notebook_opens_and_closes_as_all_do(path: Path) -> None:
    notebook = read(path)
    opening, found = notebook.cells[0].source, headings(prose(notebook))
    assert "- **You will** " in opening and "- **You need** " in opening and stated_minutes(notebook)
    assert [level for level, _ in found].count(1) == 1 and found[0][0] == 1
    for (before, _), (after, title) in zip(found, found[1:], strict=False):
        assert after <= before + 1, f"the heading {title!r} skips a level"
    assert [title for _, title in found][-2:] == ["What we saw", "Next"]


@each_lesson
def test_a_lesson_has_exercises_in_three_levels_and_a_quiz(path: Path) -> None:
    lesson = exercises(path.name[:2])
    assert 3 <= len(lesson) <= 6 and {item.level for item in lesson} == {1, 2, 3}
    cells = {cell.metadata.nbgrader.grade_id: cell for cell in read(path).cells if "nbgrader" in cell.metadata}
    assert len(cells) == 2 * len(lesson)
    for item in lesson:
        answer, check = (cells[f"{kind}-{item.number.replace('.', '-')}"] for kind in ("exercise", "check"))
        assert answer.metadata.nbgrader.solution and "### BEGIN SOLUTION" in answer.source
        assert check.metadata.nbgrader.grade and check.metadata.nbgrader.points == item.level
        assert re.fullmatch(rf'### BEGIN HIDDEN TESTS\nassert (labkit\.check\("{item.number}", \w+\))\n'
                            r"### END HIDDEN TESTS\n\1", check.source)
        assert check.outputs[0].data["text/plain"] == f"{item.number} right: {item.title}."
        assert f"### Exercise {item.number}, level {item.level}: {item.title}" in prose(read(path))
    assert any(cell.source == f'labkit.quiz("{path.name[:2]}")' for cell in read(path).cells)


@pytest.mark.parametrize("path", sorted((NOTEBOOKS / "quiz").glob("*.json")), ids=lambda path: path.stem)
def test_every_quiz_answer_has_feedback_and_one_is_right(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "http" not in text and "$" not in text  # works offline; a dollar sign would be read as mathematics
    for question in json.loads(text):
        assert question["type"] == "multiple_choice" and len(question["answers"]) >= 3
        assert [answer["correct"] for answer in question["answers"]].count(True) == 1
        assert all(answer["feedback"] for answer in question["answers"])


@each_solution
def test_stored_outputs_are_whole_and_clean(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    for cell in code:
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs)
        for output in cell.outputs:
            text = json.dumps({**output, "data": {k: v for k, v in output.get("data", {}).items() if "image" not in k}})
            assert not re.search(r"/(home|root|tmp|Users|venv)/|[A-Z]:\\\\|\d+%\|", text), text
            assert not any("widget" in kind or "javascript" in kind for kind in output.get("data", {}))
            if "image/png" in output.get("data", {}):  # nbconvert takes either of the two
                alt = output.metadata.get("image/png", {}).get("alt") or cell.metadata.get("alt", "")
                assert len(alt) > 40, f"no text for the figure of this cell:\n{cell.source}"


@each_solution
def test_the_stated_minutes_are_as_measured(path: Path) -> None:
    notebook = read(path)
    if "seconds" not in notebook.metadata:
        pytest.skip(f"no time is stored yet: python notebooks/build.py {path.name[:2]}")
    stated, measured = stated_minutes(notebook), notebook.metadata.seconds / 60
    assert measured <= 2 * stated and (stated == 1 or stated <= 2 * measured), f"took {measured:.1f} minutes"


# What is derived

@each_solution
def test_the_learner_version_is_current(path: Path) -> None:
    """As git has it, since learners write into theirs."""
    stored = subprocess.run(["git", "show", f":notebooks/{path.name}"], cwd=paths.COURSE, capture_output=True)
    assert stored.stdout.decode() == build.learner_version(path), "run `make notebooks`, then `git add notebooks`"


@each_lesson
def test_a_learner_sees_no_solution(path: Path) -> None:
    text = build.learner_version(path)
    assert "BEGIN" not in text and "assert labkit.check" not in text and text.count("# YOUR CODE HERE") >= 3
    for cell in nbformat.reads(text, as_version=4).cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            assert re.search(r"\n *# YOUR CODE HERE\n *pass$", cell.source), "nothing follows the solution"


def test_nbgrader_releases_the_same_and_grades_it(tmp_path: Path) -> None:
    """The exercises of notebook 01 through nbgrader's own commands: an untouched copy scores 0, the solution all."""
    (tmp_path / "nbgrader_config.py").write_text((NOTEBOOKS / "nbgrader_config.py").read_text("utf-8"))
    source = tmp_path / "source" / "lesson" / "exercises.ipynb"
    source.parent.mkdir(parents=True)
    (solution,) = (NOTEBOOKS / "solutions").glob("01_*.ipynb")
    notebook = new_notebook(cells=[new_code_cell("import labkit", id="import"), *(
        cell for cell in read(solution).cells if "nbgrader" in cell.metadata)], metadata=read(solution).metadata)
    nbformat.write(notebook, source)

    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # nbgrader calls alembic

    def nbgrader(*arguments: str) -> None:
        done = subprocess.run([sys.executable, "-m", "nbgrader", *arguments], cwd=tmp_path, capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(paths.COURSE), "PATH": programs})
        assert done.returncode == 0, done.stderr

    nbgrader("generate_assignment", "lesson")
    released = tmp_path / "release" / "lesson" / "exercises.ipynb"
    assert released.read_text("utf-8").strip() == build.learner_version(source).strip()
    for name, handed_in in (("untouched", released), ("solved", source)):
        (tmp_path / "submitted" / name / "lesson").mkdir(parents=True)
        (tmp_path / "submitted" / name / "lesson" / "exercises.ipynb").write_bytes(handed_in.read_bytes())
    nbgrader("autograde", "lesson")
    nbgrader("export", "--to", "grades.csv")
    with open(tmp_path / "grades.csv", newline="") as file:
        rows = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert rows == {"untouched": 0.0, "solved": float(sum(item.level for item in exercises("01")))}


# Slides

@each_deck
def test_a_deck_is_whole(path: Path) -> None:
    text = path.read_text("utf-8")
    slides = text.split("\n---\n")[1:]  # after the front matter
    minutes = [re.findall(r"<!--\nMinutes: (\d+)\.\n", slide) for slide in slides]
    assert all(len(found) == 1 for found in minutes), "each slide has a speaker note that begins with its minutes"
    stated = re.search(r"^(\d+) minutes · notebook `(\w+)`$", slides[0], re.MULTILINE)
    assert stated and sum(int(found[0]) for found in minutes) == int(stated[1]) and stated[2] == path.stem
    assert [level for level, _ in headings(text)] == [1] + [2] * (len(slides) - 1)
    assert not re.search(r"!\[.*?\]\(http", text), "pictures come with the deck: it is shown offline"


@pytest.mark.parametrize("path", [path for path in LESSONS if path.with_suffix(".md").name in
                                  {deck.name for deck in DECKS}], ids=lambda path: path.stem)
def test_slides_and_notebook_have_the_same_topics(path: Path) -> None:
    """Title and second-level headings agree, in order; a topic may take several slides, and the frame needs none."""
    deck = list(dict.fromkeys(headings((paths.COURSE / "slides" / f"{path.stem}.md").read_text("utf-8"))))
    notebook = [heading for heading in headings(prose(read(path))) if heading[0] < 3]
    assert [h for h in deck if h[1] not in FRAME] == [h for h in notebook if h[1] not in FRAME]


# Links and the README

@pytest.mark.parametrize("path", [*SOLUTIONS, *sorted(NOTEBOOKS.glob("*.ipynb")), *DECKS, GUIDE,
                                  NOTEBOOKS / "README.md", paths.COURSE / "README.md"],
                         ids=lambda path: str(path.relative_to(paths.COURSE)))
def test_links_lead_somewhere(path: Path) -> None:
    text = prose(read(path)) if path.suffix == ".ipynb" else path.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"


def test_the_readme_lists_the_course_with_its_minutes() -> None:
    text = (paths.COURSE / "README.md").read_text("utf-8")
    for path in SOLUTIONS:
        assert f"[{path.name[:2]}](notebooks/solutions/{path.name}), {stated_minutes(read(path))} |" in text
    for path in DECKS:
        stated = re.search(r"^(\d+) minutes ·", path.read_text("utf-8"), re.MULTILINE)
        assert stated and f"[{stated[1]} min](slides/{path.name})" in text


def test_the_timetables_add_up_and_leave_time_for_the_decks() -> None:
    """A row's slides take what its decks state, up to a quarter of an hour more; a part without a deck counts 40."""
    decks = {path.name[:2]: re.search(r"^(\d+) minutes ·", path.read_text("utf-8"), re.MULTILINE) for path in DECKS}
    tables = re.findall(r"^### .*: (\d+) minutes\n\n(.*?)\n\n", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(tables) == 3
    for total, table in tables:
        rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in table.splitlines()[2:]]
        assert sum(int(minutes or 0) for row in rows for minutes in row[1:]) == int(total)
        for parts, slides, _ in rows:
            if slides:
                stated = sum(int(found[1]) if (found := decks.get(part)) else 40 for part in parts.split(", "))
                assert stated <= int(slides) <= stated + 15, f"{GUIDE.name}: {parts} take {stated} minutes"
