"""Examples and prompts -> token ids, and the place where an adapter starts.

Training, validation and inference all come through here, so they agree to the token on where
the prompt ends and where the adapter begins to act. A prompt's ending (the separator, or the
chat template's assistant header) and the completion are encoded apart from what stands before
them: the tokens at the seam then do not depend on the prompt's last letters.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from labkit.engine.adapter import Start
from labkit.engine.model import BaseModel
from labkit.errors import ContextError, DataError
from labkit.examples import Chat, Completion, Example

MAX_INVOCATION = 32  # tokens; a longer common ending is used from there on


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids; an adapter acts from index `start` on."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Encoded:
    """One supervised completion: the loss is taken on `completion` only."""

    prompt: Prompt
    completion: list[int]

    @property
    def tokens(self) -> int:
        """How many tokens the example counts in `trained_tokens`."""
        return len(self.prompt.ids) + len(self.completion)


def find_start(model: BaseModel, examples: Sequence[Example], activated: bool) -> Start:
    """Where an adapter for these examples starts: at what all their prompts end with."""
    if not activated:
        return Start(False)
    if isinstance(examples[0], Chat):
        return Start(True, "", tuple(model.encode(assistant_header(model)))[-MAX_INVOCATION:])
    text = separator([example.prompt for example in examples if isinstance(example, Completion)])
    return Start(True, text, tuple(model.encode(text))[-MAX_INVOCATION:])


def separator(prompts: Sequence[str]) -> str:
    """The ending that all prompts share, from a line break or a space on; empty if they share none."""
    common = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    for edge in ("\n", " "):
        if edge in common:
            return common[common.index(edge) :]
    return ""


def encode_text(model: BaseModel, text: str, start: Start | None) -> Prompt:
    """A plain prompt. `start` None is the bare base model, which computes only the last token afresh."""
    ending = start.text if start and start.activated and start.text and text.endswith(start.text) else ""
    body = text.removesuffix(ending)
    ids = _opening(model) + model.encode(body) + model.encode(ending)
    return _prompt(ids or [model.eos], start)


def encode_ids(ids: Sequence[int], start: Start | None) -> Prompt:
    """A prompt that is given as token ids already."""
    return _prompt(list(ids), start)


def encode_chat(model: BaseModel, messages: Sequence[dict[str, str]], start: Start | None) -> Prompt:
    """A conversation that the assistant is to continue, or to begin, through the model's own chat template."""
    header = assistant_header(model)
    body = render(model, messages, header=True).removesuffix(header) if messages else ""  # transformers refuses none
    return _prompt(model.encode(body) + model.encode(header), start)


def encode_examples(
    model: BaseModel, examples: Sequence[Example], start: Start, limit: int | None = None
) -> tuple[list[Encoded], int]:
    """All supervised completions of `examples`, and how many of their prompts were cut.

    Each trained assistant turn of a chat becomes an example of its own, whose prompt is all
    that came before it. A prompt that does not fit into `limit` tokens (default: the model's
    context) together with its completion loses its beginning. Raises `ContextError` when a
    completion alone does not fit.
    """
    limit = min(limit or model.context, model.context)
    encoded, cut = [], 0
    for number, example in enumerate(examples, 1):
        for prompt, completion in _pairs(model, example, start):
            room = limit - len(completion)
            if room < 1:
                raise ContextError(
                    f"Example {number} has a completion of {len(completion)} tokens, but an example may have "
                    f"{limit} at most. Shorten or split the completion."
                )
            if len(prompt.ids) > room:
                excess = len(prompt.ids) - room
                prompt = Prompt(prompt.ids[excess:], max(0, prompt.start - excess))
                cut += 1
            encoded.append(Encoded(prompt, completion))
    return encoded, cut


def render(model: BaseModel, messages: Sequence[dict[str, str]], header: bool) -> str:
    """The conversation as one text; with `header`, up to where the assistant's answer begins."""
    turns = [{**turn, "role": "system" if turn["role"] == "developer" else turn["role"]} for turn in messages]
    try:
        return model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header)
    except Exception as error:  # templates raise what they like, and jinja its own kinds
        raise DataError(f"The model's chat template refuses this conversation: {error}") from error


def assistant_header(model: BaseModel) -> str:
    """What the chat template puts before an assistant's answer."""
    turn = [{"role": "user", "content": "?"}]
    return render(model, turn, header=True).removeprefix(render(model, turn, header=False))


def _pairs(model: BaseModel, example: Example, start: Start) -> list[tuple[Prompt, list[int]]]:
    if isinstance(example, Completion):
        completion = [*model.encode(example.completion), model.eos]
        return [(encode_text(model, example.prompt, start), completion)]
    pairs = []
    for index, (message, trained) in enumerate(zip(example.messages, example.trained, strict=True)):
        if trained:
            prompt = encode_chat(model, example.messages[:index], start)
            pairs.append((prompt, [*model.encode(message["content"]), model.eos]))
    return pairs


def _prompt(ids: list[int], start: Start | None) -> Prompt:
    if start is None or not start.activated:
        return Prompt(ids, len(ids) - 1)
    return Prompt(ids, max(0, len(ids) - start.length))


def _opening(model: BaseModel) -> list[int]:
    """The token that this tokenizer puts before every text, if it is of that kind (Llama 2, Gemma)."""
    opening = model.tokenizer("", verbose=False)["input_ids"]
    return list(opening) if opening == [model.tokenizer.bos_token_id] else []
