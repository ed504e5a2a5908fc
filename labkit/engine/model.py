"""The base model: weights and tokenizer."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from labkit import paths
from labkit.engine import attention, packed
from labkit.engine.machine import fast_dtype, int8_pays, packing_pays, use_threads
from labkit.errors import LabkitError

# For tokenizers that bring no chat template of their own, such as GPT-2's.
PLAIN_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The size of one token's keys and values: `layers` x (keys, values) x `heads` x `width`."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take."""
        return self.layers * 2 * self.heads * self.width * self.dtype.itemsize


class BaseModel:
    """A causal language model with its tokenizer, in evaluation mode and frozen.

    `digest` names the weights' content, so that cached keys and values of one model are never
    taken for another's. `context` is the longest sequence in tokens.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, digest: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.digest = digest
        self.context = _context_length(network)
        self.constant_past = network.config._attn_implementation == attention.NAME
        self.eos = _end_of_text(network, tokenizer)
        self.special = frozenset(tokenizer.all_special_ids)
        self.active_adapter: str | None = None  # what `adapter.active` has switched to
        self.layers = _layers(network)
        self.shape, plain = _probe(network, self.layers)
        self.enterable = self.constant_past and plain  # whether `stopping_before` and `entering` work
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, with nothing added before or after."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; a character may be spread over several tokens."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the output layer may be padded beyond the vocabulary
            return b""
        if token not in self.special and all(c in self._byte_of for c in piece):
            return bytes(self._byte_of[c] for c in piece)
        return self.tokenizer.decode([token]).encode()

    @contextmanager
    def keeping(self, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
        """Within the block, compute logits at positions (row, column) only: `[1, len(rows), vocabulary]`.

        The output layer costs a quarter of SmolLM2's forward pass, and most positions of a
        prompt are never asked for their prediction.
        """

        def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (inputs[0][rows, columns].unsqueeze(0), *inputs[1:])

        handle = self.network.get_output_embeddings().register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def stopping_before(self, first: int) -> Iterator[list[torch.Tensor]]:
        """Within the block, a forward pass does only what comes before layer number `first`.

        The list it yields receives what enters that layer, `[rows, n, hidden width]`, for each pass.
        """
        reached: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            reached.append(hidden)
            return hidden

        with _instead(self.layers[first : first + 1], keep), _instead(self.layers[first + 1 :], lambda x, *_, **__: x):
            yield reached

    @contextmanager
    def entering(self, first: int, hidden: torch.Tensor) -> Iterator[None]:
        """Within the block, a forward pass begins with layer number `first`, which `hidden` enters.

        `hidden` is what `stopping_before` found for the same tokens over the same past.
        """
        with _instead(self.layers[:first], lambda *_, **__: hidden):
            yield


@contextmanager
def _instead(layers: Sequence[torch.nn.Module], forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within the block, these layers do this."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # and the class's own shows again


def load(folder: Path | str, dtype: torch.dtype | None = None) -> BaseModel:
    """Load a causal LM from a folder in Hugging Face's format (any that transformers can load).

    `dtype` None takes what was measured to be quick here: the format, and whether prompts are read in int8.
    Raises `LabkitError` when the folder holds no such model.
    """
    folder = Path(folder)
    transformers_logging.disable_progress_bar()
    use_threads()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or fast_dtype(), local_files_only=True, use_safetensors=True
        )
        if attention.supported(type(network), network.config):
            network.set_attn_implementation(attention.NAME)
        eight = False
        if packing_pays(network.dtype):
            eight = dtype is None and int8_pays()
            packed.install(network, eight)
    except (OSError, ValueError, KeyError) as error:
        raise LabkitError(
            f"{folder} holds no causal language model that transformers can load ({error}). "
            "Name a folder with config.json, tokenizer.json and *.safetensors files."
        ) from error
    form = str(network.dtype).removeprefix("torch.") + "-int8" * eight
    return BaseModel(network, tokenizer, f"{_weights_digest(folder)}-{form}")


def _weights_digest(folder: Path) -> str:
    """A name for the content of all weight files and the tokenizer: 16 hexadecimal digits."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer.json"), *folder.glob("config.json")])
    return hashlib.sha256("".join(paths.sha256(file) for file in files).encode()).hexdigest()[:16]


def _context_length(network: PreTrainedModel) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if length := getattr(network.config, name, None):
            return int(length)
    return 2048  # architectures without position embeddings name no limit


def _end_of_text(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.eos_token_id, network.config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    raise LabkitError("The model names no end-of-text token; set eos_token in its tokenizer_config.json.")


def _layers(network: PreTrainedModel) -> list[torch.nn.Module]:
    """The network's layers, from the first to the last."""
    count = getattr(network.config, "num_hidden_layers", None)
    for part in network.modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == count:
            return list(part)
    raise LabkitError(f"{type(network).__name__} has no list of layers as transformers' decoders have it; choose a "
                      "model such as Llama, GPT-2, GPT-Neo, Qwen2 or Mistral.")


def _probe(network: PreTrainedModel, stack: list[torch.nn.Module]) -> tuple[Shape, bool]:
    """Learn by running one token the size of keys and values, and whether layers take and give hidden states alone."""
    cache, plain = DynamicCache(), []

    def look(_: torch.nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        plain.append(bool(given) and isinstance(returned, torch.Tensor))

    handles = [layer.register_forward_hook(look) for layer in stack]
    with torch.inference_mode():
        network(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    layers = [getattr(layer, "keys", None) for layer in cache.layers]
    sizes = {tuple(keys.shape) for keys in layers if keys is not None}
    if len(sizes) != 1 or any(keys is None for keys in layers):
        raise LabkitError(
            f"{type(network).__name__} keeps more than plain keys and values between tokens; labkit needs a "
            "transformer whose layers all attend alike, such as Llama, GPT-2, GPT-Neo, Qwen2 or Mistral."
        )
    _, heads, _, width = sizes.pop()
    return Shape(len(layers), heads, width, network.dtype), all(plain)
