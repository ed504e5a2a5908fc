"""A second client: OpenAI's Node SDK, pinned in tests/node/package.json, against the service."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from labkit import paths
from tests.conftest import BASE_NAME, RunningService

SCRIPTS = paths.COURSE / "tests" / "node"
INSTALLED = paths.COURSE / "build" / "node"


@pytest.fixture(scope="module")
def node() -> str:
    """The program; skips where it, npm or the package is not to be had. `npm ci` installs what the lock file names."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("Node.js and npm are not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version[1:].split(".")[0]) < 20:
        pytest.skip(f"the Node SDK needs Node.js 20, this is {version}")
    locked, done = (SCRIPTS / "package-lock.json").read_text("utf-8"), INSTALLED / "installed.json"
    if not done.exists() or done.read_text("utf-8") != locked:
        INSTALLED.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SCRIPTS / name, INSTALLED)
        command = [npm, "ci", "--fetch-retries=1", "--fetch-timeout=20000"]
        try:
            fetched = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip("npm could not fetch the Node SDK within two minutes")
        if fetched.returncode:
            pytest.skip(f"npm could not fetch the Node SDK: {fetched.stderr.strip()[-300:]}")
        done.write_text(locked, "utf-8")
    return node


def test_the_node_sdk_keeps_its_contract(node: str, service: RunningService, tmp_path: Path) -> None:
    script = INSTALLED / "contract.mjs"  # Node looks for packages beside the script
    shutil.copy(SCRIPTS / script.name, script)
    settings = {"OPENAI_BASE_URL": service.url, "OPENAI_API_KEY": service.key, "BASE_NAME": BASE_NAME}
    done = subprocess.run([node, "--test-reporter=tap", str(script)], env=os.environ | settings, cwd=tmp_path,
                          capture_output=True, text=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line for line in script.read_text("utf-8").splitlines() if line.startswith("test(")]
    assert done.stdout.count("\nok ") == len(names) > 5, done.stdout
