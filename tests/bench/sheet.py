"""Figures with their spread, ratios with their goals, and the report made of them."""

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "openai", "trl", "llama-cpp-python")


@dataclass(frozen=True)
class Figure:
    """One measured quantity; `values` are the runs, in order."""

    row: str
    what: str
    values: list[float]
    unit: str
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        several = f" ({min(self.values):.4g} to {max(self.values):.4g}, {len(self.values)} runs)"
        return f"{self.median:.4g} {self.unit}{several if len(self.values) > 1 else ''}"


@dataclass(frozen=True)
class Ratio:
    """One figure over or less another, or a figure itself, against a goal such as ("<=", 1.6); None: only told."""

    row: str
    what: str
    value: float
    goal: tuple[str, float] | None = None

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        sign, bound = self.goal
        return "met" if (self.value <= bound if sign == "<=" else self.value >= bound) else "missed"

    def __str__(self) -> str:
        goal = f", goal {self.goal[0]} {self.goal[1]:g}: {self.verdict}" if self.goal else ""
        return f"{self.value:.3g}{goal}"


@dataclass
class Sheet:
    """All results of one run. Printed as they come and written after every row, so that a stopped run leaves them."""

    folder: Path
    figures: list[Figure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    machine: dict[str, object] = field(default_factory=dict)

    def figure(self, row: str, what: str, values: float | Sequence[float], unit: str, note: str = "") -> float:
        """Record a quantity, one value or one a run; returns the median."""
        found = Figure(row, what, [float(v) for v in values] if isinstance(values, Sequence) else [values], unit, note)
        self.figures.append(found)
        print(f"{row}: {what}: {found}{f' ({note})' if note else ''}", flush=True)
        return found.median

    def ratio(self, row: str, what: str, value: float, goal: tuple[str, float] | None = None) -> None:
        """Record how a figure stands to another one, or to its goal."""
        self.ratios.append(Ratio(row, what, value, goal))
        print(f"{row}: {what}: {self.ratios[-1]}", flush=True)

    def skip(self, row: str, why: str) -> None:
        """Record that something was not measured."""
        self.skipped.append((row, why))
        print(f"{row}: not measured: {why}", flush=True)

    def write(self) -> None:
        """Write `report.json` and `report.md` into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {"machine": self.machine, "figures": [asdict(f) | {"median": f.median} for f in self.figures],
                 "ratios": [asdict(r) | {"verdict": r.verdict} for r in self.ratios], "skipped": self.skipped}
        (self.folder / "report.json").write_text(json.dumps(found, indent=1), "utf-8")
        (self.folder / "report.md").write_text(self._markdown(), "utf-8")

    def _markdown(self) -> str:
        lines = ["# Bench", "", *(f"- {name}: {value}" for name, value in self.machine.items()), "",
                 "Medians of several runs, with the smallest and the largest. Machines are noisy: trust ratios "
                 "within one run more than seconds.", "", "| row | ratio | value | goal | |", "|---|---|---|---|---|"]
        for r in self.ratios:
            goal = f"{r.goal[0]} {r.goal[1]:g}" if r.goal else "–"
            lines.append(f"| {r.row} | {r.what} | {r.value:.3g} | {goal} | {r.verdict} |")
        lines += ["", "| row | what | measured | |", "|---|---|---|---|"]
        lines += [f"| {f.row} | {f.what} | {f} | {f.note} |" for f in self.figures]
        lines += ["", *(f"- {row}: not measured: {why}" for row, why in self.skipped), ""]
        lines += [f"![{plot.stem}]({plot.name})\n" for plot in sorted(self.folder.glob("*.png"))]
        return "\n".join(lines)


def machine() -> dict[str, object]:
    """What the figures were measured on and with."""
    return {"time": time.strftime("%Y-%m-%d %H:%M"), "processor": _processor(), "cores": os.cpu_count(),
            "system": platform.platform(), "python": platform.python_version(),
            "versions": ", ".join(f"{name} {_version(name)}" for name in PACKAGES)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
