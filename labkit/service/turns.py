"""Training gives way while answers are computed.

Two processes that both keep all cores busy wait for each other's threads at every matrix
product: a token that takes 20 ms on a quiet machine was seen to take 2 s beside a training. So
the scheduler touches a file while it has something to answer, and the worker waits between two
steps as long as that file is fresh. Should either die, nothing is left locked.
"""

import time
from pathlib import Path

FRESH_SECONDS = 0.3
PATIENCE_SECONDS = 2.0  # the longest wait before a step, so that endless requests do not stop training
TOUCH_SECONDS = 0.1


class AnsweringSign:
    """The file `folder/answering`; its time of change tells when answers were last computed."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "answering"
        self._touched = 0.0

    def show(self) -> None:
        """Answers are being computed now."""
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._path.touch()
            self._touched = time.monotonic()

    def give_way(self) -> None:
        """Wait until no answers are computed, or patience ends."""
        end = time.monotonic() + PATIENCE_SECONDS
        while self._fresh() and time.monotonic() < end:
            time.sleep(0.02)

    def _fresh(self) -> bool:
        try:
            return abs(time.time() - self._path.stat().st_mtime) < FRESH_SECONDS
        except FileNotFoundError:
            return False
