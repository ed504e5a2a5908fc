"""LoRA adapters through PEFT: make, switch, save, load.

An adapter adds `B @ A * alpha / r` to linear maps in the last third of the frozen base model's
layers (LoRA, arXiv 2106.09685): to attention's output and the feed-forward part, its gate left out.
In all maps, or in all layers, it learned no better, see EXPERIMENTS.md. An *activated* LoRA (arXiv
2504.12397) does so only from the end of the prompt on, so that the prompt's keys and values stay
those of the base model and can be cached.

Adapters are saved in PEFT's own format, and PEFT loads them without labkit: an activated one
carries the tokens at which it starts as `alora_invocation_tokens`.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft import get_peft_model_state_dict as adapter_state
from peft import set_peft_model_state_dict as set_adapter_state
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers.pytorch_utils import Conv1D

from labkit import paths
from labkit.engine.lora import PackedLora
from labkit.engine.model import BaseModel
from labkit.engine.packed import Packed
from labkit.errors import LabkitError

PEFT_PREFIX = "base_model.model."  # what PEFT puts before the name of every weight in a file
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute.*")  # several adapters are the point
SHARE = 1 / 3  # of the layers get an adapter, the last ones
# What makes queries, keys, values and the gate gets none: Llama's and most others' names, GPT-2's, GPT-NeoX's, Phi-3's.
SPARED = ("q_proj", "k_proj", "v_proj", "gate_proj", "c_attn", "query_key_value", "qkv_proj")
WEIGHTS, CONFIG, NOTE = "adapter_model.safetensors", "adapter_config.json", "labkit.json"


@dataclass(frozen=True)
class Start:
    """Where an adapter begins to act.

    `activated` False: everywhere (plain LoRA). True: where `tokens` begin, the invocation, with
    which prompts end. `text` is what prompt/completion prompts end with (the separator); empty
    for chat, whose prompts end with the template's assistant header, and for prompts without a
    separator, where the adapter acts on the last `len(tokens)` or 8 tokens, whatever they are.
    """

    activated: bool
    text: str = ""
    tokens: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """How many of a prompt's last tokens the adapter acts on (activated only)."""
        return len(self.tokens) or 8


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: its `name` inside the network, where it starts, a digest of its weights.

    `first` is the number of the first layer that it changes.
    """

    name: str
    start: Start
    digest: str
    first: int


def create(model: BaseModel, name: str, start: Start, rank: int = 16, seed: int = 0) -> Adapter:
    """Add a fresh adapter to the network: A random, B zero, so that it changes nothing yet."""
    first = len(model.layers) - math.ceil(len(model.layers) * SHARE)
    changed = {part for layer in model.layers[first:] for part in layer.modules()}
    linear = {name.removesuffix(".base_layer"): part for name, part in model.network.named_modules()
              if part in changed and isinstance(part, torch.nn.Linear | Conv1D) and ".lora_" not in name}
    wanted = [name for name in linear if name.rpartition(".")[2] not in SPARED]
    transposed = any(isinstance(part, Conv1D) for part in linear.values())  # GPT-2's linear layers
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=wanted,
                        fan_in_fan_out=transposed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _add(model, config, name, start, "")


def _add(model: BaseModel, config: LoraConfig, name: str, start: Start, digest: str) -> Adapter:
    """Put an adapter into the network; it is then the active one."""
    config._register_custom_module({Packed: PackedLora})  # PEFT's way to choose a layer for a kind of map
    model.network.add_adapter(config, name)
    _switch(model, name)  # adding enables no adapters if they were disabled
    first = next(number for number, layer in enumerate(model.layers)
                 if any(f".{name}." in path for path, _ in layer.named_parameters()))
    adapter = Adapter(name, start, digest, first)
    for weight in parameters(model, adapter).values():
        weight.data = weight.data.float()  # bfloat16 would round away most updates of a training
    return adapter


def parameters(model: BaseModel, adapter: Adapter) -> dict[str, torch.nn.Parameter]:
    """The adapter's weights by name, the only ones that training changes, in a fixed order."""
    mark = f".{adapter.name}."
    return {name: weight for name, weight in sorted(model.network.named_parameters()) if mark in name}


