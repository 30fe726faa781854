"""Time, memory and accuracy of every peer on every problem: a markdown table and a JSON file.

Run with ``python -m benchmarks.bench``, or ``nox -s bench`` for an environment with the peers.
Each peer works in a process of its own, on Linux; one that is not installed, fails, or takes too
long or too much memory is an entry that says so. ``--quick`` needs nothing but ddnewton, counts
its runs, and waits for them however long they take.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import peers, recipes, step_tables
from benchmarks.largest_batch import STARTS, largest
from benchmarks.peers import PEERS
from benchmarks.processes import Bench, Job, free_memory, run, run_all, say
from benchmarks.quantities import QUANTITIES
from benchmarks.recipes import RECIPES
from benchmarks.step_tables import Record, cell

PATIENCE = {True: 120, False: 30}
"""Seconds that a process may take: of the peers that matter most, and of the others."""


def jobs(options: argparse.Namespace, *, main: bool) -> Iterator[Job]:
    """Yield the jobs of the main peers, on each problem after its truth and floor, or the rest."""
    for name in options.problem:
        if main:
            yield Job(name, "truth", QUANTITIES, math.inf if options.quick else 240)
            yield Job(name, "floor", QUANTITIES, math.inf if options.quick else 90)
        for peer in (peer for peer in options.peer if PEERS[peer].main is main):
            if RECIPES[name].kind in PEERS[peer].kinds:
                quantities = PEERS[peer].quantities
                for part in [quantities] if options.quick else [(q,) for q in quantities]:
                    yield Job(name, peer, part, math.inf if options.quick else PATIENCE[main])


def compare(records: list[Record]) -> list[Record]:
    """Return the records without the truths, each with its distance from the truth."""
    truths = {
        (record["problem"], record["quantity"]): record.pop("answer")
        for record in records
        if record["peer"] == "truth" and "answer" in record
    }
    for record in records:
        answer, truth = record.pop("answer", None), truths.get(_asked(record))
        if answer and truth:
            record["difference"] = difference(torch.load(answer), torch.load(truth))
    return [record for record in records if record["peer"] != "truth" or record["status"] != "ok"]


def _asked(record: Record) -> tuple[str, str]:
    return record["problem"], record["quantity"]


def difference(answer: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ‖answer − truth‖ / ‖truth‖; eigenvalues that one side leaves out are zeros."""
    size = max(len(answer), len(truth))
    answer, truth = (torch.cat([x.new_zeros(size - len(x)), x]) for x in (answer, truth))
    return float((answer - truth).norm() / truth.norm())


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small problems, to see that it works")
    parser.add_argument("--problem", nargs="+", choices=RECIPES, help="some problems only")
    parser.add_argument("--peer", nargs="+", choices=PEERS, help="some peers only")
    parser.add_argument("--largest", action="store_true", help="the largest batches in 4 GiB only")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="stop after so many; 37, or never if quick")
    # What depends on other options.
    options = parser.parse_args()
    if options.minutes is None:
        options.minutes = math.inf if options.quick else 37.0
    options.problem = options.problem or (recipes.QUICK if options.quick else recipes.FULL)
    options.peer = options.peer or (peers.QUICK if options.quick else tuple(PEERS))
    return options


def main() -> None:
    """Run everything, what matters most first, and write the report."""
    options = arguments()
    workers = 2 if options.quick else 1
    with TemporaryDirectory() as folder:
        bench = Bench(
            folder=Path(folder),
            device=options.device,
            threads=options.threads,
            memory=int(0.85 * free_memory()),
            deadline=time.monotonic() + 60 * options.minutes,
            patience=3.0,
            runs=2 if options.quick else None,
        )
        wanted = () if options.largest else (True, False)
        records = [
            record
            for main in wanted
            for record in run_all(bench, [*jobs(options, main=main)], workers)
        ]
        sizes = [] if options.quick else batches(bench, options)
        records = compare(records)
    about = step_tables.machine(options.device, options.threads)
    step_tables.write(options.output, about, records, sizes)
    say(f"written: {options.output / 'bench.md'}, {options.output / 'bench.json'}")


def batches(bench: Bench, options: argparse.Namespace) -> list[Record]:
    """Return the largest batches of the chosen problems and peers."""

    def measure(problem: str, peer: str, samples: int) -> Record:
        job = Job(problem, peer, ("top10",), PATIENCE[True] // 2, samples)
        (record,) = run(bench._replace(patience=0.0), job)
        say(f"{problem:10} {peer:20} N = {samples:<8} {cell(record)}")
        return record

    return [
        largest(measure, problem, peer, starts)
        for (problem, peer), starts in STARTS.items()
        if problem in options.problem and peer in options.peer
    ]


if __name__ == "__main__":
    main()
