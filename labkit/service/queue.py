"""In which order jobs are taken: in turn between owners, and an owner's jobs in the order of their creation."""

import time
from collections import Counter

from labkit.service import objects
from labkit.service.store import Row, Store


def waiting(store: Store, status: str, slot: str) -> list[Row]:
    """The jobs of one status in the order in which `slot` will take them.

    First come the owners' first jobs, then their second ones, and so on. Of two owners the one
    goes first whose latest turn is longer ago.
    """
    rows = store.rows("job", matching={"status": [status]})
    turns = dict(store.db.execute("SELECT owner, max(json_extract(inner, ?)) FROM objects WHERE kind = 'job' "
                                  "GROUP BY owner", (f"$.{slot}_turn",))) if len(rows) > 1 else {}
    before: Counter[str] = Counter()
    places = []
    for row in rows:
        places.append((before[row.owner], turns.get(row.owner) or 0.0, row.n))
        before[row.owner] += 1
    return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]


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
