"""What `prepare` has found, as text for a terminal, HTML for a notebook, or a dictionary for JSON."""

import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.examples.findings import Finding, token_limit

if TYPE_CHECKING:
    from labkit.examples.prepare import Prepared

BARS, MOST_LABELS = 12, 20
STYLES = {"error": "bold red", "warning": "yellow", "advice": "cyan"}
COLOURS = {"error": "#b91c1c", "warning": "#a16207", "advice": "#0e7490"}


def as_dict(result: "Prepared") -> dict[str, Any]:
    """Everything, in types that JSON knows."""
    return {"file": str(result.file), "fit": result.fit, "form": result.form, "task": result.task,
            "examples": result.examples, "tokens": token_summary(result.tokens), "labels": result.labels,
            "findings": [finding.as_dict() for finding in result.findings],
            "outputs": {name: str(path) for name, path in result.outputs.items()}, "next": _next(result)}


def token_summary(tokens: np.ndarray) -> dict[str, int]:
    """Total, median, 95th percentile and most tokens of an example; empty without examples."""
    if not len(tokens):
        return {}
    half, most = np.percentile(tokens, [50, 95])
    return {"total": int(tokens.sum(dtype=np.int64)), "median": int(half), "percentile_95": int(most),
            "max": int(tokens.max())}


def histogram(tokens: np.ndarray) -> list[tuple[int, int, int]]:
    """Bars of token lengths: least, most (both included), and how many examples; the last is open to the maximum."""
    if not len(tokens):
        return []
    top = max(int(np.percentile(tokens, 99)), int(tokens.min()) + 1)
    width = max(1, -(-(top - int(tokens.min()) + 1) // BARS))
    bars = []
    for low in range(int(tokens.min()), top + 1, width):
        last = low + width > top
        high = int(tokens.max()) if last else low + width - 1
        bars.append((low, high, int(((tokens >= low) & (tokens <= high)).sum())))
    return bars


def as_text(result: "Prepared") -> str:
    """A table of the findings and what follows from them, for a terminal of any width."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=110)
    print_to(console, result)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def print_to(console: Any, result: "Prepared") -> None:
    """Print the report on a rich console."""
    from rich.table import Table
    from rich.text import Text

    console.print(_title(result), markup=False, highlight=False)
    if result.findings:
        table = Table("finding", "count", "where", "what, why, and what to do", show_lines=True)
        for finding in result.findings:
            name = Text(f"{'fixed' if finding.fixed else finding.severity}\n{finding.code}",
                        style="green" if finding.fixed else STYLES[finding.severity])
            table.add_row(name, f"{finding.count:,}", Text(where(finding)),
                          Text(f"{finding.message}\n{finding.why}\n→ {finding.fix}"))
        console.print(table)
    bars = histogram(result.tokens)
    most = max((count for _, _, count in bars), default=1)
    for low, high, count in bars:
        console.print(f"{low:>7,} – {high:<7,} {'█' * round(40 * count / most)} {count:,}", highlight=False)
    for label, count in list(result.labels.items())[:MOST_LABELS]:
        console.print(f"{count:>9,}  {label[:60]!r}", markup=False, highlight=False)
    console.print(_closing(result), markup=False, highlight=False, soft_wrap=True)


def where(finding: Finding) -> str:
    """The first places: `train.jsonl:17 prompt`."""
    lines = [f"{finding.file}:{line} {place}".rstrip() for line, place in finding.places[:3]]
    return "\n".join(lines + (["…"] if finding.count > len(lines) and lines else [])) or finding.file


def _title(result: "Prepared") -> str:
    said = token_summary(result.tokens)
    counted = (f", {said['total']:,} tokens of {token_limit(result.model)[1]} (median {said['median']:,}, "
               f"at most {said['max']:,})") if said else ""
    return f"{result.file.name}: {result.examples:,} {result.form} examples, {result.task}{counted}"


def _next(result: "Prepared") -> str:
    from labkit.examples.prepare import sdk_lines

    return sdk_lines(result) if result.fit else ""


def _closing(result: "Prepared") -> str:
    if not result.fit:
        wrong = [finding.code for finding in result.findings if finding.severity == "error" and not finding.fixed]
        return (f"\nNot fit for training: {', '.join(dict.fromkeys(wrong))}. Nothing was written. "
                "Mend these, or let them be mended (--yes, or --fix NAME).")
    written = "".join(f"\nWritten: {path}" for path in result.outputs.values())
    if result.outputs or result.file.suffix.lower() == ".jsonl":
        return f"{written}\nFit for training. In Python:\n\n{_next(result)}"
    return "\nFit for training, once it is written as JSONL (--yes)."


def as_html(result: "Prepared") -> str:
    """A panel for a notebook; it explains itself in a light and in a dark theme."""
    rows = "".join(
        f"<tr><td><b style='color:{'#15803d' if finding.fixed else COLOURS[finding.severity]}'>"
        f"{'fixed' if finding.fixed else finding.severity}</b><br><code>{finding.code}</code></td>"
        f"<td style='text-align:right'>{finding.count:,}</td>"
        f"<td>{_escaped(where(finding))}</td><td style='text-align:left'>{_escaped(finding.message)}<br>"
        f"<small>{_escaped(finding.why)} <b>{_escaped(finding.fix)}</b></small></td></tr>"
        for finding in result.findings)
    table = (f"<table><thead><tr><th>finding</th><th>count</th><th>where</th><th>what, why, and what to do</th></tr>"
             f"</thead><tbody>{rows}</tbody></table>") if rows else "<p>No findings.</p>"
    lengths = [(f"{low:,} – {high:,}", count) for low, high, count in histogram(result.tokens)]
    labels = [(label[:60], count) for label, count in list(result.labels.items())[:MOST_LABELS]]
    closing = html.escape(_closing(result).strip())
    return (f"<div><p><b>{_escaped(_title(result))}</b></p>{table}"
            f"<div style='display:flex;gap:3em;flex-wrap:wrap'>{_bars('Tokens of an example', lengths)}"
            f"{_bars('Labels', labels)}</div><pre>{closing}</pre></div>")


def _bars(title: str, bars: list[tuple[str, int]]) -> str:
    if not bars:
        return ""
    most = max(count for _, count in bars)
    rows = "".join(
        f"<tr><td style='text-align:right'>{_escaped(name)}</td><td style='text-align:left'><div style='display:"
        f"inline-block;background:#3b82f6;height:.8em;width:{max(1, round(160 * count / most))}px'></div> {count:,}"
        "</td></tr>" for name, count in bars)
    return f"<table><caption>{title}</caption><tbody>{rows}</tbody></table>"


def _escaped(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
