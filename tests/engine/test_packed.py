"""Linear maps over packed weights give what plain ones give, and stay plain where weights cannot be packed."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear

from labkit.engine import adapter, machine, model, packed
from labkit.engine.lora import PackedLora
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


@needs_onednn
@pytest.mark.parametrize("constant", [True, False])
def test_lora_over_packed_weights_is_pefts(constant: bool) -> None:
    """Results and all gradients; `constant` is the input of the first layer with an adapter, which needs none."""
    torch.manual_seed(0)
    layer = PackedLora(Packed(torch.nn.Linear(48, 80).requires_grad_(False)), "own", LoraConfig(), r=4, lora_alpha=8)
    torch.nn.init.normal_(layer.lora_B["own"].weight)
    values = torch.randn(3, 7, 48)
    found = []
    for forward in (Linear.forward, PackedLora.forward):
        here = values.clone().requires_grad_(not constant)
        result = forward(layer, here)
        (result * result).sum().backward()
        weights = [layer.lora_A["own"].weight, layer.lora_B["own"].weight]
        found.append([result, *([] if constant else [here.grad]), *(weight.grad.clone() for weight in weights)])
        layer.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(values), layer.base_layer(values))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    return tmp_path


@needs_onednn
def test_the_quicker_form_is_measured_and_installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, threads: (2.0, 1.0, 3.0))  # packed: half the time
    loaded = model.load(tiny.make(home / "model"))
    linear = [part for part in loaded.network.modules() if isinstance(part, torch.nn.Linear)]
    assert linear and all(isinstance(part, Packed) for part in linear)
    assert loaded.network.get_output_embeddings() in linear
    adapter.create(loaded, "own", adapter.Start(activated=False))
    adapted = [part for part in loaded.network.modules() if isinstance(part, Linear)]
    assert adapted and all(type(part) is PackedLora for part in adapted)


def test_weights_stay_plain_where_they_cannot_be_packed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this processor has no such operation")

    monkeypatch.setattr(packed, "pack", missing)
    assert machine.measured()["packed"] == {"float32": False, "bfloat16": False}
    loaded = model.load(tiny.make(home / "model"))
    assert not any(isinstance(part, Packed) for part in loaded.network.modules())
