"""One process of the benchmark of large problems; started by `benchmarks.large_problems`.

With a problem alone it measures all its quantities by CPU time, the ways taking turns, beside the
truth, and leaves them and what was asked in ``FOLDER/times.json`` and ``FOLDER/asked.pt``. With
quantities and a way as well it measures the memory of one answer to each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.large_recipes import EIGENPAIRS, PRODUCT, RECIPES, Instance, Large, build, step_name
from benchmarks.large_reference import Reference, reference
from benchmarks.large_ways import EXACT, OURS, PEER, WAYS, Answer, Asked, Peer, ours, told
from benchmarks.measure import watch
from benchmarks.processes import in_words

Record = dict[str, Any]

PATIENCE, MOST_ROUNDS = 10.0, 7
"""For how many CPU seconds the ways take turns, after the first round, and how often."""

SLOW = 4.0
"""Seconds of an answer that is not repeated."""

MOST_ITERATIONS = 2000
"""Of a peer whose iterates are looked at."""

EIGENPAIR_RESIDUAL = 1e-6
"""How accurate eigenpairs are asked for, relative to the largest eigenvalue."""

ARPACK = [{"tol": tol, "ncv": ncv} for tol in (1e-4, 1e-5, 1e-6) for ncv in (None, 40)]
"""Arguments of eigsh that are tried for the fewest products to that accuracy."""


class Enough(Exception):
    """An iterate is as good as asked for."""


def attempted(work: Callable[[], Record]) -> Record:
    """Return what some work comes to, or why it did not."""
    try:
        return {"status": "ok"} | work()
    except Exception as error:  # noqa: BLE001 - however a way fails, that is its entry
        return {"status": in_words(f"{type(error).__name__}: {str(error).strip() or 'no message'}")}


def seconds_of(run: Answer) -> float:
    """Return the CPU time of an answer."""
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turns(runs: dict[str, Answer], rounds: int | None) -> dict[str, Record]:
    """Return the median CPU time of every way after the first round, which warms up."""
    first = {way: seconds_of(run) for way, run in runs.items()}
    times: dict[str, list[float]] = {way: [] for way in runs}
    repeated = {way: run for way, run in runs.items() if first[way] <= SLOW}
    start = time.process_time()
    while repeated and len(next(iter(times[way] for way in repeated))) < (rounds or MOST_ROUNDS):
        for way, run in repeated.items():
            times[way].append(seconds_of(run))
        enough = all(len(times[way]) >= 3 for way in repeated)
        if rounds is None and enough and time.process_time() - start > PATIENCE:
            break
    return {
        way: {"seconds": statistics.median(times[way] or [first[way]]), "runs": len(times[way])}
        for way in runs
    }


def quantity_measured(
    instance: Instance, recipe: Large, quantity: str, truth: Reference, rounds: int | None
) -> tuple[dict[str, Record], Asked]:
    """Return the records of all ways to a quantity, and what they were asked."""
    asked, records = settled(instance, recipe, quantity, truth)
    runs: dict[str, Answer] = {}
    for way in [OURS, PEER] + [EXACT] * (quantity in recipe.exact):
        if records.get(way, {"status": "ok"})["status"] != "ok":
            continue

        # How right an answer is, from a first one that is not timed.
        def judged(way: str = way) -> Record:
            runs[way] = WAYS[way](instance, asked)
            return accuracy(quantity, asked, truth, runs[way]())

        records[way] = records.get(way, {}) | attempted(judged)
        if records[way]["status"] != "ok":
            runs.pop(way, None)
    for way, times in in_turns(runs, rounds).items():
        records[way] |= times
    return records, asked


def settled(
    instance: Instance, recipe: Large, quantity: str, truth: Reference
) -> tuple[Asked, dict[str, Record]]:
    """Return what is asked, the peer's stopping included, and what is known of the ways by that."""
    if quantity == PRODUCT:
        generator = torch.Generator().manual_seed(1)
        return Asked(vector=torch.randn(truth.gradient.shape, generator=generator)), {}
    if quantity == EIGENPAIRS:
        record = attempted(lambda: arpack(Peer(instance), truth))
        return Asked(pairs=record.pop("options", None)), {PEER: record}
    (damping,) = (d for d in recipe.dampings if step_name(d) == quantity)
    asked = Asked(delta=damping * truth.largest, tol=recipe.tol)
    solution = truth.solution(asked.delta)
    goal = truth.lost(ours(instance, asked)(), solution, asked.delta)
    # The peer stops at the first iterate that gives away no more than our step does.
    count: list[float] = []

    def reached() -> Record:
        def look(iterate: torch.Tensor) -> None:
            count.append(truth.lost(iterate, solution, asked.delta))
            if count[-1] <= goal:
                raise Enough

        with suppress(Enough):
            Peer(instance).step(asked.delta, MOST_ITERATIONS, look)
        return {"products": len(count)}

    record = attempted(reached)
    asked = asked._replace(iterations=record.get("products"), solution=solution)
    return asked, {OURS: told(instance, asked) | {"status": "ok"}, PEER: record}


