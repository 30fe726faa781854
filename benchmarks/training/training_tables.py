"""The runs as a text: a table for each task, the aims with yes or no, and the figures."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.training import figures
from benchmarks.training.aims import OURS, answers
from benchmarks.training.competitors import COMPETITORS
from benchmarks.training.grids import GRIDS
from benchmarks.training.installed_packages import PACKAGES, is_missing
from benchmarks.training.results import (
    Record,
    Spread,
    after,
    at,
    change,
    failures,
    milliseconds,
    paired,
    reported,
    spread,
    to_level,
)
from benchmarks.training.tasks import TASKS

EXPLANATION = """\
Each entry: the median over the seeds, in brackets the smallest and the largest; ∞ is a run that
diverged, failed or never came there. Seconds are CPU seconds of updates, of what a method prepares
before the first too, not of what is measured in between. Settings: the best of a grid of one size,
on other seeds, by validation data; "as shipped" chooses nothing. Competitors stand first.
"""


def number(value: float) -> str:
    """Return a number in two or three digits."""
    if math.isinf(value):
        return "∞"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.1e}"


def percent(value: float) -> str:
    """Return a share in percent; of what has failed, a word."""
    return "failed" if math.isinf(value) else f"{100 * value:.1f} %"


def cell(values: Spread, form: object = number) -> str:
    """Return the median and the extremes."""
    return f"{form(values.median)} ({form(values.low)}–{form(values.high)})"


def settings(runs: list[Record]) -> str:
    """Return a method's settings."""
    config = runs[0]["config"]
    return ", ".join(f"{key} {value}" for key, value in config.items()) or "–"


def table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return a markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def about_method(runs: list[Record]) -> list[str]:
    """Return the last columns of every table: time of a step, and failures."""
    return [f"{milliseconds(runs):.3g}", f"{failures(runs)} of {len(runs)}"]


def timed(name: str, methods: dict[str, list[Record]]) -> list[str]:
    """Return the table of a task that is judged at its budgets."""
    metric, budgets = TASKS[name].judged, budgets_of(methods)
    also = ["train"] if metric != "train" else []
    heads = ["method", "settings", *(f"{figures.LABELS[metric]}, {b:g} s" for b in budgets)]
    heads += [*(figures.LABELS[other] for other in also), "steps", "ms a step", "failed"]
    rows = [
        [method, settings(runs)]
        + [cell(at(runs, metric, b)) for b in budgets]
        + [cell(at(runs, other, budgets[-1])) for other in also]
        + [number(spread(run["steps"] for run in runs).median), *about_method(runs)]
        for method, runs in methods.items()
    ]
    return table(heads, rows)


def budgets_of(methods: dict[str, list[Record]]) -> list[float]:
    """Return the budgets that the runs were given, those of the quick check too."""
    (name,) = {run["task"] for runs in methods.values() for run in runs}
    quick = any(run["quick"] for runs in methods.values() for run in runs)
    task = TASKS[name]
    longest = max(run["seconds"] for runs in methods.values() for run in runs)
    return [longest] if quick else list(task.budgets)


def levels(name: str, methods: dict[str, list[Record]]) -> list[str]:
    """Return the table of a task with an accuracy to reach."""
    level = f"{100 * TASKS[name].level:g} %"
    heads = ["method", "settings", f"steps to {level}", f"seconds to {level}"]
    heads += ["test accuracy at the end", "test loss", "ms a step", "failed"]
    rows = [
        [
            method,
            settings(runs),
            cell(to_level(runs, 0)),
            cell(to_level(runs, 1)),
            cell(at(runs, "test_accuracy", math.inf), percent),
            cell(at(runs, "test", math.inf)),
            *about_method(runs),
        ]
        for method, runs in methods.items()
    ]
    return table(heads, rows)


def late(name: str, methods: dict[str, list[Record]]) -> list[str]:
    """Return the table of a few steps from a trained net: changes of the losses."""
    heads = ["method", "settings", "change of test loss", "of training loss"]
    heads += ["test loss beside constant δ: mean ± standard error", "ms a step", "failed"]
    rows = []
    for method, runs in methods.items():
        beside = paired(runs, methods.get("constant", []), "test")
        rows.append(
            [
                method,
                settings(runs),
                *(cell(spread(change(run, part) for run in runs)) for part in ("test", "train")),
                "–"
                if math.isnan(beside.mean) or method == "constant"
                else f"{beside.mean:+.1e} ± {beside.error:.1e}",
                *about_method(runs),
            ]
        )
    return table(heads, rows)


