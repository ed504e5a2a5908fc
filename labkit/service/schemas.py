"""Request bodies: what is offered, and what is refused by name.

Every model forbids unknown parameters. Parameters that OpenAI has and this service has not are
listed in `off` with the values that ask for nothing; those pass, every other value is refused.
Null always means the default.
"""

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from labkit.examples import MAX_DEPTH, too_deep
from labkit.service.errors import bad_request

MAX_SUFFIX = 64  # characters
MAX_PARAMETERS = 64  # of one object in a body; no object has as many to offer


class Body(BaseModel):
    """The base of all request bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    off: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_off(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_PARAMETERS:  # else each unknown one is an error, and millions of errors fill the memory
            raise bad_request(f"An object of the body has {len(data):,} parameters. None takes more than "
                              f"{MAX_PARAMETERS}.", code="unknown_parameter")
        if too_deep(data):
            raise bad_request(f"The body is nested more than {MAX_DEPTH} levels deep. Send less nesting.",
                              code="invalid_json")
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


def at_most(count: int) -> BeforeValidator:
    """Refuses more entries before any is looked at: pydantic checks a dict's length last, after listing all errors."""
    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"it has {len(value):,} entries, but may have {count:,} at most")
        return value

    return BeforeValidator(check)


Metadata = Annotated[dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], at_most(16)]


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
