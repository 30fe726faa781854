"""The curves: a figure for each group of tasks, over steps on the left and seconds on the right."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.training.competitors import COMPETITORS
from benchmarks.training.grids import GRIDS
from benchmarks.training.results import Record, band
from benchmarks.training.tasks import TASKS

LABELS = {
    "train": "training loss",
    "test": "test loss",
    "error": "relative error",
    "test_accuracy": "test accuracy",
}


COLOURS = {
    method: colormaps["tab20"](2 * place % 20 + place // 10)
    for place, method in enumerate(dict.fromkeys(m for grid in GRIDS.values() for m in grid))
}


def shown(name: str) -> str:
    """Return the metric of a task's curves."""
    return TASKS[name].judged


def draw(axes: Axes, methods: dict[str, list[Record]], name: str, unit: str) -> None:
    """Draw the median of every method over its seeds, from the lowest to the highest shaded."""
    metric = shown(name)
    for method, runs in methods.items():
        curve = band(runs, metric, unit)
        style, colour = "--" if method in COMPETITORS else "-", COLOURS[method]
        axes.plot(curve.axis, curve.median, style, color=colour, label=method, lw=1.3)
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
