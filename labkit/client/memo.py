"""The memo: one page that says what was tried, what came out, and what to do."""

import base64
import html
from datetime import date
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit import paths
from labkit.client.plots import described, png
from labkit.errors import DataError

SECTIONS = {"data": "Data", "splits": "Splits", "ladder": "The ladder", "curve": "Learning curve", "cost": "Cost",
            "decision": "Decision", "limits": "Limits"}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 48em; margin: 2em auto; padding: 0 1em; color: #111 }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.1em; margin: 1.2em 0 .3em }} img {{ max-width: 100% }}
table {{ border-collapse: collapse }} th, td {{ padding: .15em .7em; border-bottom: 1px solid #ccc; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
@media print {{ body {{ margin: 0; font-size: 11px }} img {{ max-height: 14em }} }}
</style></head><body>
<h1>{title}</h1>
<p>{day}</p>
{body}
</body></html>
"""


def memo(folder: str | PathLike[str], title: str, *, data: Any, splits: Any, ladder: Any, curve: Any, cost: Any,
         decision: str, limits: str) -> Path:
    """Write `memo.html` (one file, figures inside) and `memo.md` (figures beside it); returns the HTML's path.

    Each section is a text, a DataFrame, matplotlib axes or a figure, or a list of these. The
    decision and the limits are yours to write; the memo has none without them. It is what a
    learner hands in. Raises `DataError` for an empty section.
    """
    given = dict(data=data, splits=splits, ladder=ladder, curve=curve, cost=cost, decision=decision, limits=limits)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    page, plain = [], [f"# {title}", date.today().isoformat()]
    for name, content in given.items():
        parts = content if isinstance(content, (list, tuple)) else [content]
        if not len(parts) or any(part is None or (isinstance(part, str) and not part.strip()) for part in parts):
            raise DataError(f"The section {name!r} of the memo is empty; say at least why there is nothing to say.")
        page.append(f"<h2>{SECTIONS[name]}</h2>")
        plain.append(f"## {SECTIONS[name]}")
        for number, part in enumerate(parts):
            page.append(_as_html(part))
            plain.append(_as_markdown(part, target, f"memo_{name}_{number}.png"))
    body = "\n".join(page)
    paths.write_text(target / "memo.html", PAGE.format(title=html.escape(title), day=date.today(), body=body))
    paths.write_text(target / "memo.md", "\n\n".join(plain) + "\n")
    return target / "memo.html"


def _as_html(part: Any) -> str:
    if isinstance(part, (Axes, Figure)):
        picture = base64.b64encode(png(part)).decode()
        return f"<p><img src='data:image/png;base64,{picture}' alt='{html.escape(described(part), quote=True)}'></p>"
    if isinstance(part, pd.DataFrame):
        return part.to_html(float_format=_number, na_rep="–", border=0)
    return "".join(f"<p>{html.escape(text)}</p>" for text in str(part).split("\n\n"))


def _as_markdown(part: Any, folder: Path, name: str) -> str:
    if isinstance(part, (Axes, Figure)):
        paths.write_bytes(folder / name, png(part))
        return f"![{described(part)}]({name})"
    if not isinstance(part, pd.DataFrame):
        return str(part)
    table = part.reset_index() if part.index.name or not isinstance(part.index, pd.RangeIndex) else part
    rows = [["" if column == "index" else str(column) for column in table.columns], ["---"] * table.shape[1]]
    rows += [[_number(value) if isinstance(value, float) else str(value) for value in row]
             for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
                     for row in rows)


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
