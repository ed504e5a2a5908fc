"""Training waits while answers are computed, and never for ever."""

import time
from pathlib import Path

import pytest

from labkit.service import turns


def waited(sign: turns.AnsweringSign) -> float:
    begin = time.monotonic()
    sign.give_way()
    return time.monotonic() - begin


def test_training_waits_only_while_the_sign_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, scheduler = turns.AnsweringSign(tmp_path / "cache"), turns.AnsweringSign(tmp_path / "cache")
    assert waited(worker) < turns.FRESH_SECONDS / 2
    scheduler.show()
    assert waited(worker) >= turns.FRESH_SECONDS / 2
    assert waited(worker) < turns.FRESH_SECONDS / 2
    monkeypatch.setattr(turns, "FRESH_SECONDS", 60.0)
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", 0.2)
    assert 0.2 <= waited(worker) < 2
