"""One request's prompts on their way through the scheduler, and what comes back.

A `Call` is made in the event loop and handed to the scheduler's thread, which fills it in and
posts pieces of answers back to the loop. What is posted never changes afterwards.
"""

import asyncio
import codecs
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from labkit.service.models import Weights

if TYPE_CHECKING:  # the engine takes seconds to import, which only the scheduler's thread spends
    from torch import Tensor

    from labkit.engine.encode import Prompt
    from labkit.engine.generate import Request, Sequence, Token

Conversation = tuple[dict[str, str], ...]
BACKGROUND: ContextVar[bool] = ContextVar("background", default=False)  # set where nobody waits for the answer


@dataclass(frozen=True)
class Sampling:
    """How to answer. `max_tokens` None is all that the context has room for."""

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    top_logprobs: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Shown:
    """A token that stands in an answer's text, beginning at character `offset`."""

    token: "Token"
    offset: int


@dataclass(frozen=True)
class Piece:
    """What was added to answer number `index`; the last piece of an answer has its finish reason."""

    index: int
    text: str
    tokens: list[Shown]
    finish_reason: str | None


class Reader:
    """Follows a growing sequence: which of its text and tokens may be shown, and were not yet.

    A token is shown when text at or after its first character is, or when the answer was cut at
    its length: then all are. The end-of-text token and tokens of a stop sequence never are.
    """

    def __init__(self, sequence: "Sequence", index: int, special: frozenset[int]) -> None:
        self.sequence, self.index = sequence, index
        self._offsets = Offsets(special)
        self._placed: deque[Shown] = deque()
        self._text = self._tokens = 0  # characters shown, tokens placed

    def take(self) -> Piece:
        """What has become visible since the last call."""
        sequence = self.sequence
        for token in sequence.tokens[self._tokens :]:
            self._placed.append(Shown(token, self._offsets.place(token)))
        self._tokens = len(sequence.tokens)
        text = sequence.text
        shown = []
        while self._placed and (self._placed[0].offset < len(text) or sequence.finish_reason == "length"):
            shown.append(self._placed.popleft())
        fresh, self._text = text[self._text :], len(text)
        return Piece(self.index, fresh, shown, sequence.finish_reason)


class Offsets:
    """Where each token's first character stands in the text; `special` tokens stand for no text."""

    def __init__(self, special: frozenset[int] = frozenset()) -> None:
        self._special, self.characters = special, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def place(self, token: "Token") -> int:
        """The offset of the next token, in characters."""
        offset = self.characters
        if token.id in self._special or not token.bytes:
            return offset
        unfinished = self._decoder.getstate()[0]
        if unfinished and token.bytes[0] & 0xC0 != 0x80:  # no continuation: what was begun will never be a character
            offset += len(unfinished.decode(errors="replace"))
        self.characters += len(self._decoder.decode(token.bytes))
        return offset


@dataclass(eq=False)
class Call:
    """Prompts of one owner for one model, each answered `copies` times. Answers are numbered prompt by prompt."""

    owner: str
    weights: Weights
    prompts: list[str | list[int] | Conversation]
    sampling: Sampling
    param: str = "prompt"  # the request's parameter that holds the prompts, for errors
    copies: int = 1
    scored: bool = False  # the prompts' own log-probabilities are wanted as well
    echoed: bool = False  # the prompts' texts are wanted in the answers
    streamed: bool = False
    embedded: bool = False  # the prompts' embeddings are wanted; then `sampling.max_tokens` is 0

    # What the scheduler fills in before it posts the first piece.
    fingerprint: str = ""
    token_bytes: Callable[[int], bytes] = bytes
    encoded: "list[Prompt]" = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scores: "list[list[Token]]" = field(default_factory=list)
    vectors: "list[Tensor]" = field(default_factory=list)  # embeddings, in the order of the prompts
    cached_tokens: int = 0

    # Used by the scheduler only.
    waiting: "deque[tuple[int, Request]]" = field(default_factory=deque)
    unfinished: int = 0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.background = BACKGROUND.get()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Piece] | Exception | None] = asyncio.Queue()

    @property
    def size(self) -> int:
        """How many answers or embeddings are wanted."""
        return len(self.prompts) * self.copies

    @property
    def unscored(self) -> bool:
        """Whether prompts are still to be scored, which comes before any answer."""
        return self.scored and len(self.scores) < len(self.encoded)

    def post(self, item: list[Piece] | Exception | None) -> None:
        """From the scheduler's thread: pieces (an empty list says that the call was accepted), an error, or the end."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop has closed: nobody waits any more
            self.cancelled = True

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What the scheduler posts, to the end; raises what went wrong."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

