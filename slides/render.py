"""Render every deck in this folder to HTML and PDF with Marp, into build/slides/: `make slides`.

The decks are plain Markdown and can be read without this. Rendering needs Node.js, and for PDF
a browser; the first run fetches Marp into build/marp/, later ones need no network.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
MARP = "@marp-team/marp-cli@4.5.1"
BROWSERS = ("google-chrome", "chromium", "chromium-browser", "chrome", "msedge", "microsoft-edge", "firefox")


def marp() -> list[str]:
    """The command that starts Marp, which is fetched if it is not here; ends with the fix if it cannot be."""
    npm = shutil.which("npm")
    script = BUILD / "marp" / "node_modules" / "@marp-team" / "marp-cli" / "marp-cli.js"
    node = shutil.which("node")
    if not node or not npm:
        sys.exit("Rendering slides needs Node.js 18 or newer, which is not here: install it from https://nodejs.org "
                 "(Debian: apt install nodejs npm). The decks in slides/ are plain Markdown and need no rendering.")
    if not script.exists():
        print("Fetching Marp into build/marp/ (once, about 140 MB) …", flush=True)
        install = [npm, "install", "--silent", "--fetch-retries=1", "--prefix", str(BUILD / "marp"), MARP]
        try:
            subprocess.run(install, check=True, timeout=600)  # seconds; without network npm may wait for ever
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            sys.exit("npm could not fetch Marp. On a machine without network, copy build/marp from one that has it.")
    return [node, str(script)]


def render(command: list[str], *options: str) -> None:
    """Run Marp over the decks, NN_*.md; ends with its own words if it fails."""
    with tempfile.TemporaryDirectory() as decks:  # Marp takes one folder whole, and this one holds other pages, too
        for deck in HERE.glob("[0-9]*.md"):
            shutil.copy(deck, decks)
        command = [*command, "--config-file", str(HERE / "marp.json"),  # no math: a dollar sign means money here
                   "--input-dir", decks, "--output", str(BUILD / "slides"), *options]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"Marp failed:\n{done.stdout}{done.stderr}")


def main() -> None:
    """HTML with presenter's view, then PDF with the speaker notes as annotations."""
    command = marp()
    render(command)
    print(f"HTML: {BUILD / 'slides'} (press p in the browser for speaker notes)", flush=True)
    browser = os.environ.get("CHROME_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser and sys.platform.startswith("linux"):  # elsewhere Marp knows where browsers are installed
        sys.exit("No PDF: it needs Chrome, Chromium, Edge or Firefox. Install one, or set CHROME_PATH to its program.")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        os.environ["CHROME_NO_SANDBOX"] = "1"  # as root, in containers, Chromium refuses to start otherwise
    render(command, "--pdf", "--pdf-notes")
    print(f"PDF:  {BUILD / 'slides'}")


if __name__ == "__main__":
    main()
