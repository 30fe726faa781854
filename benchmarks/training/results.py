"""What the runs of one task say: values at a budget, their median and spread, curves on one axis.

A run that failed or diverged counts as infinitely bad.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.training.grids import GRIDS
from benchmarks.training.tasks import TASKS

Record = dict[str, Any]


class Spread(NamedTuple):
    """The median of some numbers, the smallest and the largest; infinite are those that failed."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Return the median and the extremes."""
    values = sorted(values)
    return Spread(statistics.median(values), values[0], values[-1])


def reported(records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    """Return the reported runs by task and method, in the order of the tasks and of their grids."""
    runs: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        if record["stage"] == "report":
            runs.setdefault(record["task"], {}).setdefault(record["method"], []).append(record)
    return {
        name: {method: runs[name][method] for method in GRIDS[task.kind] if method in runs[name]}
        for name, task in TASKS.items()
        if name in runs
    }


def by_budget(runs: list[Record], budget: float) -> list[Record]:
    """Return a method's runs that say how far it is at a budget, a seed each.

    That is a run of just this length, where there is one, and else the longest.
    """
    seconds = {run["seconds"] for run in runs}
    wanted = budget if budget in seconds else max(seconds)
    return [run for run in runs if run["seconds"] == wanted]


def longest(runs: list[Record]) -> list[Record]:
    """Return a method's longest runs, a seed each."""
    return by_budget(runs, math.inf)


def at(runs: list[Record], metric: str, budget: float) -> Spread:
    """Return a metric at a budget over the seeds."""
    return spread(value(run, metric, budget) for run in by_budget(runs, budget))


def value(run: Record, metric: str, budget: float) -> float:
    """Return a metric where a run was measured nearest to a budget, infinite: at its end."""
    if run["status"] != "ok":
        return -math.inf if metric.endswith("accuracy") else math.inf
    budget = min(budget, run["curve"][-1]["seconds"])
    point = min(run["curve"], key=lambda point: abs(point["seconds"] - budget))
    return point[metric]


def after(runs: list[Record], metric: str, steps: int) -> Spread:
    """Return a metric after so many steps over the seeds, infinite where a run failed."""
    return spread(
        min(run["curve"], key=lambda point: abs(point["steps"] - steps))[metric]
        if run["status"] == "ok"
        else math.inf
        for run in runs
    )


def to_level(runs: list[Record], unit: int) -> Spread:
    """Return the steps (0) or seconds (1) until the test accuracy was reached; inf if never."""
    reached = [run["reached"]["test"] if run["status"] == "ok" else None for run in longest(runs)]
    return spread(math.inf if pair is None else pair[unit] for pair in reached)


def failures(runs: list[Record]) -> int:
    """Return how many of the runs failed or diverged."""
    return sum(run["status"] != "ok" for run in runs)


def milliseconds(runs: list[Record]) -> float:
    """Return the median milliseconds of a step."""
    times = [
        1000 * (run["finished"] or run["curve"][-1]["seconds"]) / max(run["steps"], 1)
        for run in longest(runs)
    ]
    return statistics.median(times)


def change(run: Record, metric: str) -> float:
    """Return by how much a metric has changed from a run's start to its end."""
    return run["curve"][-1][metric] - run["curve"][0][metric] if run["status"] == "ok" else math.inf


class Difference(NamedTuple):
    """The mean of paired differences, and its standard error."""

    mean: float
    error: float


def paired(runs: list[Record], baseline: list[Record], metric: str) -> Difference:
    """Return how much more a metric has changed in the runs than in others of the same seeds."""
    before = {run["seed"]: change(run, metric) for run in baseline}
    differences = [
        change(run, metric) - before[run["seed"]] for run in runs if run["seed"] in before
    ]
    differences = [d for d in differences if math.isfinite(d)]
    if len(differences) < 2:
        return Difference(math.nan, math.nan)
    return Difference(
        statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    )


class Band(NamedTuple):
    """Curves of several seeds on one axis: the median and the extremes at every place."""

    axis: list[float]
    median: list[float]
    low: list[float]
    high: list[float]


def band(runs: list[Record], metric: str, unit: str) -> Band:
    """Return a metric over ``steps`` or ``seconds``: at each place, what was measured last."""
    runs = longest(runs)
    places = sorted({point[unit] for run in runs for point in run["curve"] if point[unit] > 0})
    start = max(
        (min(p[unit] for p in run["curve"][1:]) for run in runs if run["curve"][1:]), default=0
    )
    end = (
        min(run["curve"][-1][unit] for run in runs if run["status"] == "ok")
        if any(run["status"] == "ok" for run in runs)
        else 0
    )
    axis = [place for place in places if start <= place <= end]
    rows = [spread(_before(run, metric, unit, place) for run in runs) for place in axis]
    return Band(axis, *([row[i] for row in rows] for i in range(3)))


def _before(run: Record, metric: str, unit: str, place: float) -> float:
    index = bisect_right([point[unit] for point in run["curve"]], place) - 1
    return run["curve"][index][metric]
