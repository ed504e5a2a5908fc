"""Request bodies: what is offered, and what is refused by name.

Every model forbids unknown parameters. Parameters that OpenAI has and this service has not are
listed in `off` with the values that ask for nothing; those pass, every other value is refused.
Null always means the default.
"""

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from labkit.service.errors import bad_request

MAX_ANSWERS = 2048  # of one request
MAX_SUFFIX = 64  # characters
NO_PENALTIES: dict[str, tuple[Any, ...]] = {"frequency_penalty": (0,), "presence_penalty": (0,)}


class Body(BaseModel):
    """The base of all request bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    off: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for name, values in cls.off.items():
            if name in given and given.pop(name) not in values:
                fix = f"set it to {' or '.join(map(json.dumps, values))}, or leave it out" if values else "leave it out"
                raise bad_request(f"Unsupported parameter: '{name}' is not offered with this value here; {fix}.",
                                  name, "unsupported_parameter")
        return given


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair; write the character itself") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Metadata = Annotated[dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
                     Field(max_length=16)]


# --- fine-tuning jobs ----------------------------------------------------------------------------


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


class Hyperparameters(Body):
    """None is "auto"."""

    n_epochs: Annotated[Annotated[int, Field(ge=1, le=50)] | None, BeforeValidator(_auto)] = None
    batch_size: Annotated[Annotated[int, Field(ge=1, le=256)] | None, BeforeValidator(_auto)] = None
    learning_rate_multiplier: Annotated[Annotated[float, Field(gt=0, le=1000)] | None, BeforeValidator(_auto)] = None


class Supervised(Body):
    """Settings of supervised fine-tuning."""

    hyperparameters: Hyperparameters = Hyperparameters()


def _offered_method(value: Any) -> Any:
    if value in ("dpo", "reinforcement"):
        raise bad_request(f"The method '{value}' is not offered by this service. Use 'supervised', or a hosted "
                          "provider.", "method.type", "unsupported_value")
    return value


class Method(Body):
    """How to train."""

    type: Annotated[Literal["supervised"], BeforeValidator(_offered_method)]
    supervised: Supervised = Supervised()
    off = {"dpo": (), "reinforcement": ()}


class Extension(Body):
    """What this service offers beyond OpenAI's API: send it as `extra_body={"labkit": {…}}`."""

    adapter: Literal["activated", "lora"] | None = None
    rank: Annotated[int | None, Field(ge=1, le=256)] = None
    max_tokens_per_example: Annotated[int | None, Field(ge=16)] = None


def _clean_suffix(suffix: str) -> str:
    if len(suffix) > MAX_SUFFIX:
        raise ValueError(f"a suffix has at most {MAX_SUFFIX} characters, this one has {len(suffix)}")
    clean = re.sub(r"[^a-z0-9-]+", "-", suffix.lower()).strip("-")
    if suffix and not clean:
        raise ValueError("a suffix needs letters or digits; other characters become dashes")
    return clean


class JobCreate(Body):
    """The body of `fine_tuning.jobs.create`."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    method: Method | None = None
    suffix: Annotated[Text, AfterValidator(_clean_suffix)] = ""
    seed: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    metadata: Metadata | None = None
    labkit: Extension = Extension()
    off = {"integrations": ([],)}

    def settings(self) -> Hyperparameters:
        """The hyperparameters, from `method` or from the older place."""
        if self.method is None:
            return self.hyperparameters
        ours = self.method.supervised.hyperparameters
        if self.hyperparameters.model_fields_set and ours != self.hyperparameters:
            raise bad_request("'hyperparameters' and 'method' disagree. Give the hyperparameters in "
                              "method.supervised only.", "hyperparameters")
        return ours


# --- inference -----------------------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[list[Annotated[Text, Field(min_length=1)]], BeforeValidator(_as_list), Field(max_length=4)]


def _by_number(value: Any) -> Any:
    """JSON's keys are texts; token ids are numbers."""
    if not isinstance(value, dict):
        return value
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise ValueError("its keys are token ids, such as {\"50256\": -100}")
    return {int(key): bias for key, bias in value.items()}


Bias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_number),
                 Field(max_length=1024)]


class StreamOptions(Body):
    """Only with `stream`."""

    include_usage: bool = False
    off = {"include_obfuscation": (False,)}


class Sampling(Body):
    """What completions and chat completions have in common."""

    model: Text
    logit_bias: Bias = {}
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    user: Text | None = None  # tags for OpenAI's abuse monitoring; they change no answer there either

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options and not self.stream:
            raise bad_request("'stream_options' is for streamed answers. Set 'stream' to true, or leave it out.",
                              "stream_options")
        return self


def _prompts(value: Any) -> Any:
    """A text, texts, token ids, or lists of token ids: always as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [value]
    kinds = {_kind(item) for item in value} if isinstance(value, list) else {"other"}
    if kinds not in ({"text"}, {"tokens"}):
        raise ValueError("a prompt is a string, a list of strings, a list of token ids, or a list of such lists")
    return value


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "text"
    return "tokens" if isinstance(item, list) and item and all(type(i) is int for i in item) else "other"


class CompletionCreate(Sampling):
    """The body of `completions.create`."""

    prompt: Annotated[list[Text | list[int]], BeforeValidator(_prompts), Field(max_length=MAX_ANSWERS)] = [""]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    best_of: Annotated[int | None, Field(ge=1, le=20)] = None
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    off = {**NO_PENALTIES, "suffix": ("",)}

    @model_validator(mode="after")
    def _candidates(self) -> "CompletionCreate":
        if self.best_of is not None and self.best_of < self.n:
            raise bad_request("'best_of' must not be smaller than 'n'.", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise bad_request("Answers chosen by 'best_of' cannot be streamed. Leave out one of the two.", "best_of")
        if len(self.prompt) * (self.best_of or self.n) > MAX_ANSWERS:
            raise bad_request(f"Prompts times answers must not exceed {MAX_ANSWERS}. Send several requests.", "prompt")
        return self


def _plain_text(value: Any) -> Any:
    """Text parts joined to one text; images and other parts are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only content parts of type 'text' are offered here")
        texts.append(part["text"])
    return "".join(texts)


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_plain_text)]
    off = {"name": (), "refusal": (), "annotations": ([],), "audio": (), "function_call": (), "tool_calls": ([],),
           "tool_call_id": ()}


class ChatCreate(Sampling):
    """The body of `chat.completions.create`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    off = {
        **NO_PENALTIES, "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
        "function_call": ("none", "auto"), "parallel_tool_calls": (True, False), "audio": (), "modalities": (["text"],),
        "prediction": (), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
        "reasoning_effort": ("none",), "verbosity": ("medium",), "web_search_options": (), "moderation": (),
        "prompt_cache_options": (), "prompt_cache_retention": ("in_memory",), "response_format": ({"type": "text"},),
    }

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCreate":
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs' set to true.", "top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise bad_request("'max_tokens' and 'max_completion_tokens' disagree. Give the latter only.", "max_tokens")
        return self
