"""From what a client sent to what the engine takes: prompts into tokens, models' names into adapters.

Used by the scheduler's thread alone, which imports it late: the engine takes seconds to load.
Adapters are read from the models' folders when they are first asked for.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from labkit.engine import adapter as adapters
from labkit.engine import encode
from labkit.engine.adapter import Adapter
from labkit.engine.encode import Prompt
from labkit.engine.generate import Request
from labkit.engine.model import BaseModel
from labkit.service.calls import Call, Conversation
from labkit.service.errors import ApiError, bad_request
from labkit.service.models import Weights

ADAPTERS = 8  # kept in memory


class Intake:
    """Fills in calls for one `model`. `at_work` tells the calls whose adapters are still needed."""

    def __init__(self, model: BaseModel, base_name: str, at_work: Callable[[], Iterable[Call]]) -> None:
        self.model, self.at_work = model, at_work
        self.fingerprint = f"fp_{base_name}_{model.digest}"
        self._token_bytes = lru_cache(65_536)(model.token_bytes)
        self._adapters: OrderedDict[Path, Adapter] = OrderedDict()
        # No token stands for more characters than the longest of the vocabulary, so a longer text never fits.
        self._most_characters = model.context * max(map(len, model.tokenizer.get_vocab()))

    def encode_some(self, call: Call, characters: int) -> int:
        """Encode a call's next prompts, until they have so many `characters`; returns how many they have.

        Raises what is wrong with them.
        """
        adapter = self.adapter(call.weights)
        call.fingerprint, call.token_bytes = self.fingerprint, self._token_bytes
        self._check_ids(call.sampling.logit_bias, "logit_bias")
        done = 0
        for prompt in call.prompts[len(call.encoded) :]:
            encoded = self._prompt(call, prompt, adapter)
            call.encoded.append(encoded)
            if call.echoed:
                call.texts.append(prompt if isinstance(prompt, str) else self.model.tokenizer.decode(encoded.ids))
            done += _characters(prompt)
            if done >= characters:
                break
        return done

    def requests(self, call: Call) -> Iterator[Request]:
        """One for each answer that an encoded call wants, prompt by prompt."""
        adapter, asked = self.adapter(call.weights), call.sampling
        for prompt in call.encoded if asked.max_tokens != 0 else ():
            room = self.model.context - len(prompt.ids)
            for copy in range(call.copies):
                yield Request(
                    prompt=prompt, adapter=adapter, max_tokens=room if asked.max_tokens is None else asked.max_tokens,
                    temperature=asked.temperature, top_p=asked.top_p, stop=asked.stop, top_logprobs=asked.top_logprobs,
                    logit_bias=asked.logit_bias, presence_penalty=asked.presence_penalty,
                    frequency_penalty=asked.frequency_penalty,
                    seed=None if asked.seed is None else (asked.seed + copy) % 2**63)

    def adapter(self, weights: Weights) -> Adapter | None:
        """The loaded adapter of a fine-tuned model; None for the base. Raises 404 if it has just been deleted."""
        if weights.folder is None:
            return None
        if weights.folder not in self._adapters:
            if not weights.folder.exists():
                raise ApiError(404, f"The model '{weights.name}' has just been deleted.", "model_not_found", "model")
            self._make_room()
            # The folder's name is unlike any module's and has no dots, which the network's names cannot hold.
            name = f"adapter_{weights.folder.name}"
            self._adapters[weights.folder] = adapters.load(self.model, name, weights.folder)
        self._adapters.move_to_end(weights.folder)
        return self._adapters[weights.folder]

    def _make_room(self) -> None:
        """Forget the adapters not used for longest, unless a call at work needs them."""
        in_use = {call.weights.folder for call in self.at_work()}
        idle = [folder for folder in self._adapters if folder not in in_use]
        for folder in idle[: max(0, len(self._adapters) + 1 - ADAPTERS)]:
            adapters.remove(self.model, self._adapters.pop(folder))

    def _prompt(self, call: Call, prompt: str | list[int] | Conversation, adapter: Adapter | None) -> Prompt:
        start, model = adapter.start if adapter else None, self.model
        if _characters(prompt) > self._most_characters:
            raise self._too_long(call, f"{_characters(prompt):,} characters")
        if isinstance(prompt, str):
            encoded = encode.encode_text(model, prompt, start)
        elif isinstance(prompt, list):
            self._check_ids(prompt, call.param)
            encoded = encode.encode_ids(prompt, start)
        else:
            encoded = encode.encode_chat(model, prompt, start)
        if len(encoded.ids) >= model.context:
            raise self._too_long(call, str(len(encoded.ids)))
        return encoded

    def _too_long(self, call: Call, size: str) -> ApiError:
        return bad_request(f"This model's maximum context length is {self.model.context} tokens, but the prompt alone "
                           f"has {size}. Shorten it.", call.param, "context_length_exceeded")

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        vocabulary = self.model.network.get_output_embeddings().weight.shape[0]
        if not all(0 <= id < vocabulary for id in ids):
            raise bad_request(f"Invalid '{param}': token ids of this model are 0 to {vocabulary - 1}.", param)


def _characters(prompt: str | list[int] | Conversation) -> int:
    """The length of a text, of all texts of a conversation, or of a list of token ids."""
    if isinstance(prompt, tuple):
        return sum(len(message["content"]) for message in prompt)
    return len(prompt)
