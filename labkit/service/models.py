"""/v1/models, and which weights a model's name stands for.

A name is the local base's own, a fine-tuned model's or a checkpoint's, or one of OpenAI's model
names, which the table data/model_aliases.json maps to the local base; a file of that name in the
home folder takes its place. Each use of an alias is disclosed: in a job's events, in the log, and
in `system_fingerprint`.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fastapi import APIRouter
from openai.types import ModelDeleted

from labkit import paths
from labkit.errors import LabkitError
from labkit.service import objects
from labkit.service.errors import ApiError
from labkit.service.keys import Mine
from labkit.service.objects import Body
from labkit.service.store import Store

ALIASES = paths.COURSE / "data" / "model_aliases.json"
MAX_ALIAS = 256  # characters; a pattern's * would match a name without end, and names are stored and logged
OWN_ALIASES = "model_aliases.json"  # in the home folder: a user's table, which takes the place of the shipped one


@dataclass(frozen=True)
class Weights:
    """What answers for a model: the base alone, or the base with the adapter in `folder`.

    `form` is what a fine-tuned model was trained on, "chat" or "completion"; empty for the base.
    """

    name: str
    folder: Path | None
    form: str = ""
    alias: bool = False


class Models:
    """The models of one service. Which fine-tuned ones there are depends on whose `store` is asked."""

    def __init__(self, base_name: str, aliases: tuple[str, ...]) -> None:
        self.base_name, self.aliases = base_name, aliases
        self.started = objects.now()

    def is_alias(self, name: str) -> bool:
        """Whether the table maps `name` to the local base."""
        return len(name) <= MAX_ALIAS and any(fnmatchcase(name, pattern) for pattern in self.aliases)

    def weights(self, name: str, store: Store) -> Weights:
        """What answers for `name`. Raises 404 for a name that stands for nothing here."""
        if name == self.base_name:
            return Weights(name, None)
        if row := store.get("model", name):
            return Weights(name, store.models / row.inner["folder"], row.inner["form"])
        if self.is_alias(name):
            return Weights(name, None, alias=True)
        raise self.unknown(name, store)

    def unknown(self, name: str, store: Store) -> ApiError:
        """The 404 for a name that stands for nothing, with the names that do."""
        newest = [row.id for row in store.rows("model", limit=10, newest_first=True)]
        names = ", ".join([self.base_name, *newest])
        return ApiError(404, f"The model '{name}' does not exist here. Your models: {names}. Names of OpenAI's models "
                             f"that stand for the local base are listed in data/{OWN_ALIASES}; a copy of it in "
                             "LABKIT_HOME takes its place.",
                        "model_not_found", "model")

    def base(self, name: str) -> Body:
        """The model object of the base, under its own name or an alias."""
        return objects.model(name, self.base_name, None if name == self.base_name else self.base_name,
                             created=self.started)


def read_aliases(home: Path) -> tuple[str, ...]:
    """The patterns of the alias table: the user's in `home`, or the shipped one.

    Raises `LabkitError` when a user's edit broke it.
    """
    path = home / OWN_ALIASES if (home / OWN_ALIASES).exists() else ALIASES
    try:
        patterns = json.loads(path.read_text(encoding="utf-8"))["patterns"]
        assert isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise LabkitError(f"{path} cannot be read as the table of model aliases ({error}). It must be a JSON object "
                          "with a list of names or patterns: {\"patterns\": [\"gpt-4o*\", …]}.") from error
    return tuple(patterns)


def routes(models: Models) -> APIRouter:
    """The routes under /v1/models."""
    router = APIRouter()

    @router.get("/models")
    def list_models(store: Mine) -> Body:
        """All of them: OpenAI's list of models has no pages either."""
        tuned = [row.body for row in store.rows("model")]
        return {"object": "list", "data": [models.base(models.base_name), *tuned]}

    @router.get("/models/{name:path}")
    def retrieve_model(name: str, store: Mine) -> Body:
        if row := store.get("model", name):
            return row.body
        models.weights(name, store)
        return models.base(name)

    @router.delete("/models/{name:path}")
    def delete_model(name: str, store: Mine) -> Body:
        if not store.delete_model(name):
            models.weights(name, store)
            raise ApiError(403, f"'{name}' is the base model of this service and cannot be deleted. Only fine-tuned "
                                "models can.", "model_not_deletable", "model")
        return objects.made(ModelDeleted, id=name, object="model", deleted=True)

    return router
