"""In which order things are taken: in turn between owners, and an owner's jobs in the order of their creation."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from labkit.service import objects
from labkit.service.store import Row, Store


class Owned(Protocol):
    """What a key's owner has made."""

    @property
    def owner(self) -> str:
        """The name of the key."""


T = TypeVar("T", bound=Owned)


def in_turn(things: Sequence[T], latest: Mapping[str, float]) -> list[T]:
    """`things` by turns: first come the owners' first ones, then their second ones, and so on.

    Of two owners the one goes first whose `latest` turn is longer ago; one without any goes before both.
    """
    before: Counter[str] = Counter()
    places = []
    for number, thing in enumerate(things):
        places.append((before[thing.owner], latest.get(thing.owner) or 0.0, number))
        before[thing.owner] += 1
    return [things[number] for _, _, number in sorted(places)]


def waiting(store: Store, status: str, slot: str) -> list[Row]:
    """The jobs of one status in the order in which `slot` will take them."""
    rows = store.rows("job", matching={"status": [status]})
    turns = dict(store.db.execute("SELECT owner, max(json_extract(inner, ?)) FROM objects WHERE kind = 'job' "
                                  "GROUP BY owner", (f"$.{slot}_turn",))) if len(rows) > 1 else {}
    return in_turn(rows, turns)


def take(store: Store, row: Row, slot: str) -> None:
    """Note that it is the turn of this job's owner."""
    store.change("job", row.id, inner={f"{slot}_turn": time.time(), "place": None})


def tell_places(store: Store, jobs: list[Row]) -> None:
    """Tell each waiting job its place by an event, when it has changed."""
    with store.transaction():
        for place, row in enumerate(jobs, 1):
            if row.inner.get("place") != place and store.change("job", row.id, inner={"place": place},
                                                                expect=("queued",)):
                store.of(row.owner).add("event", objects.event(f"Waiting in the queue: place {place}"), row.id)
