"""Figures of what `labkit.pricing.compare` found: cost against volume, with break-even marked."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

LINES = {"zero-shot": ":", "few-shot": "--", "fine-tuned": "-"}


def plot_costs(table: pd.DataFrame, axes: Axes, requests: int | None = None) -> None:
    """Draw each model's and approach's total cost against the number of requests.

    `table` is what `compare` returned; rows whose price is unknown are left out, and named below
    the figure. Approaches differ in their dashes, models in colour. A cross marks where a
    fine-tuned model gets cheaper than few-shot prompts with its own base. Both axes are
    logarithmic; `requests` is where the first ends (default: ten times the table's volume).
    """
    most = requests or 10 * table.attrs["requests"]
    volumes = np.geomspace(1, most, 200)
    known = table[table.total_usd.notna()]
    colours = {model: f"C{index % 10}" for index, model in enumerate(dict.fromkeys(known.model))}
    for row in known.itertuples():
        cost = row.training_usd + row.usd_per_1000 / 1000 * volumes
        axes.plot(volumes, cost, LINES[row.approach], color=colours[row.model], label=f"{row.model}, {row.approach}")
        if pd.notna(row.break_even) and row.break_even <= most:
            place = (row.break_even, row.training_usd + row.usd_per_1000 / 1000 * row.break_even)
            axes.plot(*place, "x", color=colours[row.model], markersize=9, markeredgewidth=2)
            axes.annotate(f"{row.break_even:,} requests", place, textcoords="offset points", xytext=(-6, 9),
                          ha="right", fontsize="small")
    left_out = sorted({f"{row.model}, {row.approach}" for row in table[table.total_usd.isna()].itertuples()})
    below = f"\nprice not known: {'; '.join(left_out)}" if left_out else ""
    axes.set(xscale="log", yscale="log", xlabel=f"requests{below}", ylabel="total cost (USD)",
             title=f"Cost against volume, prices of {table.attrs['on']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
