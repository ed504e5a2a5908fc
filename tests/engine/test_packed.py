"""Linear maps over packed weights give what plain ones give, and stay plain where weights cannot be packed."""

from pathlib import Path

import pytest
import torch

from labkit.engine import machine, model, packed
from labkit.engine.packed import Packed
from tests import tiny

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (2, 7, 48), (3, 48, 16)])
def test_results_and_gradients_are_those_of_a_plain_linear_map(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(48, 80, bias).requires_grad_(False)
    values = torch.randn(shape)
    if shape[-1] != 48:
        values = values.transpose(1, 2)  # not contiguous
    here, there = values.clone().requires_grad_(), values.clone().requires_grad_()
    expected, found = plain(there), Packed(plain)(here)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (found.sum() + (found * found).sum()).backward()  # the first one's gradient is one number, expanded
    (expected.sum() + (expected * expected).sum()).backward()
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(Packed(plain)(values), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    return tmp_path


@needs_onednn
def test_the_quicker_form_is_measured_and_installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, threads: (2.0, 1.0))  # packed takes half the time
    loaded = model.load(tiny.make(home / "model"))
    linear = [part for part in loaded.network.modules() if isinstance(part, torch.nn.Linear)]
    assert linear and all(isinstance(part, Packed) for part in linear)
    assert loaded.network.get_output_embeddings() in linear


def test_weights_stay_plain_where_they_cannot_be_packed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this processor has no such operation")

    monkeypatch.setattr(packed, "pack", missing)
    assert machine.measured()["packed"] == {"float32": False, "bfloat16": False}
    loaded = model.load(tiny.make(home / "model"))
    assert not any(isinstance(part, Packed) for part in loaded.network.modules())