@contextmanager
def active(model: BaseModel, adapter: Adapter | None) -> Iterator[None]:
    """Within the block the network runs with `adapter`, or as the bare base model for None."""
    wanted = adapter.name if adapter else None
    if wanted != model.active_adapter:  # switching takes milliseconds
        _switch(model, wanted)
    yield


def _switch(model: BaseModel, name: str | None) -> None:
    if name is None:
        model.network.disable_adapters()
    else:
        model.network.enable_adapters()
        model.network.set_adapter(name)
    model.active_adapter = name


def save(model: BaseModel, adapter: Adapter, folder: Path) -> None:
    """Write the adapter into `folder` in PEFT's format, with a note of where it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model.network, adapter_name=adapter.name)
    weights = {PEFT_PREFIX + key: value.contiguous() for key, value in state.items()}
    # Written here, not by safetensors, whose error on a full disk is no `OSError`.
    paths.write_bytes(folder / WEIGHTS, to_bytes(weights, {"format": "pt"}))
    config = replace(model.network.peft_config[adapter.name], inference_mode=True)
    config.alora_invocation_tokens = list(adapter.start.tokens) or None if adapter.start.activated else None
    config.base_model_name_or_path = model.network.config.name_or_path
    # PEFT keeps the layers' names as a set, whose order is not fixed.
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    paths.write_text(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True, default=str))
    note = {"start": asdict(adapter.start), "base": model.digest}
    paths.write_text(folder / NOTE, json.dumps(note, indent=2))


def load(model: BaseModel, name: str, folder: Path) -> Adapter:
    """Add the adapter saved in `folder` to the network under `name`.

    Raises `LabkitError` when files are missing or damaged, or belong to another base model.
    """
    start, config, weights = _read(model, folder)
    # The network is only ever given the tokens on which the adapter acts, so to PEFT it is plain LoRA here.
    config.alora_invocation_tokens = None
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]
    adapter = _add(model, config, name, start, digest)
    set_adapter_state(model.network, weights, adapter_name=name)
    return adapter


def initialise(model: BaseModel, adapter: Adapter, folder: Path) -> None:
    """Let a fresh adapter begin from the weights saved in `folder`, to train a fine-tuned model on.

    Raises `LabkitError` as `load` does, and where sizes or layers differ.
    """
    weights = _read(model, folder)[2]
    fresh = adapter_state(model.network, adapter_name=adapter.name)
    if {key: value.shape for key, value in weights.items()} != {key: value.shape for key, value in fresh.items()}:
        raise LabkitError(f"The adapter in {folder} has another rank or other layers than the one to train; leave "
                          "labkit.rank out, and train a model of an earlier version of labkit anew.")
    set_adapter_state(model.network, weights, adapter_name=adapter.name)


def _read(model: BaseModel, folder: Path) -> tuple[Start, LoraConfig, dict[str, torch.Tensor]]:
    try:
        note = json.loads((folder / NOTE).read_text())
        config = LoraConfig.from_pretrained(str(folder))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise LabkitError(f"The adapter in {folder} is missing or damaged ({error}); train the model again.") from error
    if note["base"].split("-")[0] != model.digest.split("-")[0]:
        raise LabkitError(
            f"The adapter in {folder} was trained on another base model; start the service with that model, "
            "or fine-tune again on this one."
        )
    start = Start(note["start"]["activated"], note["start"]["text"], tuple(note["start"]["tokens"]))
    return start, config, {key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}


def remove(model: BaseModel, adapter: Adapter) -> None:
    """Take the adapter out of the network again."""
    with active(model, None):
        model.network.delete_adapter(adapter.name)
