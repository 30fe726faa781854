"""The curves: a figure for each group of tasks, over steps on the left and seconds on the right."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.training.competitors import COMPETITORS
from benchmarks.training.results import Record, at, band
from benchmarks.training.tasks import TASKS

LABELS = {
    "train": "training loss",
    "test": "test loss",
    "error": "relative error",
    "test_accuracy": "test accuracy",
}


MOST_LINES = 10
"""How many methods of a task have a colour and a name: ours, and the best of the competitors."""

NAMED_COLOURS, GREY = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2], "0.75"


def shown(name: str) -> str:
    """Return the metric of a task's curves."""
    return TASKS[name].judged


def named(methods: dict[str, list[Record]], name: str) -> list[str]:
    """Return the methods that are drawn by name: ours, and the best competitors at the end."""
    metric = shown(name)
    sign = -1 if metric == "test_accuracy" else 1
    ours = [method for method in methods if method not in COMPETITORS]
    others = sorted(
        (method for method in methods if method in COMPETITORS),
        key=lambda method: sign * at(methods[method], metric, math.inf).median,
    )
    return [*ours, *others[: max(MOST_LINES - len(ours), 3)]]


def draw(axes: Axes, methods: dict[str, list[Record]], name: str, unit: str) -> None:
    """Draw the median of every method over its seeds, from the lowest to the highest shaded."""
    metric, colours = shown(name), dict(zip(named(methods, name), NAMED_COLOURS, strict=False))
    # Those without a name first, in grey, so that the others lie above them.
    unnamed = [method for method in methods if method not in colours]
    for method in [*unnamed, *colours]:
        curve = band(methods[method], metric, unit)
        style, colour = "--" if method in COMPETITORS else "-", colours.get(method, GREY)
        label = method if method in colours else "_" if method != unnamed[0] else "others"
        width = 2.0 if method not in COMPETITORS else 1.3
        axes.plot(curve.axis, curve.median, style, color=colour, label=label, lw=width)
        if method in colours:
            axes.fill_between(curve.axis, curve.low, curve.high, color=colour, alpha=0.12, lw=0)
    if TASKS[name].steps is None or unit == "seconds":
        axes.set_xscale("log")
    if metric != "test_accuracy":
        axes.set_yscale("log")
    axes.set(xlabel=unit, ylabel=LABELS[metric], title=name)


def write(folder: Path, group: str, tasks: dict[str, dict[str, list[Record]]]) -> Path:
    """Draw the tasks of a group below one another, and write the figure."""
    figure = Figure(figsize=(12, 3.6 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 2, squeeze=False)
    for (name, methods), row in zip(tasks.items(), rows, strict=True):
        for axes, unit in zip(row, ("steps", "seconds"), strict=True):
            draw(axes, methods, name, unit)
        row[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    path = folder / f"{group}.png"
    figure.savefig(path, dpi=120)
    return path
