"""The table and the figure of the language model: losses over updates and over seconds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]

UPDATES = (10, 30, 50)
"""After how many updates losses are told, besides those after some seconds."""


def at(record: Record, unit: str, place: float) -> float:
    """Return the loss between the two measurements around a place, infinite beyond the last."""
    curve = record["curve"]
    if curve[-1][unit] < place or not math.isfinite(curve[-1]["loss"]):
        return math.inf
    places, losses = ([point[key] for point in curve] for key in (unit, "loss"))
    return float(np.interp(place, places, losses))


def spread(values: Iterable[float]) -> str:
    """Return the mean of some numbers and their extremes, a dash where one is not known."""
    values = sorted(values)
    if not all(map(math.isfinite, values)):
        return "–"
    ends = f" ({values[0]:.2f}–{values[-1]:.2f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{ends}"


def table(methods: dict[str, list[Record]], seconds: float) -> str:
    """Return the table of the reported runs, in Markdown."""
    places = [("updates", n) for n in UPDATES] + [("seconds", seconds / 4), ("seconds", seconds)]
    heads = [f"{place:g} {'s' if unit == 'seconds' else 'updates'}" for unit, place in places]
    lines = [
        "| method | settings | " + " | ".join(heads) + " | updates | ms an update |",
        "|" + "---|" * (len(heads) + 4),
    ]
    for name, runs in methods.items():
        settings = ", ".join(f"{key} {value}" for key, value in runs[0]["config"].items())
        losses = [spread(at(run, unit, place * 0.999) for run in runs) for unit, place in places]
        ends = [run["curve"][-1] for run in runs]
        cost = statistics.median(1e3 * end["seconds"] / end["updates"] for end in ends)
        count = statistics.median(end["updates"] for end in ends)
        lines.append(
            f"| {name} | {settings} | " + " | ".join(losses) + f" | {count:.0f} | {cost:.0f} |"
        )
    return "\n".join(lines)


def figure(methods: dict[str, list[Record]], path: Path) -> None:
    """Draw the validation loss over updates and over seconds, a line a seed."""
    drawing = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, unit in zip(drawing.subplots(1, 2, sharey=True), ("updates", "seconds"), strict=True):
        for number, (name, runs) in enumerate(methods.items()):
            style = "--" if name.startswith("AdamW") else "-"
            for run in runs:
                places, losses = ([point[key] for point in run["curve"]] for key in (unit, "loss"))
                label = name if run is runs[0] else None
                axes.plot(places[1:], losses[1:], style, color=f"C{number}", label=label, lw=1.4)
        axes.set(xscale="log", xlabel="updates" if unit == "updates" else "CPU seconds")
        axes.set_ylim(1.4, 4.6)
        axes.grid(alpha=0.3)
    drawing.axes[0].set_ylabel("validation loss, nats a character")
    drawing.axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    drawing.savefig(path, dpi=120)


def write(folder: Path, records: Iterable[Record], names: Iterable[str], seconds: float) -> None:
    """Write the table of the reported runs, what the tuning found, and the figure."""
    records = sorted(records, key=lambda record: record["seed"])
    methods: dict[str, list[Record]] = {name: [] for name in names}
    for record in records:
        if record["stage"] == "report":
            methods[record["method"]].append(record)
    methods = {name: runs for name, runs in methods.items() if runs}
    tuning = [
        f"{record['method']}, {json.dumps(record['config'])}: {record['curve'][-1]['loss']:.3f}"
        for record in records
        if record["stage"] == "tune"
    ]
    text = table(methods, seconds) + "\n\nTuning, the loss at the end of a run:\n\n"
    text += "\n".join(f"- {line}" for line in tuning)
    (folder / "language_model.md").write_text(text + "\n", encoding="utf-8")
    figure(methods, folder / "language_model.png")
