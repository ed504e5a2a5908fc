"""Figures of what the other modules measure. Each function draws one table on one axes and returns it.

Without `axes` a new figure is made. Everything can be restyled afterwards, being plain
matplotlib. The axes' label holds a description in words with the numbers, which `described`
returns: the alternative text of the picture, in the memo and wherever else it is shown.
"""

import io
import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.client.iterate import spread
from labkit.errors import DataError

MARKERS = "osD^vP*X"  # series differ by marker and line, not by colour alone
LINES = ("-", "--", "-.", ":")
UNITS = {"accuracy": "share right", "valid_loss": "validation loss (nats per completion token)",
         "examples": "training examples", "seconds": "seconds", "latency_ms": "milliseconds"}


def described(picture: Axes | Figure) -> str:
    """The description of a figure: that of its axes, one after the other."""
    axes = [picture] if isinstance(picture, Axes) else picture.axes
    return " ".join(str(one.get_label()) for one in axes if one.get_label() not in ("", "<colorbar>"))


def png(picture: Axes | Figure) -> bytes:
    """A figure as a PNG, its description in the file's own metadata as well."""
    figure = _figure(picture)
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Description": described(figure)})
        return file.getvalue()


def ladder(table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """Bars of accuracy with 95 % intervals, one a rung, from the table of `labkit.ladder`."""
    axes = _axes(table, axes, (7, 0.8 + 0.42 * len(table)))
    error = [table["accuracy"] - table["low"], table["high"] - table["accuracy"]]
    bars = axes.barh(table.index, table["accuracy"], xerr=error, color="tab:blue", ecolor="black", capsize=3)
    axes.bar_label(bars, fmt="%.3f", label_type="center", color="white")
    axes.invert_yaxis()
    values = ", ".join(f"{name} {row.accuracy:.3f} ({row.low:.3f} to {row.high:.3f})"
                       for name, row in table.iterrows())
    return _finish(axes, "Accuracy on the same posts, with 95 % intervals", "share right", "", f"Bars: {values}.",
                   xlim=(0, 1.05))


def confusion(table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """The confusion matrix of `evaluate.confusion` with its counts written in."""
    axes = _axes(table, axes, (1.8 + 1.1 * table.shape[1], 1.2 + 0.7 * table.shape[0]))
    counts = table.to_numpy()
    axes.imshow(counts, cmap="Blues", vmin=0, vmax=max(1, counts.max()))
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, str(count), ha="center", va="center",
                  color="white" if count > counts.max() / 2 else "black")
    axes.set_xticks(range(table.shape[1]), table.columns)
    axes.set_yticks(range(table.shape[0]), table.index)
    values = "; ".join(f"{truth}: " + ", ".join(f"{count} answered {name}" for name, count in row.items())
                       for truth, row in table.iterrows())
    return _finish(axes, "What was answered for each label (posts)", "answered", "truth", values + ".", grid=False)


def reliability(table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """The reliability diagram of `calibration.reliability`; on the dashed line confidence and accuracy agree."""
    axes = _axes(table, axes, (4.6, 4.2))
    axes.plot([0, 1], [0, 1], color="grey", ls="--", label="as sure as right")
    error = [table["accuracy"] - table["low"], table["high"] - table["accuracy"]]
    axes.errorbar(table["confidence"], table["accuracy"], yerr=error, marker="o", capsize=3, label="posts in bins")
    for row in table.itertuples():
        axes.annotate(f"{row.posts}", (row.confidence, row.accuracy), xytext=(6, -12), textcoords="offset points",
                      fontsize="small")
    axes.legend()
    values = ", ".join(f"{row.posts} posts at {row.confidence:.2f} right {row.accuracy:.2f}"
                       for row in table.itertuples())
    return _finish(axes, "Is it right as often as it is sure?", "confidence (mean of the bin)", "share right",
                   f"Points near the diagonal are calibrated: {values}.", xlim=(-0.02, 1.02), ylim=(0, 1.05))


def coverage(table: pd.DataFrame, axes: Axes | None = None) -> Axes:
    """The accuracy/coverage curve of `calibration.abstention`."""
    axes = _axes(table, axes, (6, 3.2))
    table = table.sort_values("coverage")
    axes.plot(table["coverage"], table["accuracy"], label="accuracy of what is answered")
    axes.fill_between(table["coverage"], table["low"], table["high"], alpha=0.2, label="95 % interval")
    axes.legend()
    all_of_it, half = table.iloc[-1], table.iloc[(table["coverage"] - 0.5).abs().argmin()]
    return _finish(axes, "Answer only when sure, send the rest to a person", "coverage (share of posts answered)",
                   "share right", f"A line: accuracy {all_of_it.accuracy:.3f} when all posts are answered, "
                   f"{half.accuracy:.3f} when the surest {half.coverage:.0%} are.", xlim=(0, 1.02))


def runs(results: pd.DataFrame, x: str, y: str = "accuracy", by: str | None = None, axes: Axes | None = None) -> Axes:
    """A metric of a sweep against a setting: a point for each run, and the mean with its 95 % interval over seeds.

    With `x="examples"` it is a learning curve. `by` draws one line for each value of another
    column. Settings in words, such as "auto", stand side by side with no line between them. What
    an interval has beyond 0 and 1 is not drawn where `y` is the accuracy.
    """
    axes = _axes(results, axes, (7, 3.6))
    places = _places(axes, results[x])
    groups = [("", results)] if by is None else [(f"{by} {name}", some) for name, some in results.groupby(by)]
    told, ordered = [], pd.api.types.is_numeric_dtype(results[x])
    for number, (name, some) in enumerate(groups):
        mean, color = spread(some, x, y), f"C{number}"
        at = [places[value] for value in mean.index]
        order = np.argsort(at)
        error = np.nan_to_num([mean["mean"] - mean["low"], mean["high"] - mean["mean"]])
        axes.errorbar(np.array(at)[order], mean["mean"].to_numpy()[order], yerr=error[:, order], color=color, capsize=3,
                      marker=MARKERS[number % len(MARKERS)], ls=LINES[number % len(LINES)] if ordered else "none",
                      label=f"{name} mean, 95 % interval over seeds".strip())
        axes.plot([places[value] for value in some[x]], some[y], ".", color=color, alpha=0.5,
                  label="each run" if number == 0 else None)
        told.append(f"{name} " + ", ".join(f"{value}: {mean_of:.3f}" for value, mean_of in mean["mean"].items()))
    if y == "accuracy":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.03), min(high, 1.03))
    axes.legend()
    return _finish(axes, f"{y.replace('_', ' ').capitalize()} by {x.replace('_', ' ')}",
                   UNITS.get(x, x.replace("_", " ")), UNITS.get(y, y.replace("_", " ")),
                   f"Means over seeds: {'; '.join(told).strip()}.")


