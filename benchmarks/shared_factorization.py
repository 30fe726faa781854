"""Time and bytes of a factorization by several ranks, on paper, and how fast these are."""

from __future__ import annotations

from typing import NamedTuple

from ddnewton.distributed.shared_factor import PANEL, panel_starts
from ddnewton.quadratic.cholesky import SHARED_SIDE

GIB = 2**30


class Speeds(NamedTuple):
    """What a rank does in a second; and what a message costs, and how many bytes a link carries."""

    flops: float
    factorization: float  # flops, in float64
    link: float = 1e9
    message: float = 1e-4
    memory: float = 16 * GIB
    shared_side: int = SHARED_SIDE  # of a matrix that all factorize


def panel_bytes(side: int, p: int, shared_side: int) -> dict[str, float]:
    """Return what ranks send that factorize a matrix together: its panels, and those of the factor.

    A panel of the matrix goes from the leader to the rank that has it, if that is another; one of
    the factor is told to all.
    """
    if side < shared_side:
        return {}
    sizes = [8 * (side - start) * min(PANEL, side - start) for start in panel_starts(side)]
    passed = sum(size for number, size in enumerate(sizes) if number % p)
    return {"panels": float(sum(sizes) + passed)}


def factorization_seconds(side: int, p: int, speeds: Speeds) -> float:
    """Return the time of a factorization, by all ranks or, of a small matrix, by one."""
    flops = side**3 / 3
    if p == 1 or side < speeds.shared_side:
        return flops / speeds.factorization
    passed = panel_bytes(side, p, speeds.shared_side)["panels"] / speeds.link
    return flops / p / speeds.factorization + passed + side / PANEL * speeds.message
