"""One progress bar for both places: a plain one in a terminal, an HTML one in a notebook.

In a notebook it leaves nothing behind in the stored output, and needs no widgets.
"""

import html
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from tqdm import tqdm

REFRESH_SECONDS = 0.2
AT_ONCE = 64  # requests under way; the local service batches what waits

Item = TypeVar("Item")
Result = TypeVar("Result")


class Progress:
    """A bar from 0 to 1 with a line of text. Use it in a `with` block, or call `close`."""

    def __init__(self, title: str, keep: bool = False) -> None:
        """`keep` leaves the last state standing when it is closed."""
        self._title, self._keep, self._drawn = title, keep, 0.0
        self._display = None
        if in_notebook():
            from IPython.display import HTML, display

            self._html = HTML
            self._display = display(HTML(""), display_id=True)
        else:
            self._bar = tqdm(total=100, leave=keep, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}")

    def show(self, done: float, text: str = "", title: str | None = None) -> None:
        """Draw the bar at the share `done`, at most a few times a second unless it is full."""
        self._title = title or self._title
        if done < 1 and time.monotonic() - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = time.monotonic()
        if self._display:
            self._display.update(self._html(
                f"<progress value='{done:.3f}' max='1' style='width:20em' aria-label='progress'></progress> "
                f"<b>{html.escape(self._title)}</b> {html.escape(text)}"))
        else:
            self._bar.n = round(100 * done)
            self._bar.set_description(self._title, refresh=False)
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """End the bar; without `keep` it disappears."""
        if not self._display:
            self._bar.close()
        elif not self._keep:
            self._display.update(self._html(""))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def each(ask: Callable[[Item], Result], items: Sequence[Item], title: str, progress: bool = True) -> list[Result]:
    """`ask` every item, many at once, with a bar; the results in the items' order.

    After an error or Ctrl-C the items that were not begun are left alone.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [pool.submit(ask, item) for item in items]
        bar = Progress(title) if progress else None
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                if bar:
                    bar.show(done / len(waiting), f"{done} of {len(waiting)} texts")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            if bar:
                bar.close()
    return [future.result() for future in waiting]


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return type(get_ipython()).__name__ == "ZMQInteractiveShell"
