"""Keys and values of prompts, computed once and kept on disk.

An activated LoRA leaves the prompt to the frozen base model, so a prompt's keys and values
never change: every epoch, every validation, every job of a sweep and every later request can
use them again, whichever fine-tuned model asks.

A prompt is cut into blocks of `BLOCK` tokens. A block is named by a hash of the weights and of
all tokens up to its end, so prompts that begin alike share their first blocks, and one file
holds one block. Where all examples of a training begin alike, with a system message or an
instruction, a block ends after that, so that it is read once.

For training, blocks are always computed one block at a time, from the blocks before them: what a
file holds depends on the tokens alone, not on what was computed beside it. For answers, where a
rounding may differ, whole prompts are read in one pass, several together.
"""

import json
import math
import mmap
import os
import shutil
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from labkit import paths
from labkit.engine import adapter as adapters
from labkit.engine import attention, int8, layout
from labkit.engine.adapter import Adapter
from labkit.engine.attention import Shared
from labkit.engine.layout import BLOCK, ROWS, Block
from labkit.engine.model import BaseModel

if TYPE_CHECKING:
    from labkit.engine.entries import Entries

PAD = 32  # a prompt's last, shorter block is computed at a multiple of this width
LEAST = 16  # tokens beyond whole blocks that a training's prompts must have in common to be cut after them
REMEMBERED = 32  # such beginnings of the latest trainings
BEGINNINGS = 4  # of few-shot prompts and the like that stay in memory; 47 MB each at most for SmolLM2-135M
TRAILER = 4  # bytes of CRC-32 at the end of a file
ROOM = 1 << 30  # bytes that stay free on the disk: without any, jobs pause and uploads fail
Ahead = tuple[torch.Tensor, torch.Tensor]  # of one token: keys and values, and the logits it leads to


@dataclass(frozen=True)
class Past:
    """Keys and values of several prompts, aligned at their right end.

    `states` is `[layers, 2, rows, heads, tokens, width]`, of the layers from number `first` on;
    `lengths` counts each row's tokens. What some rows begin with may stand apart in `shared`, then
    it is in neither of the two. `ahead` is what `fetch` found out of the token after each prompt:
    its keys and values `[layers, 2, rows, heads, 1, width]`, and the logits `[rows, vocabulary]` it
    leads to.
    """

    states: torch.Tensor
    lengths: list[int]
    shared: tuple[Shared, ...] = ()
    ahead: tuple[torch.Tensor, torch.Tensor] | None = None
    first: int = 0

    @property
    def positions(self) -> list[int]:
        """How many tokens of each row are past, those in common included."""
        every = list(self.lengths)
        for beginning in self.shared:
            for row in beginning.rows:
                every[row] += beginning.states.shape[3]
        return every

    def as_cache(self) -> DynamicCache:
        """The same as transformers wants it."""
        cache = DynamicCache()
        if self.states.shape[4]:
            for layer, (keys, values) in enumerate(self.states):
                cache.update(keys, values, layer)
        return cache


