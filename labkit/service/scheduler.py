"""The one thread that owns the model: it batches the requests of all clients.

Between two tokens it takes in new requests, as many as the generator has room for; so a long
generation holds up nobody for longer than one token. Owners take turns, and an owner's calls do;
and an owner whose every request waits finds some room that those at work may not fill.
"""

import queue as queues
import threading
import time
import traceback
from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.errors import DataError, LabkitError
from labkit.service import queue
from labkit.service.calls import Call, Reader
from labkit.service.errors import ApiError, bad_request, from_exception, internal_error
from labkit.service.gate import log
from labkit.service.turns import AnsweringSign

if TYPE_CHECKING:
    from labkit.engine.generate import Request

NEWCOMERS_SHARE = 1.25  # of the generator's room, for requests of owners for whom nothing runs
BACKGROUND_SHARE = 0.5  # of the generator's room: the rest is kept free for clients who wait
BACKGROUND_AT_A_TIME = 8  # prompts read between two tokens, which a client who comes just then waits for
BACKGROUND_PATIENCE = 2.0  # seconds that a batch's requests stand back, so that endless requests do not stop a batch
MAX_WAITING = 20_000  # answers of one owner; more are turned away with 429
OPEN_CHARACTERS = 100_000  # of prompts turned into tokens between two tokens: some 20 ms
EMBED_TOKENS = 2048  # embedded in one pass, padding included: as long as a token of many answers takes


