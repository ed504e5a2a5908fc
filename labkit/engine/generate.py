"""Batched inference: many answers grow together, one token a step.

A prompt up to its last tokens comes from the prompt cache, computed by the frozen base model
for every fine-tuned model alike; the rest runs with the adapter asked for. Sequences of one
adapter form a batch whose keys and values stand in one buffer, aligned at the right; what
several prompts begin with stands apart, once for all of them. A new sequence joins and a
finished one leaves between two steps.
"""

import codecs
import math
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from labkit.engine import adapter as adapters
from labkit.engine import int8
from labkit.engine.adapter import Adapter
from labkit.engine.attention import Shared
from labkit.engine.cache import Past, PromptCache, run
from labkit.engine.encode import Prompt
from labkit.engine.model import BaseModel, Shape

MAX_ROWS = 32  # sequences that run at a time
MAX_TOKENS = 32_768  # of all of them together, prompt and answer: 750 MB for SmolLM2-135M
GROWTH = 32  # tokens by which a batch's buffer grows
PIECE = 256  # tokens scored at a time: logits for more would take too much memory
COLDEST = 1e-6  # a smaller temperature would make infinities of the logits


@dataclass(frozen=True)
class Request:
    """What to answer and how. `temperature` 0 is greedy; `top_logprobs` alternatives are recorded."""

    prompt: Prompt
    adapter: Adapter | None
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    # These change the logits before a token is chosen; log-probabilities see it.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Token:
    """One token, its bytes, its natural log-probability, and the most likely ones in its place."""

    id: int
    bytes: bytes
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


class Sequence:
    """One answer, running or finished (`finish_reason` "stop" or "length")."""

    def __init__(self, request: Request, model: BaseModel, cached_tokens: int) -> None:
        self.request = request
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.cached_tokens = cached_tokens
        self._model = model
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        self._chance = torch.Generator()
        if request.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(request.seed)
        self._room = min(request.max_tokens, model.context - len(request.prompt.ids))
        self._bias = torch.tensor(list(request.logit_bias)), torch.tensor(list(request.logit_bias.values()))
        self._counts: Counter[int] = Counter()  # of the answer's tokens

    @property
    def text(self) -> str:
        """The text so far that can be shown: whole characters, and no beginning of a stop sequence."""
        if self.finish_reason:
            return self._text
        held = max((n for stop in self.request.stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])),
                   default=0)
        return self._text[: len(self._text) - held]

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply the bias and the penalties to `[vocabulary]` logits, in place.

        Of a token that the answer holds c times so far, c * frequency_penalty + presence_penalty
        is taken away, as OpenAI's API reference defines them; the prompt does not count.
        """
        if self.request.logit_bias:
            logits[self._bias[0]] += self._bias[1]
        if self._counts and (self.request.presence_penalty or self.request.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()))
            logits[torch.tensor(list(self._counts))] -= (
                self.request.frequency_penalty * counts + self.request.presence_penalty)

    def pick(self, logits: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Choose the next token from `[vocabulary]` logits and append it."""
        request = self.request
        if request.temperature == 0:
            choice = int(logits.argmax())
        else:
            choice = _sample(logits / max(request.temperature, COLDEST), request.top_p, self._chance)
        top: list[tuple[int, float]] = []
        if request.top_logprobs:
            best = logprobs.topk(min(request.top_logprobs, len(logprobs)))
            top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        self.tokens.append(Token(choice, self._model.token_bytes(choice), float(logprobs[choice]), top))
        self._counts[choice] += 1
        self._extend(choice)

    def _extend(self, token: int) -> None:
        if token == self._model.eos:
            self._finish("stop")
            return
        if token not in self._model.special:
            self._text += self._decoder.decode(self.tokens[-1].bytes)
        ends = [place for stop in self.request.stop if (place := self._text.find(stop)) >= 0]
        if ends:
            self._text = self._text[: min(ends)]
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._room:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self._text += self._decoder.decode(b"", final=True)
        self.finish_reason = reason