def run(model: BaseModel, past: Past, ids: torch.Tensor, logits: bool = True) -> tuple[Any, torch.Tensor]:
    """Run fresh tokens `[rows, n]` through the network over a past.

    Returns its output and the fresh tokens' keys and values, `[layers, 2, rows, heads, n, width]`;
    without `logits` the output is of no use, and the last layer's own work is left out where that can be.
    """
    longest, count = past.states.shape[4], ids.shape[1]
    positions = (torch.tensor(past.positions)[:, None] + torch.arange(count)).clamp(max=model.context - 1)
    part, output = model.network if logits else model.network.base_model, None
    if model.constant_past:
        over = attention.over(past.states, past.lengths, past.shared, states_only=not logits)
        with over as fresh, suppress(attention.Enough):
            output = part(input_ids=ids, position_ids=positions, use_cache=False)
    else:
        cache, lengths = past.as_cache(), torch.tensor(past.lengths)
        # Without a mask where none is needed: the network is quicker then.
        mask = None if min(past.lengths) == longest else (
            torch.arange(longest + count) >= longest - lengths[:, None]).long()
        output = part(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        fresh = [(layer.keys[:, :, longest:], layer.values[:, :, longest:]) for layer in cache.layers]
    return output, torch.stack([torch.stack(layer) for layer in fresh])


class PromptCache:
    """Keys and values for prompts of one model, kept in `folder` (None: nowhere).

    They take up to `limit` bytes, and leave `ROOM` on the disk.
    """

    def __init__(self, model: BaseModel, folder: Path | None, limit: int = 8 << 30) -> None:
        self.model = model
        self.folder = folder
        self.limit = limit
        self.computed = self.reused = 0  # tokens, for tests and for `usage`
        self.full = False  # there was no room: go on without keeping
        self._since = math.inf  # what was used later, in seconds since 1970, is not evicted
        self.entries: Entries | None = None  # of the last training, for one on the same examples
        self._verified: set[str] = set()
        # What prompts began with in common lately, tokens and states, by the last block's name.
        self._beginnings: OrderedDict[str, tuple[tuple[int, ...], torch.Tensor]] = OrderedDict()
        self._size = sum(size for _, size, _ in self._files())

    def fetch(
        self, prompts: Sequence[Sequence[int]], adapter: Adapter | None = None, share: bool = False,
        following: Sequence[int] = (), first: int = 0, beginning: Sequence[int] = (),
    ) -> tuple[Past, list[int]]:
        """The keys and values of `prompts`, and how many tokens of each were found in the cache.

        They are the base model's, or those of the base with an `adapter` that acts on prompts too.
        With `share`, what several prompts begin with is held and attended over once for all of them;
        the results then depend on what is asked for together, within rounding. The one token
        `following` each prompt is then read in the same pass, where no prompt was found whole. Only
        the layers from number `first` on are returned. What is not shared is cut after `beginning`.
        """
        weights = adapter.digest if adapter else ""
        rows = self._answer_rows(prompts, weights) if share else self._rows(prompts, weights, beginning)
        share = share and self.model.constant_past
        held: dict[str, torch.Tensor] = {}
        found = []
        for blocks in rows:
            known = 0
            for block in blocks:
                if block.name not in held:
                    states = self._read(block)
                    if states is None:
                        break
                    held[block.name] = states
                known += len(block.ids)
            found.append(known)
        missing = sum(found) < sum(map(len, prompts))
        with adapters.active(self.model, adapter) if missing else nullcontext(), int8.products(adapter is None):
            ahead = self._compute(rows, held, share, layout.endings(rows, following))
        self.reused += sum(found)
        past = self._assemble(rows, held, share, first)
        if following and all(blocks and blocks[-1].name in ahead for blocks in rows):
            found_ahead = [ahead[blocks[-1].name] for blocks in rows]
            past = replace(past, ahead=(torch.stack([states for states, _ in found_ahead], dim=2),
                                        torch.stack([logits for _, logits in found_ahead])))
        return past, found

    def keep_from_now_on(self) -> None:
        """Let nothing that is used from now on make way for what is used later, and try again to write.

        A training asks for the same prompts in every epoch. If those not used for longest made way, as
        otherwise, and there were no room for all, each would be gone by the time its turn comes again.
        """
        self._since, self.full = time.time(), False

    def beginning(self, prompts: Sequence[list[int]]) -> list[int]:
        """What all these prompts begin with, where that is worth a cut; empty elsewhere.

        It is noted beside the cache, so that answers, which another process gives, cut after it as well.
        """
        common = list(os.path.commonprefix(prompts))
        if len(common) % BLOCK < LEAST:
            return []
        latest, known = [len(common), self._blocks(common)[-1].name], self._known()
        if self.folder is not None and known[-1:] != [latest]:
            noted = [*(one for one in known if one != latest), latest][-REMEMBERED:]
            with suppress(OSError):  # a full disk: answers will read these prompts once more
                paths.write_text(self._note(), json.dumps(noted))
        return common

    def holds(self, prompts: Sequence[Sequence[int]], beginning: Sequence[int] = ()) -> bool:
        """Whether `fetch` would find all of these prompts, as a training cuts them into blocks; they count as used."""
        if self.folder is None:
            return False
        try:
            for path in [self._path(block.name) for blocks in self._rows(prompts, "", beginning) for block in blocks]:
                os.utime(path)
        except OSError:  # as in `_read`: what cannot be used is not there
            return False
        return True

    def _compute(
        self, rows: list[list[Block]], held: dict[str, torch.Tensor], share: bool, endings: dict[str, int]
    ) -> dict[str, Ahead]:
        """Compute what is missing from the left on, block by block or, with `share`, stretch by stretch.

        `endings` are tokens to read after the blocks of these names; what became of them is returned.
        """
        ahead: dict[str, Ahead] = {}
        while True:
            missing = [next((i for i, block in enumerate(blocks) if block.name not in held), None) for blocks in rows]
            level = min((begin for begin in missing if begin is not None), default=None)
            if level is None:
                return ahead
            alike: dict[str, list[list[Block]]] = {}  # by the name of the block they go on with
            for blocks, begin in zip(rows, missing, strict=True):
                if begin == level:
                    alike.setdefault(blocks[level].name, []).append(blocks)
            todo: dict[tuple[int, int], list[list[Block]]] = {}  # by width and, for a training, by what is past
            for members in alike.values():
                part = layout.common(members)[: level + (ROWS if share else 1)]
                tokens = sum(len(block.ids) for block in part[level:]) + (part[-1].name in endings)
                key = (tokens, 0) if share else (-(-tokens // PAD) * PAD, part[level].position)
                todo.setdefault(key, []).append(part)
            for width, parts in layout.packed(todo) if share else layout.by_width(todo):
                ahead |= self._forward(parts, level, width, held, share, endings)

    @torch.inference_mode()
    def _forward(
        self, rows: list[list[Block]], level: int, width: int, held: dict[str, torch.Tensor], share: bool,
        endings: dict[str, int],
    ) -> dict[str, Ahead]:
        """One pass over every row's blocks from number `level` on; those before it are in `held`."""
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for row, blocks in enumerate(rows):
            fresh = [id for block in blocks[level:] for id in block.ids] + [endings.get(blocks[-1].name, 0)]
            ids[row, : len(fresh)] = torch.tensor(fresh[:width])
        past = self._assemble([blocks[:level] for blocks in rows], held, share)
        ended = [row for row, blocks in enumerate(rows) if blocks[-1].name in endings]
        columns = [sum(len(block.ids) for block in rows[row][level:]) for row in ended]
        # What stands right of a row's end is never looked at.
        if ended:
            with self.model.keeping(torch.tensor(ended), torch.tensor(columns)):
                output, computed = run(self.model, past, ids)
        else:
            _, computed = run(self.model, past, ids, logits=False)
        for row, blocks in enumerate(rows):
            for block in blocks[level:]:
                begin = block.position - blocks[level].position
                states = computed[:, :, row, :, begin : begin + len(block.ids)].clone()
                held[block.name] = states
                self.computed += len(block.ids)
                self._write(block, states)
        return {rows[row][-1].name: (computed[:, :, row, :, column : column + 1], output.logits[0, place].float())
                for place, (row, column) in enumerate(zip(ended, columns, strict=True))}

    def _assemble(self, rows: list[list[Block]], held: dict[str, torch.Tensor], share: bool, first: int = 0) -> Past:
        shared, skip = [], [0] * len(rows)  # how many blocks of each row stand in `shared`
        for common, members in layout.beginnings(rows) if share else ():
            shared.append(Shared(self._beginning(common, held), members))
            for row in members:
                skip[row] = len(common)
        rows = [blocks[count:] for blocks, count in zip(rows, skip, strict=True)]
        lengths = [sum(len(block.ids) for block in blocks) for blocks in rows]
        longest, shape = max(lengths, default=0), self.model.shape
        states = torch.empty(shape.layers - first, 2, len(rows), shape.heads, longest, shape.width, dtype=shape.dtype)
        for row, blocks in enumerate(rows):
            begin = longest - lengths[row]
            states[:, :, row, :, :begin] = 0  # hidden later, but no chance number must come of it
            for block in blocks:
                states[:, :, row, :, begin : begin + len(block.ids)] = held[block.name][first:]
                begin += len(block.ids)
        return Past(states, lengths, tuple(shared), first=first)

    def _beginning(self, blocks: list[Block], held: dict[str, torch.Tensor]) -> torch.Tensor:
        """Some blocks in one piece, kept for the next requests that begin with them."""
        name = blocks[-1].name
        if name not in self._beginnings:
            whole = torch.cat([held[block.name] for block in blocks], dim=3)
            ids = tuple(id for block in blocks for id in block.ids)
            self._beginnings[name] = ids, whole
            if len(self._beginnings) > BEGINNINGS:
                self._beginnings.popitem(last=False)
        self._beginnings.move_to_end(name)
        return self._beginnings[name][1]

    def _rows(self, prompts: Sequence[Sequence[int]], weights: str, beginning: Sequence[int]) -> list[list[Block]]:
        """The prompts in blocks for a training: those that begin so are cut after `beginning`.

        A prompt that is kept as it was cut for something else stays as it is.
        """
        rows, begin, known = [], len(beginning), self._known()
        for ids in prompts:
            own = begin if list(ids[:begin]) == list(beginning) else 0
            cuts = [own, 0, *self._trained(ids, weights, known), own]
            rows.append(self._laid_out(ids, weights, cuts, len(ids) - 1))
        return rows

    def _answer_rows(self, prompts: Sequence[Sequence[int]], weights: str) -> list[list[Block]]:
        """The prompts in blocks, one of which ends after what a prompt has in common with others now, or had lately.

        Of what few-shot prompts share, nothing is then read for each of them. Other prompts are cut
        where a training would cut them. What is kept up to there as it was cut otherwise stays as it is.
        """
        known = self._known()
        groups = [((0, *self._trained(ids, weights, known)), tuple(ids[:BLOCK])) for ids in prompts]
        alike: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}
        for ids, group in zip(prompts, groups, strict=True):
            alike.setdefault(group, []).append(tuple(ids))
        cuts = {}
        for (trained, first), members in alike.items():
            common = len(os.path.commonprefix(members)) if len(members) > 1 and self.model.constant_past else 0
            held = [len(ids) for ids, _ in self._beginnings.values() if members[0][: len(ids)] == ids]
            lately = max(*trained, *held, 0)
            # A few tokens more in common are chance, and with another cut nothing of before would be found.
            cut = common if common >= lately + BLOCK else min(lately, common or lately)
            cuts[trained, first] = cut if cut > BLOCK else max(trained)
        return [self._laid_out(ids, weights, [*group[0], cuts[group]], cuts[group] - 1)
                for ids, group in zip(prompts, groups, strict=True)]

    def _laid_out(self, ids: Sequence[int], weights: str, cuts: Sequence[int], place: int) -> list[Block]:
        """The prompt in blocks, one of which ends at a cut: the first with which token `place` is kept, or the last."""
        blocks: list[Block] = []
        for cut in cuts:
            blocks = self._blocks(ids, weights, cut)
            holding = [block for block in blocks if block.position <= place < block.position + len(block.ids)]
            if any(map(self._exists, holding)):
                break
        return blocks

    def _trained(self, ids: Sequence[int], weights: str, known: Sequence[list[Any]]) -> list[int]:
        """How many tokens each of the known beginnings has that this prompt begins with."""
        return [count for count, name in known
                if len(ids) >= count and self._blocks(ids[:count], weights)[-1].name == name]

    def _blocks(self, ids: Sequence[int], weights: str = "", cut: int = 0) -> list[Block]:
        return layout.blocks(ids, f"{self.model.digest}/{weights}", cut)

    def _known(self) -> list[list[Any]]:
        """What trainings' prompts begin with, in whichever process they ran: how many tokens, the last block's name."""
        if self.folder is not None:
            with suppress(OSError, ValueError):  # there were none
                return json.loads(self._note().read_text())
        return []

    # --- files -----------------------------------------------------------------------------

    def _note(self) -> Path:
        assert self.folder is not None
        return self.folder.with_suffix(".json")

    def _exists(self, block: Block) -> bool:
        return self.folder is not None and self._path(block.name).exists()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / name

    def _read(self, block: Block) -> torch.Tensor | None:
        if self.folder is None:
            return None
        path, shape = self._path(block.name), self.model.shape
        size = len(block.ids) * shape.bytes_per_token
        try:
            with open(path, "rb") as handle:
                raw = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants what could be written
            os.utime(path)  # those not used for longest are evicted first
        except (OSError, ValueError):  # no such file, or an empty one
            return None
        if len(raw) != size + TRAILER:
            return None
        if block.name not in self._verified:  # a crash of the machine can leave a file of zeros
            if zlib.crc32(memoryview(raw)[:size]) != int.from_bytes(raw[size:], "little"):
                return None
            self._verified.add(block.name)
        states = torch.frombuffer(raw, dtype=shape.dtype, count=size // shape.dtype.itemsize)
        return states.view(shape.layers, 2, shape.heads, len(block.ids), shape.width)

    def _write(self, block: Block, states: torch.Tensor) -> None:
        if self.folder is None or self.full:
            return
        raw = states.contiguous().view(torch.uint8).numpy().reshape(-1)
        target = self._path(block.name)
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self._make_room(raw.nbytes + TRAILER):
                self.full = True
                return
            with open(temporary, "wb") as handle:
                handle.write(raw.data)
                handle.write(zlib.crc32(raw.data).to_bytes(TRAILER, "little"))
            os.replace(temporary, target)
        except OSError:  # a full disk: the cache saves time, no result depends on it
            self.full = True
            with suppress(OSError):
                temporary.unlink()
            return
        self._verified.add(block.name)
        self._size += raw.nbytes + TRAILER

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Last use, size and path of every block; other processes may delete some meanwhile."""
        if self.folder is None or not self.folder.exists():
            return
        for group in self.folder.iterdir():
            for entry in os.scandir(group):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                yield stat.st_mtime, stat.st_size, entry.path

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes more may be kept; the blocks not used for longest make way for them."""
        assert self.folder is not None
        spare = shutil.disk_usage(self.folder).free - ROOM
        if self._size + size <= self.limit and size <= spare:
            return True
        files = sorted(self._files())
        self._size = sum(taken for _, taken, _ in files)
        room = min(self.limit, self._size + spare)
        for used, taken, path in files:
            # A tenth more, so as not to look for every block.
            if used >= self._since or self._size + size <= 0.9 * room:
                break
            try:
                os.unlink(path)
            except OSError:  # on Windows a block in use cannot be deleted; the next one can
                continue
            self._size -= taken
        return self._size + size <= room
