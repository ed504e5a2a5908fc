"""Supervised fine-tuning: one flat loop, as a generator of what happens.

An example is a prompt and a completion; the loss is the mean cross-entropy of the completion's
tokens. With an activated LoRA the prompt up to its separator comes from the prompt cache and
only the last few tokens of each example pass through the network: the first epoch costs one
forward pass over the prompts, and every later one next to nothing. For an adapter in the last
layers, what enters the first of them is worked out once as well.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch.nn.functional import cross_entropy

from labkit import paths
from labkit.engine import adapter as adapters
from labkit.engine import attention
from labkit.engine.adapter import Adapter
from labkit.engine.cache import Past, PromptCache
from labkit.engine.encode import Encoded
from labkit.engine.entries import Entries
from labkit.engine.model import BaseModel

LEARNING_RATE = 2.4e-3  # of A, at learning_rate_multiplier 1; chosen on validation posts, see EXPERIMENTS.md
RATIO = 4  # of B's rate to A's (LoRA+, arXiv 2402.12354); chosen likewise
WARMUP = 0.2  # of all steps: the rate rises from zero, times a cosine that falls to zero from the first step on
CLIP = 1.0  # the gradient's largest norm
AT_ONCE = 16  # prompts read between two looks at whether to stop
# In one pass at most, padding included, so that memory stays flat. For SmolLM2-135M:
TOKENS = 8192  # of whole examples, whose keys and values take 23 kB each
FRESH = 2048  # that pass through the network: a predicted one's logits and their gradients take 600 kB
GLANCE = 32  # validation examples looked at ten times a run; all of them at the end of each epoch
STATE = "training_state.safetensors"


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of a job, all resolved (no "auto")."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    seed: int


@dataclass(frozen=True)
class Prepared:
    """How many prompts have their keys and values in the cache, before and between epochs."""

    done: int
    total: int


@dataclass(frozen=True)
class Step:
    """One step of the optimizer. Losses are nats per completion token; accuracies count tokens."""

    step: int
    total: int
    train_loss: float
    train_accuracy: float
    valid_loss: float | None = None
    valid_accuracy: float | None = None


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch, with the loss over the whole validation set (None without one)."""

    epoch: int
    step: int
    full_valid_loss: float | None
    full_valid_accuracy: float | None


