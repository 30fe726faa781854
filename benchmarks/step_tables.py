"""From records to a table that is read and a file that is computed with."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantities import QUANTITIES

Record = dict[str, Any]

HEADINGS = {
    "top10": "top 10",
    "all": "all directions",
    "eigenvalues": "eigenvalues",
}
EXPLANATION = """\
Each cell: median seconds, peak extra memory, relative distance from a float64 answer. Extra memory
is what a process takes above what it held before its first run. A peer is made once, outside of
the time; `ddnewton` has found the model's layers before (`prepare`), `ddnewton-unprepared` finds
them in every call. `floor` is a bound: forward pass, pullback, the fewest flops of the Gram matrix
at the rate of a large matrix product here, eigensolver, one pullback. "One run" is a single
measurement. Rows are left out where a peer has no rules for the layers: ViViT for residual sums,
both ViViT and nngeometry for attention, module-based peers for residuals of differential
equations; JAX's peers have the perceptrons alone, rebuilt from the same weights.
"""


def machine(device: str, threads: int) -> Record:
    """Return what a time depends on."""
    description: Record = {
        "device": device,
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "architecture": platform.machine(),
    }
    if device == "cuda":
        description["gpu"] = torch.cuda.get_device_name()
    return description


def seconds(value: float) -> str:
    """Return a time with two significant digits or three."""
    if value < 0.1:
        return f"{1000 * value:.2g} ms" if value < 0.01 else f"{1000 * value:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def cell(record: Record | None) -> str:
    """Return one measurement, or why there is none."""
    if record is None:
        return "–"
    if record["status"] != "ok":
        return record["status"]
    if "seconds" not in record:
        return "done"
    words = [seconds(record["seconds"])]
    if record.get("peak") is not None:
        words.append(f"{record['peak'] / 1e6:.0f} MB")
    if record.get("difference") is not None:
        words.append(f"{record['difference']:.0e}")
    if record.get("runs") == 1:
        words.append("one run")
    return ", ".join(words)


def ratio(records: list[Record], peer: str, field: str, quantity: str = "top10") -> str:
    """Return how many times more than ours a peer takes, in one problem's records."""
    values = {
        record["peer"]: record[field]
        for record in records
        if record["quantity"] == quantity and record["status"] == "ok" and record.get(field)
    }
    if peer not in values or "ddnewton" not in values:
        return "–"
    return f"{values[peer] / values['ddnewton']:.3g}"


def next_best(records: list[Record], quantity: str) -> str:
    """Return the fastest peer that is not ours, and how many times slower it is."""
    peers = [
        record
        for record in records
        if record["quantity"] == quantity
        and record["status"] == "ok"
        and record["peer"] != "floor"
        and not record["peer"].startswith("ddnewton")
    ]
    if not peers:
        return "–"
    best = min(peers, key=lambda record: record["seconds"])["peer"]
    return f"{best} {ratio(records, best, 'seconds', quantity)}"


def ours_over_floor(records: list[Record], quantity: str) -> str:
    """Return how many times the floor our own time is."""
    inverse = ratio(records, "floor", "seconds", quantity)
    return inverse if inverse == "–" else f"{1 / float(inverse):.2f}"


def overview(problems: dict[str, list[Record]]) -> list[str]:
    """Return the table of ratios to ours."""
    columns = ["problem", "ViViT, top 10: time", "memory", "un-prepared", "next best: top 10"]
    columns += ["all directions", "eigenvalues", "ours / floor: top 10", "all", "eigenvalues"]
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for name, records in problems.items():
        cells = [
            ratio(records, "vivit", "seconds"),
            ratio(records, "vivit", "peak"),
            ratio(records, "ddnewton-unprepared", "seconds"),
            *(next_best(records, quantity) for quantity in QUANTITIES),
            *(ours_over_floor(records, quantity) for quantity in QUANTITIES),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def details(name: str, records: list[Record]) -> list[str]:
    """Return the table of one problem."""
    lines = [f"### {name}, N = {records[0]['samples']}", ""]
    lines += [f"| peer | {' | '.join(HEADINGS.values())} |", "|---|---|---|---|"]
    cells_of = {(record["peer"], record["quantity"]): record for record in records}
    for peer in dict.fromkeys(record["peer"] for record in records):
        cells = [cell(cells_of.get((peer, quantity))) for quantity in QUANTITIES]
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return [*lines, ""]


def fits(largest: list[Record]) -> list[str]:
    """Return the table of the largest batches."""
    if not largest:
        return []
    lines = ["## Largest N whose top-10 step fits in 4 GiB of extra memory", ""]
    lines += ["| problem | peer | N | its peak | its seconds | note |", "|---|---|---|---|---|---|"]
    for result in largest:
        size, used = result["samples"], "– | –"
        if size:
            used = f"{result['peak'] / 2**30:.2f} GiB | {seconds(result['seconds'])}"
        lines.append(
            f"| {result['problem']} | {result['peer']} | {size} | {used} | {result['note']} |"
        )
    return [*lines, ""]


def write(folder: Path, about: Record, records: list[Record], largest: list[Record]) -> None:
    """Write ``bench.md`` and ``bench.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    problems: dict[str, list[Record]] = {}
    for record in records:
        problems.setdefault(record["problem"], []).append(record)
    lines = ["# Benchmarks", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [EXPLANATION, "## How many times more than ours", "", *overview(problems), ""]
    lines += [*fits(largest), "## Every measurement", ""]
    for name, measurements in problems.items():
        lines += details(name, measurements)
    (folder / "bench.md").write_text("\n".join(lines), encoding="utf-8")
    everything = {"machine": about, "records": records, "largest": largest}
    (folder / "bench.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