class Generator:
    """Runs sequences of the base model and of any number of adapters side by side."""

    def __init__(self, model: BaseModel, cache: PromptCache) -> None:
        self.model, self.cache = model, cache
        self._batches: dict[str, _Batch] = {}

    @property
    def running(self) -> int:
        """How many sequences are not finished yet."""
        return sum(len(batch.rows) for batch in self._batches.values())

    def room(self, *requests: Request, share: float = 1.0) -> bool:
        """Whether all of `requests` may be added now, filling no more than `share` of the whole room.

        One alone always may when nothing runs.
        """
        wanted = [row.request for batch in self._batches.values() for row in batch.rows] + list(requests)
        tokens = sum(min(len(r.prompt.ids) + r.max_tokens, self.model.context) for r in wanted)
        return len(wanted) <= 1 or (len(wanted) <= share * MAX_ROWS and tokens <= share * MAX_TOKENS)

    @torch.inference_mode()
    def add(self, requests: Many[Request]) -> list[Sequence]:
        """Read the prompts, those of one adapter together. The first tokens come with the next `step`."""
        sequences: dict[int, Sequence] = {}
        groups: dict[tuple[str, int], list[Request]] = {}
        for request in requests:
            tail = len(request.prompt.ids) - request.prompt.start
            groups.setdefault((request.adapter.name if request.adapter else "", tail), []).append(request)
        for (name, _), group in groups.items():
            batch = self._read(group)
            sequences |= {id(row.request): row for row in batch.rows}
            if running := self._batches.get(name):
                running.catch_up(self.model)
                batch = _Batch.merged(self.model.shape, running, batch)
            self._batches[name] = batch
        return [sequences[id(request)] for request in requests]

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Give every running sequence its next token; return them, the finished ones for the last time."""
        advanced = []
        for name, batch in list(self._batches.items()):
            logits = batch.catch_up(self.model)
            for row, own in zip(batch.rows, logits, strict=True):
                row.adjust(own)
            for row, own, scores in zip(batch.rows, logits, logits.log_softmax(-1), strict=True):
                row.pick(own, scores)
            batch.logits = None
            advanced += batch.rows
            self._keep(name, [not row.finish_reason for row in batch.rows])
        return advanced

    def drop(self, sequence: Sequence) -> None:
        """Stop a running sequence, for nobody waits for it any more."""
        for name, batch in list(self._batches.items()):
            self._keep(name, [row is not sequence for row in batch.rows])

    def _keep(self, name: str, wanted: list[bool]) -> None:
        if not any(wanted):
            del self._batches[name]
        elif not all(wanted):
            self._batches[name].select([row for row, keep in enumerate(wanted) if keep])

    def _read(self, requests: list[Request]) -> "_Batch":
        """Run the prompts of one adapter, whose tails are equally long, up to the first logits."""
        adapter = requests[0].adapter
        everywhere = adapter if adapter and not adapter.start.activated else None
        prompts, tails = zip(*((r.prompt.ids[: r.prompt.start], r.prompt.ids[r.prompt.start :]) for r in requests),
                             strict=True)
        # With the same weights for prompt and tail, and a tail of one token, both may be read in one pass.
        following = [tail[0] for tail in tails] if adapter is everywhere and len(tails[0]) == 1 else []
        past, found = self.cache.fetch(prompts, everywhere, share=True, following=following)
        rows = [Sequence(request, self.model, cached) for request, cached in zip(requests, found, strict=True)]
        batch = _Batch(adapter, rows, past)
        if past.ahead:
            batch.append(*past.ahead)
        else:
            with int8.products(adapter is None):  # the prompt's last token, as it would be read with the others
                batch.forward(self.model, tails)
        return batch


class _Batch:
    """Sequences of one adapter; `states` has room at the right for tokens to come, `used` columns are filled."""

    def __init__(self, adapter: Adapter | None, rows: list[Sequence], past: Past) -> None:
        self.adapter, self.rows = adapter, rows
        self.states, self.lengths, self.shared = past.states, past.lengths, past.shared
        self.used = past.states.shape[4]
        self.logits: torch.Tensor | None = None

    def catch_up(self, model: BaseModel) -> torch.Tensor:
        """Logits for every row's next token, running its latest one through the model if that is still to do."""
        if self.logits is None:
            self.forward(model, [[row.tokens[-1].id] for row in self.rows])
        assert self.logits is not None
        return self.logits

    def forward(self, model: BaseModel, fresh: Many[list[int]]) -> None:
        """Run equally many fresh tokens a row and keep the logits after the last: `[rows, vocabulary]`."""
        count = len(fresh[0])
        past = Past(self.states[:, :, :, :, : self.used], self.lengths, self.shared)
        every = torch.arange(len(self.rows))
        with adapters.active(model, self.adapter), model.keeping(every, torch.full_like(every, count - 1)):
            output, states = run(model, past, torch.tensor(fresh))
        self.append(states, output.logits[0].float())

    def append(self, states: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep tokens already run: `states` `[layers, 2, rows, heads, n, width]`, and the logits after the last."""
        count = states.shape[4]
        if self.used + count > self.states.shape[4]:
            self.states = torch.nn.functional.pad(self.states, (0, 0, 0, count + GROWTH))
        self.states[:, :, :, :, self.used : self.used + count] = states
        self.logits = logits
        self.used += count
        self.lengths = [length + count for length in self.lengths]

    def select(self, keep: list[int]) -> None:
        """Keep only some rows."""
        self.rows = [self.rows[row] for row in keep]
        self.lengths = [self.lengths[row] for row in keep]
        self.states = self.states[:, :, keep]
        place = {row: number for number, row in enumerate(keep)}
        left = [Shared(part.states, [place[row] for row in part.rows if row in place]) for part in self.shared]
        self.shared = tuple(part for part in left if part.rows)
        if self.logits is not None:
            self.logits = self.logits[keep]

    @staticmethod
    def merged(shape: Shape, first: "_Batch", second: "_Batch") -> "_Batch":
        """One batch of both, each with the logits of its next tokens."""
        assert first.logits is not None and second.logits is not None
        lengths = first.lengths + second.lengths
        longest = max(lengths)
        states = torch.zeros(shape.layers, 2, len(lengths), shape.heads, longest, shape.width, dtype=shape.dtype)
        row = 0
        for batch in (first, second):
            for place, length in enumerate(batch.lengths):
                filled = batch.states[:, :, place, :, batch.used - length : batch.used]
                states[:, :, row, :, longest - length :] = filled
                row += 1
        moved = [Shared(part.states, [len(first.rows) + row for row in part.rows]) for part in second.shared]
        whole = _Batch(first.adapter, first.rows + second.rows, Past(states, lengths, (*first.shared, *moved)))
        whole.logits = torch.cat([first.logits, second.logits])
        return whole


def _sample(logits: torch.Tensor, top_p: float, chance: torch.Generator) -> int:
    """Draw from the most likely tokens that together have probability `top_p`."""
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        before[0] = -1.0  # the likeliest stays, also where `top_p` is 0 or too small for float32
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=chance)])


@torch.inference_mode()
def score(model: BaseModel, prompt: Prompt, adapter: Adapter | None, top: int = 0) -> list[Token]:
    """Every prompt token with its log-probability given those before it (not-a-number for the first)."""
    everywhere = adapter is not None and not adapter.start.activated
    bounds = [0, len(prompt.ids)] if adapter is None or everywhere else [0, prompt.start, len(prompt.ids)]
    cache, tokens = DynamicCache(), [Token(prompt.ids[0], model.token_bytes(prompt.ids[0]), math.nan)]
    for part, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        acting = adapter if everywhere or part == 1 else None
        with adapters.active(model, acting), int8.products(acting is None):
            for left in range(begin, end, PIECE):
                ids = prompt.ids[left : min(left + PIECE, end)]
                logits = model.network(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]
                following = prompt.ids[left + 1 : left + len(ids) + 1]
                for scores, token in zip(logits.float().log_softmax(-1), following, strict=False):
                    best = scores.topk(top) if top else None
                    likely = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else []
                    tokens.append(Token(token, model.token_bytes(token), float(scores[token]), likely))
    return tokens
