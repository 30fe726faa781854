"""What is measured on a GPU: sections, peers, problems and precisions."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

TIME_WAS_UP = "not run: the time was up"


class Asked(NamedTuple):
    """How a peer is asked: what it needs, its share of the time, and what of everything."""

    package: str | None
    share: float
    quantities: tuple[str, ...] = ("top10", "all")
    precisions: tuple[str, ...] = ("float32",)


WITHOUT_TF32 = "float32, no TF32"
"""Plain float32 has TF32 where torch uses it unasked: in convolutions."""
ALL_PRECISIONS = ("float64", "float32", WITHOUT_TF32)

PEERS = {
    "jacrev": Asked(None, 14.0, precisions=("float64", "float32")),
    "ddnewton": Asked(None, 16.0, precisions=ALL_PRECISIONS),
    "floor": Asked(None, 12.0, precisions=("float64", "float32")),
    "vivit": Asked("vivit", 14.0),
    "ddnewton-compiled": Asked(None, 20.0),
    "ddnewton-graphs": Asked(None, 15.0, ("all", "top10")),
    "ddnewton-unprepared": Asked(None, 8.0, ("top10",)),
    "curvlinops": Asked("curvlinops", 8.0, ("all",)),
    "nngeometry": Asked("nngeometry", 8.0),
}
"""In the order in which they are measured. The first comes before all that are compared with its
answers in float64."""
COMPILED_PEERS = ("ddnewton-compiled", "ddnewton-graphs")

SECTIONS = {
    "tests": 75.0,
    "steps": sum(asked.share for asked in PEERS.values()),
    "syncs": 35.0,
    "accuracy": 15.0,
    "ratios": 20.0,
    "largest": 30.0,
    "poisson": 65.0,
}
"""In the order in which they are run, what matters most first, each with its share of the time: in
six minutes about so many seconds. What one leaves over goes to those that come after it."""

PROBLEMS = (("mlp", 64), ("3c3d-128", 128), ("2c2d-32", 32), ("mlp", 128))
QUICK_PROBLEMS = (("tiny-mlp", 6), ("tiny-conv", 6))


class Task(NamedTuple):
    """What one process measures: a section, or of the steps those of one peer."""

    section: str
    peer: str | None = None

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return self.section if self.peer is None else f"{self.section}, {self.peer}"


class Entry(NamedTuple):
    """One measurement of a peer."""

    problem: str
    samples: int
    precision: str
    quantity: str

    @property
    def stem(self) -> str:
        """Return the name of the file that has the answer to compare with."""
        return f"{self.problem}-{self.samples}-{self.quantity}"


def planned(peer: str, device: str, *, quick: bool) -> list[Entry]:
    """Return a peer's measurements in their order; quickly, steps are compiled once a problem."""
    asked = PEERS[peer]
    pairs = list(product(asked.quantities, QUICK_PROBLEMS if quick else PROBLEMS))
    if quick and peer in COMPILED_PEERS:
        pairs = list(zip(asked.quantities, QUICK_PROBLEMS, strict=True))
    return [
        Entry(problem, samples, precision, quantity)
        for quantity, (problem, samples) in pairs
        for precision in asked.precisions
        if device == "cuda" or precision != WITHOUT_TF32
    ]


def shared(seconds: float, shares: dict[Task, float], task: Task) -> float:
    """Return the part of the seconds that a task has which shares them with all after it."""
    tasks = list(shares)
    remaining = sum(shares[after] for after in tasks[tasks.index(task) :])
    return seconds if math.isinf(seconds) else seconds * shares[task] / remaining


def recorded(entry: Entry, peer: str, outcome: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a measurement, or of why there is none."""
    return entry._asdict() | {"peer": peer} | outcome
