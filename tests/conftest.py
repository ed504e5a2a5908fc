"""What many tests need: a tiny random model, and the real service in a process of its own on port 0."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from labkit import paths
from labkit.client.connect import stop_service

BASE_NAME = "tiny-llama"
START = ("from pathlib import Path; import sys; from labkit.service.run import serve; "
         "serve(port=0, home=Path(sys.argv[1]), base=Path(sys.argv[2]), base_name=sys.argv[3], "
         "warm=sys.argv[4] == 'warm')")
ENDED = ("succeeded", "failed", "cancelled")
HOME = paths.COURSE / "build" / "test"  # LABKIT_HOME of the whole run, notebooks included


def pytest_configure(config: pytest.Config) -> None:
    """Keep the user's own LABKIT_HOME out of it. Only fetched assets stay from one run to the next."""
    if _is_helper(config):
        own = HOME / config.workerinput["workerid"]
        own.mkdir(parents=True, exist_ok=True)
        (own / "assets").symlink_to(HOME / "assets", target_is_directory=True)
        os.environ["LABKIT_HOME"] = str(own)
        assert "torch" not in sys.modules, "torch looks at OMP_NUM_THREADS when it is loaded"
        os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores
    else:
        os.environ["LABKIT_HOME"] = str(HOME)
        _clear()
        (HOME / "assets").mkdir(parents=True, exist_ok=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the service that a notebook started."""
    stop_service()
    if not _is_helper(config):
        _clear()


def _is_helper(config: pytest.Config) -> bool:
    """Whether this is one of several processes that run the tests, and not the one that started them (pytest-xdist)."""
    return hasattr(config, "workerinput")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each notebook took."""
    seconds: dict[str, float] = {}
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        name = report.nodeid.split("::")[0]
        if name.endswith(".ipynb"):
            seconds[name] = seconds.get(name, 0) + report.duration
    for name, taken in sorted(seconds.items()):
        terminalreporter.write_line(f"{name}: {taken:.0f} s")


def _clear() -> None:
    for left in HOME.iterdir() if HOME.exists() else []:
        if left.is_dir() and left.name != "assets":
            shutil.rmtree(left, ignore_errors=True)
        elif left.is_file():
            left.unlink(missing_ok=True)


class RunningService:
    """A service process on its own home folder, started and ended by the tests."""

    def __init__(self, home: Path, base: Path, warm: bool = True, tiny: bool = True) -> None:
        """`tiny` runs float32 on one thread, which suits a tiny model; otherwise all is as users have it."""
        self.home, self.base, self.warm = home, base, warm
        self.settings = {"LABKIT_DTYPE": "float32", "OMP_NUM_THREADS": "1"} if tiny else {}
        self.log_file = home.with_suffix(".log")
        self.start()

    def start(self) -> None:
        """Start the process and wait until it has printed where it answers."""
        environment = os.environ | self.settings | {"PYTHONPATH": str(paths.COURSE), "LABKIT_HOME": str(self.home)}
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, stderr=log, env=environment,
                                            text=True)
        assert self.process.stdout is not None
        printed = [self.process.stdout.readline() for _ in range(3)]
        said = dict(line.split(" ", 1)[1].strip().split("=", 1) for line in printed[1:] if "=" in line)
        assert said, self.log_file.read_text()
        self.url, self.key = said["OPENAI_BASE_URL"], said["OPENAI_API_KEY"]
        self.client = openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=30)

    def command(self) -> list[str]:
        """What is started; it prints three lines when it is ready."""
        warm = "warm" if self.warm else "cold"
        return [sys.executable, "-c", START, str(self.home), str(self.base), BASE_NAME, warm]

    def kill(self) -> None:
        """End the process as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End the process by SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def log(self, event: str) -> list[dict[str, Any]]:
        """The structured log lines of one kind."""
        lines = [line for line in self.log_file.read_text().splitlines() if line.startswith("{")]
        return [entry for line in lines if (entry := json.loads(line))["event"] == event]


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Ask `condition` until it says yes; its answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(0.03)
    raise AssertionError(f"not within {seconds} s")


def finished(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    """The job when it has ended."""
    return wait_until(lambda: (job := client.fine_tuning.jobs.retrieve(job_id)).status in ENDED and job)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Rows as the content of a training file."""
    return "\n".join(json.dumps(row) for row in rows).encode()


def posts(count: int = 40) -> bytes:
    """Prompt/completion examples of two labels."""
    return jsonl([{"prompt": f"post {i} about the {('bat', 'ice')[i % 2]}\n\n###\n\n",
                   "completion": (" baseball", " hockey")[i % 2]} for i in range(count)])


def chats(count: int = 12) -> bytes:
    """Chat examples."""
    return jsonl([{"messages": [{"role": "user", "content": f"question {i}"},
                                {"role": "assistant", "content": f"answer {i}"}]} for i in range(count)])


def upload(client: openai.OpenAI, content: bytes) -> str:
    """The id of an uploaded training file."""
    return client.files.create(file=("data.jsonl", content), purpose="fine-tune").id


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    """The `method` of a job."""
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny  # loads torch, which pytest_configure must precede

    return tiny.make(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service") / "home", tiny_model)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def client(service: RunningService) -> openai.OpenAI:
    return service.client
