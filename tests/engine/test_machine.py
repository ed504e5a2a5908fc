"""What the machine is quick with is measured, remembered, and not believed of a busy machine."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from labkit.engine import machine


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    return tmp_path / "machine.json"


def test_what_a_quiet_machine_is_quick_with_is_remembered(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "QUIET", 0.0)
    found = machine.measured()
    assert json.loads(note.read_text()) == found and found["quiet"]
    assert found["flops"][found["dtype"]] > 0 and 1 <= found["threads"] <= found["available"]
    note.write_text(json.dumps(found | {"dtype": "float32"}))
    assert machine.measured()["dtype"] == "float32"  # read, not measured again
    note.write_text(json.dumps(found | {"dtype": "float32", "torch": "another"}))
    assert machine.measured()["torch"] == torch.__version__


@pytest.mark.parametrize("int8", [{}, {"int8": {"float32": True, "bfloat16": True}}])
def test_a_note_of_an_earlier_version_is_measured_again(
    int8: dict[str, object], note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LABKIT_DTYPE", raising=False)
    monkeypatch.setattr(machine, "QUIET", 0.0)
    found = machine.measured()
    note.write_text(json.dumps({key: value for key, value in found.items() if key != "int8"} | int8))
    assert isinstance(machine.int8_pays(), bool)
    assert isinstance(json.loads(note.read_text())["int8"], bool)


def test_a_busy_machine_is_measured_again_later(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "QUIET", 2.0)  # a thread can have no core for twice the time
    busy = machine.measured()
    assert not busy["quiet"] and busy["threads"] == machine.AVAILABLE
    monkeypatch.setattr(machine, "QUIET", 0.0)
    assert machine.measured() == busy  # for some minutes
    os.utime(note, times=(time.time() - machine.TRUSTED,) * 2)
    assert machine.measured()["quiet"]


def test_a_wait_for_a_core_is_not_taken_for_a_slow_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    waits = iter([0.2])  # longer than all is measured, but in the first try alone

    def kept_waiting() -> None:
        time.sleep(next(waits, 0.0))

    first, second = machine._best_seconds([kept_waiting, lambda: sum(range(1000))])
    assert first < 0.2 and second < 0.2


@pytest.mark.parametrize(("seconds", "threads"), [
    ({8: 1.0, 6: 0.9, 4: 0.5, 2: 0.8}, 4),  # four quick cores beside four slow ones
    ({8: 1.0, 6: 0.97, 4: 0.96, 2: 1.5}, 8),  # within the noise
])
def test_fewer_threads_are_taken_where_they_are_quicker(
    seconds: dict[int, float], threads: int, note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "AVAILABLE", 8)
    monkeypatch.setattr(machine, "QUIET", 0.0)
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, threads: (seconds.get(threads, 4.0), 5.0, 6.0))
    before = torch.get_num_threads()
    try:
        machine.use_threads()
        assert torch.get_num_threads() == threads == machine.measured()["threads"]
    finally:
        torch.set_num_threads(before)


def test_a_number_of_threads_that_somebody_chose_is_kept(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(machine, "QUIET", 0.0)  # of a busy machine threads are not measured in any case
    monkeypatch.setattr(machine, "AVAILABLE", 8)
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, threads: (float(threads), 20.0, 30.0))
    assert machine.measured()["threads"] == 8
