"""The engine's tokens and texts as the SDK's answers and chunks."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs

from labkit.service import objects
from labkit.service.calls import Call, Offsets, Piece, Shown
from labkit.service.objects import Body

if TYPE_CHECKING:
    from labkit.engine.generate import Token

LEAST = -9999.0  # OpenAI's stand-in for a log-probability of minus infinity, which JSON cannot hold


def usage(call: Call, answers: Sequence[Piece]) -> Body:
    """What a call cost. Prompts count once, however many answers each has; the end-of-text token never counts."""
    prompt, completion = sum(len(p.ids) for p in call.encoded), sum(len(piece.tokens) for piece in answers)
    return objects.made(
        CompletionUsage, prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion,
        prompt_tokens_details={"cached_tokens": call.cached_tokens})


def mean_logprob(answer: Piece) -> float:
    """How likely the model found an answer, per token: what `best_of` goes by."""
    return sum(shown.token.logprob for shown in answer.tokens) / max(1, len(answer.tokens))


class Completions:
    """Answers of /v1/completions. `logprobs` is the number of alternatives, None for no log-probabilities."""

    def __init__(self, call: Call, logprobs: int | None) -> None:
        self.call, self.logprobs = call, logprobs
        self.id, self.created = objects.new_id("cmpl-"), objects.now()
        self._before: dict[int, int] = {}  # characters of the echoed prompt before each answer

    def whole(self, choices: list[Body], used: Body | None, with_usage: bool = True) -> Body:
        """The reply, or one chunk of a stream, which has the same shape."""
        # Loosely, here and below: a chunk's choice has no finish reason, a prompt's first token no log-probability.
        reply = objects.made_loosely(
            Completion, id=self.id, object="text_completion", created=self.created, model=self.call.weights.name,
            choices=choices, system_fingerprint=self.call.fingerprint)
        return reply | {"usage": used} if with_usage else reply

    def choice(self, piece: Piece, index: int, echo: int | None = None) -> Body:
        """An answer or a piece of one; `echo` is the number of the prompt that goes before it."""
        before = self.call.texts[echo] if echo is not None else ""
        tokens = [] if echo is None or self.logprobs is None else self._prompt_tokens(echo)
        if echo is not None:
            self._before[index] = len(before)
        logprobs = None
        if self.logprobs is not None:
            moved = [Shown(shown.token, shown.offset + self._before.get(index, 0)) for shown in piece.tokens]
            logprobs = self._logprobs([*tokens, *moved])
        return objects.made_loosely(CompletionChoice, index=index, text=before + piece.text,
                                    finish_reason=piece.finish_reason, logprobs=logprobs)

    def _prompt_tokens(self, number: int) -> list[Shown]:
        """The scored tokens of a prompt. A token that the tokenizer put before the text counts as standing at 0."""
        place, tokens = Offsets(), self.call.scores[number]
        offsets = [place.place(token) for token in tokens]
        excess = max(0, place.characters - len(self.call.texts[number]))
        return [Shown(token, max(0, offset - excess)) for token, offset in zip(tokens, offsets, strict=True)]

    def _logprobs(self, shown: Sequence[Shown]) -> Body:
        top = [self._alternatives(s.token) for s in shown] if self.logprobs else None
        return objects.made_loosely(
            Logprobs, tokens=[_spelled(s.token.bytes) for s in shown], top_logprobs=top,
            token_logprobs=[_finite(s.token.logprob) for s in shown], text_offset=[s.offset for s in shown])

    def _alternatives(self, token: "Token") -> dict[str, float | None] | None:
        """The most likely tokens and the chosen one; null for the first of a prompt, which nothing predicts."""
        if math.isnan(token.logprob):
            return None
        likely = {_spelled(self.call.token_bytes(id)): _finite(logprob) for id, logprob in token.top}
        return likely | {_spelled(token.bytes): _finite(token.logprob)}


class Chat:
    """Answers of /v1/chat/completions; `logprobs` tells whether they carry log-probabilities."""

    def __init__(self, call: Call, logprobs: bool) -> None:
        self.call, self.logprobs = call, logprobs
        self.id, self.created = objects.new_id("chatcmpl-"), objects.now()

    def whole(self, answers: Sequence[Piece]) -> Body:
        """The reply."""
        choices = [{"index": piece.index, "finish_reason": piece.finish_reason, "logprobs": self._logprobs(piece),
                    "message": {"role": "assistant", "content": piece.text, "refusal": None}} for piece in answers]
        return objects.made(ChatCompletion, object="chat.completion", choices=choices,
                            usage=usage(self.call, answers), **self._common())

    def chunk(self, piece: Piece | None, index: int = 0, used: Body | None = None, with_usage: bool = False) -> Body:
        """A chunk of a stream: an answer's beginning (`piece` None), a piece of it, or at the end the usage."""
        delta = {"role": "assistant", "content": "", "refusal": None} if piece is None else (
            {"content": piece.text} if piece.text or piece.tokens else {})
        logprobs = self._logprobs(piece) if piece and piece.tokens else None
        choices = [] if used else [{"index": index, "delta": delta, "logprobs": logprobs,
                                    "finish_reason": piece.finish_reason if piece else None}]
        chunk = objects.made(ChatCompletionChunk, object="chat.completion.chunk", choices=choices, **self._common())
        return chunk | {"usage": used} if with_usage else chunk

    def _common(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.call.weights.name,
                "system_fingerprint": self.call.fingerprint}

    def _logprobs(self, piece: Piece) -> Body | None:
        if not self.logprobs:
            return None
        content = [_entry(shown.token.bytes, shown.token.logprob) | {
            "top_logprobs": [_entry(self.call.token_bytes(id), logprob) for id, logprob in shown.token.top],
        } for shown in piece.tokens]
        return {"content": content, "refusal": None}


def _entry(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": _finite(logprob)}


def _finite(logprob: float) -> float | None:
    if math.isnan(logprob):
        return None
    return max(logprob, LEAST)


def _spelled(raw: bytes) -> str:
    """A token's text; one that is no whole character is spelled out as OpenAI's completions do."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
