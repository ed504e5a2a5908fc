"""Lists: `after`, `limit` and `order`, the same everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from labkit.service.errors import bad_request
from labkit.service.objects import Body
from labkit.service.store import Row, Store


@dataclass(frozen=True)
class Page:
    """Which part of a list is wanted; `after` is a row number."""

    after: int | None
    limit: int
    newest_first: bool


def page(
    request: Request, store: Store, kind: str, default: int, most: int, newest_first: bool = True,
    filters: Sequence[str] = (), ordered: bool = False, parent: str = "",
) -> Page:
    """Read the query of a list request. `ordered` lists take `order`; `filters` are read by the route."""
    query = request.query_params
    offered = ["after", "limit", *(["order"] if ordered else []), *filters]
    for name in query:
        if (name if "metadata" not in filters else name.partition("[")[0]) not in offered:
            raise bad_request(f"Unknown query parameter: '{name}'. This list takes {', '.join(offered)}.",
                              name, "unknown_parameter")
    limit = _limit(query.get("limit"), default, most)
    order = query.get("order", "desc" if newest_first else "asc")
    if order not in ("asc", "desc"):
        raise bad_request("Invalid 'order': use 'asc' or 'desc'.", "order")
    return Page(_after(store, kind, parent, query.get("after")), limit, order == "desc")


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    if len(text) > 9 or not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise bad_request(f"Invalid 'limit': use a number from 1 to {most}.", "limit")
    return int(text)


def _after(store: Store, kind: str, parent: str, id: str | None) -> int | None:
    if id is None:
        return None
    row = store.get(kind, id)
    if row is None or (parent and row.parent != parent):
        raise bad_request(f"Invalid 'after': there is no {kind} {id!r} in this list. Use the id of the last object of "
                          "the page before, or leave it out to begin at the start.", "after")
    return row.n


def listing(rows: Sequence[Row], page: Page) -> Body:
    """A page of a list. `rows` holds one row more than the page if there is a next one."""
    shown = [row.body for row in rows[: page.limit]]
    return {"object": "list", "data": shown, "has_more": len(rows) > page.limit,
            "first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
