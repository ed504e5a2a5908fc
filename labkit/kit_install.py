"""Install the course from this folder, without network. `labkit kit` copies this file there as install.py.

    python install.py              into the folder labkit-course in your home folder
    python install.py D:\\course    into another one

It checks every file of the kit, copies the course, installs the packages into its .venv, and puts model
and data where labkit looks for them: in LABKIT_HOME if that is set, else in your data folder.
Needs nothing but Python, of the version that made_for.txt names.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

KIT = Path(__file__).resolve().parent


def check() -> None:
    """End with what is wrong if this is another platform, or a file of the kit is missing or damaged."""
    made_for = (KIT / "made_for.txt").read_text("utf-8").strip()
    here = f"Python {'.'.join(platform.python_version_tuple()[:2])} on {platform.system()} {platform.machine()}"
    if here != made_for:
        sys.exit(f"This kit is for {made_for}, and this is {here}. Start it with that Python, or take the kit that was "
                 "made on a machine like this one.")
    if not (KIT / "SHA256SUMS").is_file():
        sys.exit("This kit is not complete: SHA256SUMS is missing. Where it was made, run `labkit kit` again; or copy "
                 "the whole folder again.")
    lines = (KIT / "SHA256SUMS").read_text("utf-8").splitlines()
    damaged = [name for digest, name in (line.split("  ", 1) for line in lines) if sha256(KIT / name) != digest]
    if damaged:
        sys.exit(f"Damaged or missing: {', '.join(damaged[:5])}{' …' if damaged[5:] else ''}. Copy the kit again.")


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal; empty if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()


def install(target: Path) -> Path:
    """Copy the course to `target` and install into its .venv; the environment's Python."""
    python = target / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    shutil.copytree(KIT / "course", target)
    venv.create(target / ".venv", with_pip=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
                           "--find-links", KIT / "wheels", "-r", "requirements.txt"], cwd=target)
    if done.returncode:
        sys.exit(f"pip failed; see above. Delete {target} before you try again.")
    (target / ".venv" / ".installed").touch()  # make then installs nothing
    return python


def main() -> None:
    """Check, install, copy the assets, and tell how to go on."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path.home() / "labkit-course").resolve()
    if target.exists():
        sys.exit(f"{target} is there already. Delete it, or name another folder: python install.py FOLDER")
    print("Checking the kit …", flush=True)
    check()
    print(f"Installing into {target}; this takes a few minutes …", flush=True)
    python = install(target)
    home = subprocess.run([python, "-c", "from labkit import paths; print(paths.home())"], stdout=subprocess.PIPE,
                          text=True, check=True).stdout.strip()
    print(f"Copying model and data to {home} …", flush=True)
    shutil.copytree(KIT / "assets", Path(home) / "assets", dirs_exist_ok=True)
    relative = python.relative_to(target)
    print(f"Done. To begin:\n\n  cd {target}\n  {relative} -m labkit doctor\n"
          f"  {relative} -m jupyter lab {Path('notebooks', '00_start_here.ipynb')}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted. Delete the folder that was begun before you try again.")