PUBLISHED = {
    "engd-poisson-2d": "ENGD ported and run elsewhere: 6.9e-7 after 10 s.",
    "engd-poisson-5d": "Another net and new points in every step, 7000 s on a GPU: SPRING 2.6e-7, "
    "ENGD-W 6.8e-7, Adam 3.1e-3 (arXiv 2505.12149).",
    "poisson-10d": "The published curves end at 6.1e-5 for SPRING, after 141,000 steps, and 3.1e-4 "
    "for ENGD-W (arXiv 2505.12149).",
}
"""What others report, as text below a table."""


def stepwise(name: str, methods: dict[str, list[Record]]) -> list[str]:
    """Return the table of a task that counts steps: the error after a quarter, half and all."""
    total = max(run["curve"][-1]["steps"] for runs in methods.values() for run in runs)
    places = sorted({max(total // 4, 1), max(total // 2, 1), total})
    metric = TASKS[name].judged
    heads = ["method", "settings", *(f"{figures.LABELS[metric]}, {n} steps" for n in places)]
    rows = [
        [method, settings(runs)]
        + [cell(after(runs, metric, n)) for n in places]
        + about_method(runs)
        for method, runs in methods.items()
    ]
    return table([*heads, "ms a step", "failed"], rows)


def absent(name: str, methods: dict[str, list[Record]]) -> list[str]:
    """Return a line for every method of a task whose package is not installed."""
    task = TASKS[name]
    names = [
        method
        for method in GRIDS[task.kind]
        if method not in task.without and method not in methods and is_missing(method)
    ]
    return [*(f"{method}: not installed ({', '.join(PACKAGES[method])})." for method in names), ""]


def section(name: str, methods: dict[str, list[Record]]) -> list[str]:
    """Return a task's heading and table."""
    task = TASKS[name]
    seeds = {run["seed"] for runs in methods.values() for run in runs}
    data = {run["data"] for runs in methods.values() for run in runs if "data" in run}
    heading = f"{name}, {len(seeds)} seeds" + "".join(f", data: {words}" for words in sorted(data))
    kinds = {"late": late, "mini": levels, "full": timed, "drawn": stepwise}
    notes = [*absent(name, methods), PUBLISHED.get(name, ""), ""]
    return [f"## {heading}", "", *kinds[task.kind](name, methods), *notes]


def summary(tasks: dict[str, dict[str, list[Record]]]) -> list[str]:
    """Return one table of all equations: as shipped and the best three competitors, by budget."""
    heads = ["equation", "seconds", OURS, "best competitor", "second", "third"]
    rows = []
    for name, methods in tasks.items():
        if TASKS[name].group != "pde":
            continue
        for budget in budgets_of(methods):
            medians = {method: at(runs, "error", budget) for method, runs in methods.items()}
            others = sorted((m for m in medians if m in COMPETITORS), key=lambda m: medians[m])
            best = [f"{method}: {cell(medians[method])}" for method in others[:3]]
            shipped = cell(medians[OURS]) if OURS in medians else "–"
            rows.append([name, f"{budget:g}", shipped, *best, *["–"] * (3 - len(best))])
    return ["## The equations side by side", "", *table(heads, rows)] if rows else []


def machine() -> str:
    """Return what a time depends on."""
    parts = (platform.machine(), f"{os.cpu_count()} cores, one thread a run")
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


def write(folder: Path, records: dict[str, Record]) -> None:
    """Write ``training.md`` and the figures of what has been run."""
    tasks = reported(records.values())
    lines = ["# Training", "", machine(), "", EXPLANATION]
    lines += ["## What was to be reached", "", *answers(tasks), "", *summary(tasks)]
    for name, methods in tasks.items():
        lines += section(name, methods)
    # A figure for each group of tasks.
    for group in dict.fromkeys(TASKS[name].group for name in tasks):
        drawn = {name: tasks[name] for name in tasks if TASKS[name].group == group}
        path = figures.write(folder, group, drawn)
        lines += [f"![{group}]({path.name})", ""]
    (folder / "training.md").write_text("\n".join(lines), encoding="utf-8")
    configs = {
        name: {method: runs[0]["config"] for method, runs in methods.items()}
        for name, methods in tasks.items()
    }
    (folder / "settings.json").write_text(json.dumps(configs, indent=1) + "\n", encoding="utf-8")