class Scheduler(threading.Thread):
    """Hand it a `Call` by `submit`; stop one by `cancel`. The model is loaded in the thread."""

    def __init__(self, base: Path, base_name: str, cache: Path) -> None:
        super().__init__(name="scheduler", daemon=True)
        self.base, self.base_name, self.cache = base, base_name, cache
        self._sign = AnsweringSign(cache.parent)
        self._inbox: queues.SimpleQueue[Call | None] = queues.SimpleQueue()
        self._coming: deque[Call] = deque()  # received and not accepted: not all prompts are encoded
        self._calls: deque[Call] = deque()  # accepted and not finished
        self._readers: dict[int, tuple[Call, Reader]] = {}  # of running sequences, by their id()
        self._loaded = self._closing = False
        self._answers: Counter[str] = Counter()  # submitted and not finished, by owner
        self._turns: dict[str, float] = {}  # when an owner was last given one
        self._background_begun = 0.0  # when a batch's requests were last given a turn
        self._lock = threading.Lock()  # of `_answers`

    # --- for other threads ---------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Queue a call. Raises 429 when too many answers are waiting for its owner already."""
        waiting = self._answers[call.owner]
        if waiting and waiting + call.size > MAX_WAITING:
            raise ApiError(429, f"{waiting} answers are waiting for you already. Try again a little later, with fewer "
                                "requests at a time.", "rate_limit_exceeded", headers={"Retry-After": "2"})
        self._count(call, call.size)
        self._inbox.put(call)

    def cancel(self, call: Call) -> None:
        """Nobody waits for this call any more."""
        call.cancelled = True

    def warm(self) -> None:
        """Load the model now rather than with the first call."""
        self._inbox.put(None)

    def close(self) -> None:
        """End the thread after the token it is at."""
        self._closing = True
        self._inbox.put(None)
        self.join(2)

    def _count(self, call: Call, change: int) -> None:
        with self._lock:
            self._answers[call.owner] += change
            if not self._answers[call.owner]:
                del self._answers[call.owner]

    # --- the thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """Serve calls until `close`."""
        while not self._closing:
            self._receive()
            self._open_some()
            if not self._calls:
                continue
            try:
                self._sign.show()
                self._drop_cancelled()
                self._score_one()
                self._embed_some()
                self._admit()
                self._step()
            except Exception as error:  # out of memory, say: these calls fail, the next ones may not
                self._report(error)
                for call in list(self._calls):
                    self._end(call, from_exception(error) or internal_error())
                self._reset()

    def _receive(self) -> None:
        """Take in new calls; wait for one if there is nothing else to do."""
        block = not self._calls and not self._coming
        while True:
            try:
                call = self._inbox.get(block=block)
            except queues.Empty:
                return
            block = False
            if self._closing:
                return
            try:
                self._load()
            except Exception as error:
                self._refuse(call, error)
            else:
                if call is not None:
                    self._coming.append(call)

    def _refuse(self, call: Call | None, error: Exception) -> None:
        known = from_exception(error)
        if known is None and isinstance(error, DataError):
            known = bad_request(str(error), call.param if call else None)
        elif known is None and isinstance(error, LabkitError):
            known = ApiError(503, str(error), "model_unavailable", retry=False)
        if known is None or call is None:
            self._report(error)
        if call is not None:
            self._end(call, known or internal_error())

    def _report(self, error: Exception) -> None:
        # The message of a LabkitError is made for users; another's might quote a text.
        message = str(error) if isinstance(error, LabkitError) else None
        log("error", type=type(error).__name__, message=message, frames=traceback.format_tb(error.__traceback__))

    def _load(self) -> None:
        if self._loaded:
            return
        begin = time.monotonic()
        from labkit.engine import embed, generate, model
        from labkit.engine.cache import PromptCache
        from labkit.service.intake import Intake

        self._generate, self._embed = generate, embed.embed
        self._model = model.load(self.base)
        self._cache = PromptCache(self._model, self.cache)
        self._intake = Intake(self._model, self.base_name, lambda: [*self._calls, *self._coming])
        self._reset()
        self._loaded = True
        log("model_loaded", fingerprint=self._intake.fingerprint, seconds=round(time.monotonic() - begin, 1))

    def _reset(self) -> None:
        self._generator = self._generate.Generator(self._model, self._cache)
        self._readers.clear()

    # --- a call's beginning --------------------------------------------------------------------

    def _open_some(self) -> None:
        """Encode prompts of the calls that are coming, by turns, so that long ones hold up nobody for long."""
        room = OPEN_CHARACTERS
        while self._coming and room > 0:
            call = self._coming.popleft()
            if call.cancelled:
                self._end(call)
                continue
            try:
                room -= self._intake.encode_some(call, OPEN_CHARACTERS // 10)
                if len(call.encoded) < len(call.prompts):
                    self._coming.append(call)
                else:
                    self._accept(call)
            except Exception as error:
                self._refuse(call, error)

    def _accept(self, call: Call) -> None:
        """Queue a call's requests."""
        call.waiting.extend(enumerate(self._intake.requests(call)))
        call.unfinished = len(call.waiting)
        call.post([])
        if call.unfinished or call.scored or call.embedded:
            self._calls.append(call)
        else:
            self._end(call)

    # --- between two tokens --------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for call in [call for call in self._calls if call.cancelled]:
            for owner, reader in list(self._readers.values()):
                if owner is call:
                    self._generator.drop(reader.sequence)
                    del self._readers[id(reader.sequence)]
            self._end(call)

    def _in_turn(self) -> list[Call]:
        """The calls that may begin something now: those of batches only if no client waits, or after a while."""
        alone = all(call.background for call in self._calls)
        direct, background = (queue.in_turn([
            call for call in self._calls if call.background is kind and (call.unscored or call.embedded or call.waiting)
        ], self._turns) for kind in (False, True))
        if alone:
            return background
        patient = time.monotonic() < self._background_begun + BACKGROUND_PATIENCE
        return direct if patient else direct + background[:1]

    def _begun(self, call: Call) -> None:
        now = self._turns[call.owner] = time.monotonic()
        if call.background:
            self._background_begun = now

    def _score_one(self) -> None:
        """Log-probabilities of one prompt, before its call's answers begin."""
        for call in self._in_turn():
            if call.unscored:
                prompt = call.encoded[len(call.scores)]
                adapter = self._intake.adapter(call.weights)
                call.scores.append(self._generate.score(self._model, prompt, adapter, call.sampling.top_logprobs))
                self._begun(call)
                if not call.unscored and not call.unfinished:
                    self._end(call)
                return

    def _embed_some(self) -> None:
        """Embeddings of some prompts, by turns from all calls that want any."""
        waiting = [(call, prompt.ids) for call in self._in_turn() if call.embedded
                   for prompt in call.encoded[len(call.vectors) :]]
        if not waiting:
            return
        longest = count = 0
        for _, ids in waiting:
            longest = max(longest, len(ids))
            if count and longest * (count + 1) > EMBED_TOKENS:
                break
            count += 1
        self._calls.rotate(-1)
        vectors = self._embed(self._model, [ids for _, ids in waiting[:count]])
        for (call, _), vector in zip(waiting, vectors, strict=False):
            call.vectors.append(vector)
            self._begun(call)
            if len(call.vectors) == len(call.encoded):
                self._end(call)

    def _admit(self) -> None:
        """Start as many waiting requests as there is room for, by turns from all calls."""
        chosen: list[tuple[Call, int, Request]] = []
        turns = deque(call for call in self._in_turn() if call.waiting and not call.unscored)
        served = {call.owner for call, _ in self._readers.values()}
        while turns:
            call = turns.popleft()
            index, request = call.waiting[0]
            share = BACKGROUND_SHARE if call.background else 1.0 if call.owner in served else NEWCOMERS_SHARE
            enough = call.background and len(chosen) >= BACKGROUND_AT_A_TIME
            if enough or not self._generator.room(*[other for _, _, other in chosen], request, share=share):
                # Nobody overtakes, or a long prompt might wait for ever; only owners for whom nothing runs may.
                if not call.background and call.owner not in served:
                    break
                turns = deque(other for other in turns
                              if not other.background and (call.background or other.owner not in served))
                continue
            call.waiting.popleft()
            chosen.append((call, index, request))
            if call.waiting:
                turns.append(call)
            served.add(call.owner)
            self._begun(call)
        if not chosen:
            return
        self._calls.rotate(-1)
        sequences = self._generator.add([request for _, _, request in chosen])
        for (call, index, _), sequence in zip(chosen, sequences, strict=True):
            self._readers[id(sequence)] = (call, Reader(sequence, index, self._model.special))
            if index % call.copies == 0:
                call.cached_tokens += sequence.cached_tokens

    def _step(self) -> None:
        """One token for every running sequence, delivered to those who wait."""
        if not self._generator.running:
            return
        fresh: dict[Call, list[Reader]] = {}
        for sequence in self._generator.step():
            call, reader = self._readers[id(sequence)]
            if sequence.finish_reason:
                del self._readers[id(sequence)]
                call.unfinished -= 1
            if sequence.finish_reason or call.streamed:
                fresh.setdefault(call, []).append(reader)
        for call, readers in fresh.items():
            call.post([reader.take() for reader in readers])
            if not call.unfinished:
                self._end(call)

    def _end(self, call: Call, error: ApiError | None = None) -> None:
        if call in self._calls:
            self._calls.remove(call)
        self._count(call, -call.size)
        call.post(error)