def arpack(peer: Peer, truth: Reference) -> Record:
    """Return the arguments by which ARPACK makes the fewest products to eigenpairs as asked for."""
    tried: list[Record] = []
    for options in ARPACK:
        peer.products = 0
        residual = truth.residual(*peer.eigenpairs(options))
        if residual <= EIGENPAIR_RESIDUAL:
            tried.append({"products": peer.products, "options": options})
        if len(tried) == 2:
            break
    if not tried:
        message = f"no setting leads to residuals of {EIGENPAIR_RESIDUAL:g}"
        raise ValueError(message)
    return min(tried, key=lambda record: record["products"])


def accuracy(quantity: str, asked: Asked, truth: Reference, answer: Any) -> Record:
    """Return how far an answer is from the truth."""
    if quantity == PRODUCT:
        exact = truth.product(asked.vector.double())
        return {"error": float((answer.double() - exact).norm() / exact.norm())}
    if quantity == EIGENPAIRS:
        return {"error": truth.residual(*answer)}
    return {"error": truth.lost(answer, asked.solution, asked.delta)}


def all_times(recipe: Large, folder: Path, rounds: int | None) -> None:
    """Measure all quantities of a problem, and leave them in the folder, one by one."""
    truth, instance = reference(build(recipe, torch.float64)), build(recipe)
    times, questions = {}, {}
    for quantity in recipe.quantities:
        times[quantity], asked = quantity_measured(instance, recipe, quantity, truth, rounds)
        questions[quantity] = asked._replace(solution=None)._asdict()
        (folder / "times.json").write_text(json.dumps(times), encoding="utf-8")
        torch.save(questions, folder / "asked.pt")


def memory(recipe: Large, folder: Path, quantity: str, way: str) -> None:
    """Measure the memory of an answer, after one to a small problem of the same kind."""
    asked = Asked(**torch.load(folder / "asked.pt")[quantity])
    small = build(RECIPES["tiny PINN" if recipe.squares else "tiny GPT"])
    numbers = sum(p.numel() for p in small.problem.params.values())
    vector = None if asked.vector is None else torch.ones(numbers)
    WAYS[way](small, asked._replace(vector=vector, iterations=2))()
    instance = build(recipe)
    peak = watch("cpu")
    WAYS[way](instance, asked)()
    record = {"peak": peak()}
    (folder / f"{quantity}, {way}.json").write_text(json.dumps(record), encoding="utf-8")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("problem", choices=RECIPES)
    parser.add_argument("--quantity", nargs="+")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="so many, in place of patience")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.problem]
    if options.quantity is None:
        all_times(recipe, options.folder, options.rounds)
        return
    for quantity in options.quantity:
        memory(recipe, options.folder, quantity, options.way)


if __name__ == "__main__":
    main()