def losses(results: pd.DataFrame, x: str, axes: Axes | None = None) -> Axes:
    """Training and validation loss of a sweep against a setting.

    A gap that widens is overfitting; both high is underfitting.
    """
    axes = _axes(results, axes, (7, 3.6))
    places, told = _places(axes, results[x]), []
    for name, column, number in (("training", "train_loss", 0), ("validation", "valid_loss", 1)):
        mean = spread(results, x, column)["mean"]
        at = np.array([places[value] for value in mean.index])
        order = np.argsort(at)
        axes.plot(at[order], mean.to_numpy()[order], marker=MARKERS[number], ls=LINES[number], label=f"{name}, mean")
        axes.plot([places[value] for value in results[x]], results[column], ".", color=f"C{number}", alpha=0.5)
        told.append(f"{name} " + ", ".join(f"{value}: {loss:.3g}" for value, loss in mean.items()))
    axes.legend()
    return _finish(axes, f"Training and validation loss by {x.replace('_', ' ')}", UNITS.get(x, x.replace("_", " ")),
                   "loss (nats per completion token)", f"Mean losses: {'; '.join(told)}.", yscale="log")


def _figure(picture: Axes | Figure) -> Figure:
    figure = picture.get_figure() if isinstance(picture, Axes) else picture
    if not isinstance(figure, Figure):
        raise DataError("These axes stand in no figure of their own; pass the whole figure.")
    return figure


def _axes(table: pd.DataFrame, axes: Axes | None, size: tuple[float, float]) -> Axes:
    if table.empty:
        raise DataError("There is nothing to draw: the table is empty.")
    return plt.subplots(figsize=size, layout="constrained")[1] if axes is None else axes


def _places(axes: Axes, values: pd.Series) -> dict[Any, float]:
    """Where each value of a setting stands on the x axis: numbers by size, else side by side."""
    names = list(dict.fromkeys(values))
    if pd.api.types.is_numeric_dtype(values):
        if min(names) > 0 and max(names) / min(names) >= 8:
            axes.set_xscale("log")
            axes.set_xticks(sorted(names), [f"{name:g}" for name in sorted(names)])
            axes.minorticks_off()
        return {name: float(name) for name in names}
    axes.set_xticks(range(len(names)), [textwrap.fill(str(name), 16) for name in names])
    return {name: float(place) for place, name in enumerate(names)}


def _finish(axes: Axes, title: str, x: str, y: str, told: str, grid: bool = True, **limits: Any) -> Axes:
    axes.set(title=title, xlabel=x, ylabel=y, **limits)
    axes.set_label(f"{title}. {told}")
    if grid:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return axes
