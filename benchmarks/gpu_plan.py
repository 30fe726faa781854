"""What is measured on a GPU: which peers, on which problems, in which precisions."""

from __future__ import annotations

from typing import Any, NamedTuple

TIME_WAS_UP = "not run: the time was up"

PEERS = {
    "jacrev": None,
    "ddnewton": None,
    "ddnewton-unprepared": None,
    "ddnewton-dense": None,
    "vivit": "vivit",
    "nngeometry": "nngeometry",
    "curvlinops": "curvlinops",
}
"""In the order in which they are measured, each with the package that it needs. The first comes
before all that are compared with its answers in float64."""

QUANTITIES = {
    "ddnewton-unprepared": ("top10",),
    "ddnewton-dense": ("top10",),
    "curvlinops": ("all",),
}
PROBLEMS = (("mlp", 64), ("mlp", 128), ("2c2d-32", 32), ("3c3d-128", 128))
QUICK_PROBLEMS = (("tiny-mlp", 6), ("tiny-conv", 6))

WITHOUT_TF32 = "float32, no TF32"
PRECISIONS = {"cuda": ("float64", "float32", WITHOUT_TF32), "cpu": ("float64", "float32")}
"""Plain float32 has TF32 where torch uses it unasked: in convolutions."""


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
    """Return a peer's measurements in their order."""
    return [
        Entry(problem, samples, precision, quantity)
        for problem, samples in (QUICK_PROBLEMS if quick else PROBLEMS)
        for precision in PRECISIONS[device]
        for quantity in QUANTITIES.get(peer, ("top10", "all"))
    ]


def recorded(entry: Entry, peer: str, outcome: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a measurement, or of why there is none."""
    return entry._asdict() | {"peer": peer} | outcome
