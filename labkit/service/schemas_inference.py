"""Request bodies of the inference routes; what `schemas` says of all bodies holds for these too."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from labkit.service.errors import bad_request
from labkit.service.schemas import Body, Metadata, Text, at_most

MAX_ANSWERS = 2048  # of one request
MAX_STOP = 1000  # characters of a stop sequence
Penalty = Annotated[float, Field(ge=-2, le=2)]
NO_TOOLS: dict[str, tuple[Any, ...]] = {"tools": ([],), "parallel_tool_calls": (True, False)}
NO_SERVICE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"), "moderation": (), "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# A limit of a list's length stands before what changes its value: so it ends the check of the first item too many.
# All beginnings of a stop sequence are looked for after each token: one of megabytes would hold up everybody.
Stop = Annotated[list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP)]], Field(max_length=4),
                 BeforeValidator(_as_list)]


def _by_number(value: Any) -> Any:
    """JSON's keys are texts; token ids are numbers."""
    if not isinstance(value, dict):
        return value
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in value):
        raise ValueError("its keys are token ids, such as {\"50256\": -100}")
    return {int(key): bias for key, bias in value.items()}


Bias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_number), at_most(1024)]


class StreamOptions(Body):
    """Only with `stream`."""

    include_usage: bool = False
    off = {"include_obfuscation": (False,)}


class Sampling(Body):
    """What completions and chat completions have in common."""

    model: Text
    frequency_penalty: Penalty = 0.0
    logit_bias: Bias = {}
    n: Annotated[int, Field(ge=1, le=128)] = 1
    presence_penalty: Penalty = 0.0
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
        raise ValueError("it is a string, a list of strings, a list of token ids, or a list of such lists")
    return value


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "text"
    return "tokens" if isinstance(item, list) and item and all(type(i) is int for i in item) else "other"


Prompts = Annotated[list[Text | list[int]], Field(max_length=MAX_ANSWERS), BeforeValidator(_prompts)]


class CompletionCreate(Sampling):
    """The body of `completions.create`."""

    prompt: Prompts = [""]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    best_of: Annotated[int | None, Field(ge=1, le=20)] = None
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    off = {"suffix": ("",)}

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
        **NO_TOOLS, **NO_SERVICE_OPTIONS, "tool_choice": ("none", "auto"), "functions": ([],),
        "function_call": ("none", "auto"), "audio": (), "modalities": (["text"],), "prediction": (), "store": (False,),
        "metadata": ({},), "reasoning_effort": ("none",), "verbosity": ("medium",), "web_search_options": (),
        "response_format": ({"type": "text"},),
    }

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCreate":
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs' needs 'logprobs' set to true.", "top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise bad_request("'max_tokens' and 'max_completion_tokens' disagree. Give the latter only.", "max_tokens")
        return self


class EmbeddingCreate(Body):
    """The body of `embeddings.create`."""

    model: Text
    input: Prompts
    dimensions: Annotated[int | None, Field(ge=1)] = None
    encoding_format: Literal["float", "base64"] = "float"
    user: Text | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "EmbeddingCreate":
        if not all(self.input):
            raise bad_request("Invalid 'input': an empty string has nothing to embed. Leave it out.", "input")
        return self


# --- responses -----------------------------------------------------------------------------------


def _text_parts(value: Any) -> Any:
    """The text of input and output parts joined; images, files and refusals are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if (not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text")
                or not isinstance(part.get("text"), str)):
            raise ValueError("only content parts of type 'input_text' and 'output_text' are offered here")
        texts.append(part["text"])
    return "".join(texts)


class Item(Body):
    """One turn of `input`, also as a response's `output` gives it back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_text_parts)]
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = None


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class PlainFormat(Body):
    """The only format of an answer's text."""

    type: Literal["text"] = "text"


class TextConfig(Body):
    """How an answer's text is to look."""

    format: PlainFormat = PlainFormat()
    off = {"verbosity": ("medium",)}


class ResponseStreamOptions(Body):
    """Only with `stream`."""

    off = {"include_obfuscation": (False,)}


class ResponseCreate(Body):
    """The body of `responses.create`."""

    model: Text
    input: Annotated[list[Item], Field(min_length=1, max_length=2048), BeforeValidator(_items)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    metadata: Metadata = {}
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    text: TextConfig = TextConfig()
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    truncation: Literal["disabled"] = "disabled"
    prompt_cache_key: Text | None = None
    safety_identifier: Text | None = None
    user: Text | None = None
    off = {
        **NO_TOOLS, **NO_SERVICE_OPTIONS, "store": (False,), "previous_response_id": (), "conversation": (),
        "background": (False,), "background_options": (), "include": ([],), "tool_choice": ("none", "auto"),
        "max_tool_calls": (), "prompt": (), "reasoning": ({}, {"effort": "none"}), "top_logprobs": (0,),
        "context_management": ([],), "image": (), "access_programs": (),
    }