class Trainer:
    """Trains one adapter on encoded examples. Iterate `run()`; stop iterating to stop training.

    `save` writes everything that a later `restore` needs to go on to the same result, to the
    bit: the adapter, the optimizer's moments, the step, and the state of the random generator.
    """

    def __init__(
        self,
        model: BaseModel,
        adapter: Adapter,
        cache: PromptCache,
        training: Sequence[Encoded],
        validation: Sequence[Encoded],
        settings: Settings,
    ) -> None:
        self.model, self.adapter, self.cache, self.settings = model, adapter, cache, settings
        self.training, self.validation = list(training), list(validation)
        weights = adapters.parameters(model, adapter)
        self.weights = list(weights.values())
        self.optimizer = torch.optim.AdamW([
            {"params": [weight for name, weight in weights.items() if part in name], "highest": LEARNING_RATE * ratio}
            for part, ratio in ((".lora_A.", 1), (".lora_B.", RATIO))], weight_decay=0.01, fused=True)
        self.step = 0
        self.steps_per_epoch = math.ceil(len(self.training) / settings.batch_size)
        self.total = self.steps_per_epoch * settings.n_epochs
        self.trained_tokens = settings.n_epochs * sum(example.tokens for example in self.training)
        # The passes are the same whenever a job goes on or comes again, so that the results are the same to the bit;
        # longest first, so that a pass's rows are about equally long.
        self.passed = sorted([*training, *validation], key=lambda e: (e.prompt.start, e.tokens), reverse=True)
        if cache.entries is None or not cache.entries.serve(adapter, self.passed):
            cache.entries = Entries(model, adapter, cache.folder and cache.folder.parent, self.passed)
        self.entries = cache.entries
        self.beginning = cache.beginning(self._cached(self.training))

    def run(self) -> Iterator[Prepared | Step | Epoch]:
        """Train to the end from wherever this trainer stands (the start, or a restored state)."""
        torch.manual_seed(self.settings.seed + self.step)
        self.cache.keep_from_now_on()
        yield from self._prepare()
        every = math.ceil(self.total / 10)
        while self.step < self.total:
            epoch, within = divmod(self.step, self.steps_per_epoch)
            batch = self._order(epoch)[within]
            loss, accuracy = self._update(batch)
            self.step += 1
            valid: tuple[float | None, float | None] = (None, None)
            ends = self.step % self.steps_per_epoch == 0
            if self.validation and self.step % every == 0 and not ends:
                valid = self.evaluate(self.validation[:GLANCE])
            full: tuple[float | None, float | None] = (None, None)
            if self.validation and ends:
                full = valid = self.evaluate(self.validation)
            yield Step(self.step, self.total, loss, accuracy, *valid)
            if ends:
                yield Epoch(epoch + 1, self.step, *full)

    def evaluate(self, examples: Sequence[Encoded]) -> tuple[float, float]:
        """Mean loss per completion token and share of tokens predicted right, without learning."""
        loss, right, count = 0.0, 0, 0
        ordered = sorted(examples, key=lambda example: example.tokens)
        with torch.no_grad():
            for batch in self._groups(ordered, 2 * AT_ONCE):
                logits, targets = self._forward(batch)
                loss += cross_entropy(logits, targets, reduction="sum").item()
                right += int((logits.argmax(-1) == targets).sum())
                count += len(targets)
                del logits  # or they would stay beside the next ones
        return loss / count, right / count

    def save(self, folder: Path) -> None:
        """Write the adapter and the optimizer's state into `folder`. Raises `OSError` where the disk is full."""
        adapters.save(self.model, self.adapter, folder)
        state = {f"{name}.{i}": self.optimizer.state[w][name].detach().contiguous()
                 for i, w in enumerate(self.weights) for name in ("exp_avg", "exp_avg_sq")}
        paths.write_bytes(folder / STATE, to_bytes(state, {"step": str(self.step)}))

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote. Raises `OSError` or `SafetensorError` if it is damaged."""
        state = load_file(folder / STATE)
        with open(folder / STATE, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        weights = load_file(folder / adapters.WEIGHTS)
        adapters.set_adapter_state(
            self.model.network,
            {key.removeprefix(adapters.PEFT_PREFIX): value for key, value in weights.items()},
            adapter_name=self.adapter.name,
        )
        self.step = int(header["__metadata__"]["step"])
        for i, weight in enumerate(self.weights):
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"exp_avg.{i}"],
                "exp_avg_sq": state[f"exp_avg_sq.{i}"],
            }

    # --- one step --------------------------------------------------------------------------

    def _prepare(self) -> Iterator[Prepared]:
        """Fill the cache and the entries with what they do not hold of the examples."""
        done = 0
        for batch in self._groups(self.passed, AT_ONCE):
            held = self.entries.hold(batch)
            if not (held and self.cache.holds(self._cached(batch), self.beginning)):
                past = self._past(batch)
                if not held:
                    tails = self._tails(batch, past)
                    ids, _, positions = tail_inputs(self.model, past, tails)
                    self.entries.add(batch, past, [len(tail) for tail in tails], ids, positions)
            done += len(batch)
            yield Prepared(done, len(self.passed))

    def _order(self, epoch: int) -> list[list[Encoded]]:
        """The epoch's batches: shuffled by seed and epoch, examples of like length together."""
        chance = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.training), generator=chance).tolist()
        size, batches = self.settings.batch_size, []
        for begin in range(0, len(order), size * 8):
            window = sorted(order[begin : begin + size * 8], key=lambda i: self.training[i].tokens)
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        turn = torch.randperm(len(batches), generator=chance).tolist()
        return [[self.training[i] for i in batches[t]] for t in turn]

    def _update(self, batch: Sequence[Encoded]) -> tuple[float, float]:
        done = self.step / self.total
        pace = min(1.0, (self.step + 1) / max(1.0, WARMUP * self.total)) * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * self.settings.learning_rate_multiplier * pace
        count = sum(len(example.completion) for example in batch)
        loss = accuracy = 0.0
        for part in self._groups(batch, len(batch)):
            logits, targets = self._forward(part)
            share = cross_entropy(logits, targets, reduction="sum") / count
            share.backward()
            loss += share.item()
            accuracy += (logits.argmax(-1) == targets).sum().item() / count
            del logits, share
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, accuracy

    def _groups(self, examples: Sequence[Encoded], most: int) -> Iterator[list[Encoded]]:
        """Examples in groups of at most so many, of `TOKENS` and of `FRESH`; a larger one is a group by itself."""
        group: list[Encoded] = []
        for example in examples:
            wider = [*group, example]
            whole = max(e.tokens for e in wider) * len(wider)
            fresh = max(e.tokens - self._kept(e) for e in wider) * len(wider)
            if group and (len(group) == most or whole > TOKENS or fresh > FRESH):
                yield group
                wider = [example]
            group = wider
        if group:
            yield group

    def _forward(self, batch: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[supervised tokens, vocabulary]` in float32, and the tokens they should predict."""
        hidden = self.entries.of(batch)
        past = self._past(batch, 0 if hidden is None else self.adapter.first)
        return forward_tails(self.model, self.adapter, past, self._tails(batch, past),
                             [example.completion for example in batch], hidden)

    def _tails(self, batch: Sequence[Encoded], past: Past) -> list[list[int]]:
        """What is not past: the tokens that pass through the network."""
        return [example.prompt.ids[length:] + example.completion[:-1]
                for example, length in zip(batch, past.lengths, strict=True)]

    def _past(self, batch: Sequence[Encoded], first: int = 0) -> Past:
        """The prompts' cached part, from layer `first` on."""
        return self.cache.fetch(self._cached(batch), first=first, beginning=self.beginning)[0]

    def _cached(self, batch: Sequence[Encoded]) -> list[list[int]]:
        """What the cache keeps of the prompts."""
        return [example.prompt.ids[: self._kept(example)] for example in batch]

    def _kept(self, example: Encoded) -> int:
        """How many tokens the cache keeps: all before the adapter's start, none for plain LoRA."""
        return example.prompt.start if self.adapter.start.activated else 0


def forward_tails(
    model: BaseModel, adapter: Adapter | None, past: Past, tails: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]], hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run each row's `tails` on top of its past, keeping the logits that predict its `targets`.

    The last target of a row is predicted at its tail's last token, the others before it. With
    `hidden`, the tails begin with the past's first layer, which that enters.
    """
    ids, mask, positions = tail_inputs(model, past, tails)
    rows = torch.tensor([row for row, target in enumerate(targets) for _ in target])
    columns = torch.tensor([len(tail) - len(target) + i
                            for tail, target in zip(tails, targets, strict=True) for i in range(len(target))])
    with adapters.active(model, adapter), model.keeping(rows, columns):
        if model.constant_past:
            begin = nullcontext() if hidden is None else model.entering(past.first, hidden)
            with begin, attention.over(past.states, past.lengths, first=past.first):
                logits = model.network(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        else:
            logits = model.network(input_ids=ids, attention_mask=mask, position_ids=positions,
                                   past_key_values=past.as_cache(), use_cache=True).logits[0]
    return logits.float(), torch.tensor([token for target in targets for token in target])


def tail_inputs(
    model: BaseModel, past: Past, tails: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and positions of `tails`: `[rows, longest tail]`, filled at the right."""
    width, longest = max(map(len, tails)), max(past.lengths)
    ids = torch.zeros(len(tails), width, dtype=torch.long)
    mask = torch.zeros(len(tails), longest + width, dtype=torch.long)
    for row, (tail, length) in enumerate(zip(tails, past.lengths, strict=True)):
        ids[row, : len(tail)] = torch.tensor(tail)
        mask[row, longest - length : longest + len(tail)] = 1
    positions = torch.tensor(past.lengths)[:, None] + torch.arange(width)
    return ids, mask, positions.clamp(max=model.context - 1)
