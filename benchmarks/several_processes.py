"""Steps of several processes beside the same steps of one: time, bytes on the wire, difference.

Run with ``python -m benchmarks.several_processes``, or ``nox -s ranks``. It starts its own
processes on this machine, of one thread each, which pass tensors by gloo; in every round one
process makes the step, and then all of them do. Times are medians of rounds: seconds of the clock,
and CPU seconds, of several processes those of the busiest, which is what a machine with a free core
for each would take at least. Bytes are what all ranks log as sent, beside those of the model in
`benchmarks.ranks_model`. ``--model`` prints that model for many GPUs; ``--quick`` runs small
problems once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.multiprocessing as mp

from benchmarks.processes import say
from benchmarks.ranks_measure import Task, serve
from benchmarks.ranks_model import paper
from benchmarks.step_tables import machine, seconds

FULL = [
    Task("mlp", 128, "one δ", prepared=False),
    Task("mlp", 128, "one δ"),
    Task("mlp", 128, "top 10"),
    Task("mlp", 256, "one δ"),
    Task("mlp", 512, "one δ"),
    Task("mlp", 1024, "one δ"),
    Task("mlp", 512, "free"),
    Task("3c3d-128", 128, "one δ", prepared=False),
    Task("3c3d-128", 128, "one δ"),
    Task("3c3d-128", 128, "top 10"),
    Task("3c3d-128", 256, "one δ"),
    Task("3c3d-128", 128, "free"),
    Task("pinn", 8192, "one δ"),
]
QUICK = [
    Task("tiny-mlp", 6, "one δ", prepared=False),
    Task("tiny-mlp", 6, "top 10"),
    Task("tiny-conv", 7, "one δ"),
    Task("tiny-conv", 7, "free"),
    Task("reference", 64, "one δ"),
]
"""Problems of `benchmarks.recipes`; the last one of each list is on the side of the parameters."""

HEADINGS = (
    *("problem", "N", "step", "prepared", "one process: s", "ranks: s", "× faster"),
    *("one process: CPU s", "busiest rank: CPU s", "× less", "on paper", "sent", "on paper"),
    "difference",
)


def row(record: dict[str, Any]) -> str:
    """Return the row of a task."""
    one, ranks = record["seconds"], record["seconds_of_ranks"]
    cpu, busiest = record["cpu"], record["cpu_of_busiest"]
    cells = [record["problem"], f"{record['samples']:,}", record["quantity"]]
    cells += ["yes" if record["prepared"] else "no"]
    cells += [seconds(one), seconds(ranks), f"{one / ranks:.2f}"]
    cells += [seconds(cpu), seconds(busiest), f"{cpu / busiest:.2f}"]
    factor = "–"
    if "model_seconds" in record:
        factor = f"{record['model_seconds'] / record['model_seconds_of_ranks']:.2f}"
    cells += [factor, megabytes(record["sent"]), megabytes(record.get("model_sent"))]
    cells += [f"{record['difference']:.0e}"]
    return f"| {' | '.join(cells)} |"


def megabytes(sent: dict[str, float] | None) -> str:
    """Return how much is sent in all."""
    return "–" if sent is None else f"{sum(sent.values()) / 1e6:.3g} MB"


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="store_true", help="the model on paper, for many GPUs")
    parser.add_argument("--quick", action="store_true", help="small problems, to see that it works")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="problems that begin with these")
    parser.add_argument("--steps", nargs="+", choices=("one δ", "top 10", "free"), metavar="STEP")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="a file for everything that was measured")
    options = parser.parse_args()
    known = QUICK if options.quick else FULL
    starts = tuple(options.only or [""])
    options.tasks = [task for task in known if task.problem.startswith(starts)]
    if options.steps:
        options.tasks = [task for task in options.tasks if task.quantity in options.steps]
    if not options.tasks:
        names = ", ".join(dict.fromkeys(task.problem for task in known))
        parser.error(f"--only must name beginnings of {names}; got {options.only}")
    return options


def main() -> None:
    """Measure, and print the table row by row; or print the model."""
    options = arguments()
    if options.model:
        say(*paper(), sep="\n")
        return
    about = machine("cpu", 1)
    say(", ".join(f"{key} {value}" for key, value in about.items()), "")
    say(f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", sep="\n")
    records: list[dict[str, Any]] = []
    rounds = 1 if options.quick else options.rounds
    with TemporaryDirectory() as folder:
        given = (options.ranks, folder, options.tasks, rounds)
        processes = mp.spawn(serve, args=given, nprocs=options.ranks, join=False)
        ended = False
        while not ended:
            # An error in one of the processes ends all, and is raised here.
            ended = processes.join(timeout=0.2)
            while (file := Path(folder) / f"{len(records)}.json").exists():
                records.append(json.loads(file.read_text(encoding="utf-8")))
                say(row(records[-1]))
    if options.json:
        everything = {"machine": about, "records": records}
        options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
