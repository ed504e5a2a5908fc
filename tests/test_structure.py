"""The house: imports flow one way, `import labkit` is light, the README's map matches the disk."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import labkit

ROOT = Path(labkit.__file__).parent.parent
ROOMS = {"engine": ("engine",), "service": ("engine", "service"), "client": ("client",),
         "lessons": ("lessons",)}  # what each may import
UPPER = ("cli", "lab", "checkup", "cost", "kit", "kit_install", "__main__")  # these stand above all rooms


def imported(file: Path) -> set[str]:
    """The labkit modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "labkit":
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "labkit"}
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "labkit").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_flow_one_way(file: Path) -> None:
    room = file.relative_to(ROOT / "labkit").parts[0]
    if room.removesuffix(".py") in (*UPPER, "__init__"):
        return
    allowed = ROOMS.get(room, ())
    for module in imported(file):
        target = module.partition(".")[2].split(".")[0]
        assert target in allowed or target not in (*ROOMS, *UPPER), f"{file.name} imports {module}"


def test_import_labkit_loads_no_torch_and_no_web_framework() -> None:
    heavy = {"torch", "transformers", "fastapi", "pandas", "openai"}
    code = f"import sys, labkit; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_loads() -> None:
    assert all(getattr(labkit, name) is not None for name in labkit.__all__)
    with pytest.raises(AttributeError, match="labkit has no 'wach'; it offers"):
        labkit.wach  # noqa: B018


def test_the_readme_maps_what_is_there() -> None:
    tree = re.search(r"## What is where\n\n```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert tree
    folder, named = ROOT, set()
    for line in tree[1].splitlines():
        name = line.split()[0]
        folder = {0: ROOT}.get(len(line) - len(line.lstrip()), folder)
        path = folder / name
        assert path.exists(), f"README names {path.relative_to(ROOT)}, which is not there"
        named.add(path)
        if name.endswith("/") and folder == ROOT:
            folder = path
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {ROOT / file.split("/")[0] for file in tracked if not file.startswith(".")}
    rooms = {path for path in (ROOT / "labkit").iterdir() if not path.name.startswith("__")}
    assert top <= named and rooms <= named, f"README leaves out {sorted(map(str, (top | rooms) - named))}"
