"""A limit on what a client's fine-tuning jobs may cost: each is estimated first, and refused when over it."""

import threading
from datetime import date, timedelta
from typing import Any

import openai

from labkit import examples, pricing, tokens
from labkit.errors import BudgetError, LabkitError

JOBS = "/fine_tuning/jobs"


def limited(budget_usd: float, provider: str) -> type[openai.OpenAI]:
    """An `openai.OpenAI` whose jobs together may not cost more than `budget_usd`.

    `provider` tells whose prices apply: "openai" today's; "local" the last known ones of the model
    that is named, as a simulation; of any other provider no price is known, so each job is refused.
    Only training is counted, not requests to models. Raises `ValueError` for a budget that is no
    amount of money.
    """
    if not budget_usd >= 0:
        raise ValueError(f"budget_usd={budget_usd} must be zero or more US dollars")
    budget = _Budget(budget_usd, provider)

    class OpenAI(openai.OpenAI):
        """The SDK's client; copies made by `with_options` share the budget."""

        def post(self, path: str, **arguments: Any) -> Any:
            """Send a request, or raise `BudgetError` in place of a job that may not be started."""
            if path.rstrip("/") != JOBS:
                return super().post(path, **arguments)
            wanted = {**(arguments.get("body") or {}), **(arguments.get("options", {}).get("extra_json") or {})}
            cost = budget.reserve(self, wanted)
            try:
                return super().post(path, **arguments)
            except openai.APIStatusError:  # refused, so it costs nothing; after a lost connection nobody knows
                budget.give_back(cost)
                raise

    return OpenAI


class _Budget:
    """The amount, and what the jobs of this client have taken of it."""

    def __init__(self, usd: float, provider: str) -> None:
        self.usd, self.provider, self.spent = usd, provider, 0.0
        self._lock = threading.Lock()

    def reserve(self, client: openai.OpenAI, wanted: dict[str, Any]) -> float:
        """Take a job's estimated cost from the budget. Raises `BudgetError` if there is not enough."""
        cost, how = self._estimate(client, wanted)
        with self._lock:
            left = self.usd - self.spent
            if cost > left:
                raise BudgetError(
                    f"{self._label()}The job was not started: it would cost about {cost:.4f} USD ({how}), and of the "
                    f"budget of {self.usd:.2f} USD {left:.4f} are left. Train fewer epochs or examples, choose a "
                    "cheaper model, or connect with a larger budget_usd.")
            self.spent += cost
        return cost

    def give_back(self, cost: float) -> None:
        """Return what a job did not cost after all."""
        with self._lock:
            self.spent -= cost

    def _estimate(self, client: openai.OpenAI, wanted: dict[str, Any]) -> tuple[float, str]:
        """The cost in USD and how it comes about. Raises `BudgetError` when it cannot be known."""
        model = str(wanted.get("model"))
        if self.provider == "local" and self._is_local(client, model):
            return 0.0, "trained on this machine"
        try:
            if self.provider not in ("openai", "local"):
                raise BudgetError(f"the prices of {self.provider} are not known to labkit")
            kind, epochs = _settings(wanted)
            if kind != "supervised":
                raise BudgetError(f"what a job by the method {kind!r} costs cannot be known before")
            on = self._day(model)
            rate = pricing.price(model, "training", on)
            # The file's tokens must be counted, wherever it was uploaded from; downloading it is free.
            file = pricing.measure(client.files.content(str(wanted.get("training_file"))).content, model)
            epochs = epochs or examples.auto_epochs(file.examples)
            cost = pricing.training_cost(model, file.tokens, epochs, on)
        except (LabkitError, openai.APIError) as error:
            raise BudgetError(f"{self._label()}The job was not started, because its cost is not known, and unknown is "
                              f"not zero: {error}. Connect without budget_usd to start it all the same.") from error
        return cost, f"{file.tokens:,} tokens x {epochs} epochs at {rate.usd:g} USD per 1M, price of {on}"

    def _label(self) -> str:
        return "Simulated, nothing is billed on this machine. " if self.provider == "local" else ""

    def _is_local(self, client: openai.OpenAI, model: str) -> bool:
        """Whether a local service trains this under a name of its own, and not under one of OpenAI's."""
        known = {listed.id for listed in client.models.list()}
        return tokens.base_name(model) in known

    def _day(self, model: str) -> date:
        """Today; in a simulation of a model that is gone, its last day."""
        today = pricing.day()
        rows = [row for row in pricing.prices() if pricing.is_model(row.model, model) and row.kind == "training"]
        if self.provider != "local" or any(row.until is None or row.until > today for row in rows):
            return today
        return max((row.until for row in rows if row.until), default=today) - timedelta(days=1)


def _settings(wanted: dict[str, Any]) -> tuple[str, int | None]:
    """The training method, and the number of epochs if one was chosen."""
    method = wanted.get("method") or {}
    kind = method.get("type", "supervised")
    chosen = (method.get(kind) or {}).get("hyperparameters") or wanted.get("hyperparameters") or {}
    epochs = chosen.get("n_epochs", "auto")
    if epochs in (None, "auto"):
        return kind, None
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise BudgetError(f"n_epochs={epochs!r} is neither \"auto\" nor a number from 1 on")
    return kind, epochs
