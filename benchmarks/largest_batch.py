"""The largest batch whose step fits in a given memory: guessed from smaller ones, then run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

LIMIT = 4 * 2**30
TRIES = 4
STARTS = {
    ("2c2d-128", "ddnewton"): (16, 32, 64),
    ("2c2d-128", "vivit"): (6, 12, 18),
    ("3c3d-128", "ddnewton"): (16, 32, 64),
    ("3c3d-128", "vivit"): (8, 16, 32),
    ("allcnnc", "ddnewton"): (2, 4, 8),
    ("allcnnc", "vivit"): (1, 2, 3),
}
"""Which problems and peers, and the batches to begin with."""

Measure = Callable[[str, str, int], dict[str, Any]]


def crossing(points: list[tuple[int, float]]) -> int:
    """Return the N at which the parabola through the last three peaks meets the limit."""
    last, peak = max(points[-3:])
    line = int(last * LIMIT / peak)  # straight, through zero
    if len(points) < 3:
        return line
    N = torch.tensor([[n**2, n, 1.0] for n, _ in points[-3:]], dtype=torch.float64)
    peaks = torch.tensor([peak / LIMIT for _, peak in points[-3:]], dtype=torch.float64)
    a, b, c = torch.linalg.solve(N, peaks).tolist()
    root = b * b - 4 * a * (c - 1)
    if a > 0 and root > 0:
        return int((-b + math.sqrt(root)) / (2 * a))
    return line


def largest(
    measure: Measure, problem: str, peer: str, starts: tuple[int, ...], tries: int = TRIES
) -> dict[str, Any]:
    """Return the largest N that was run within the limit, with its peak and its time.

    It is looked for from the ``starts`` on, in so many more tries; ``meets`` is the N at which the
    peaks that were seen would meet the limit.
    """
    result = {"problem": problem, "peer": peer, "samples": 0, "peak": None, "seconds": None}
    tried: list[tuple[int, float]] = []
    pending, too_large, note = list(starts), math.inf, ""
    for _ in range(len(starts) + tries):
        N = pending.pop(0) if pending else min(crossing(tried), too_large - 1)
        if result["samples"] >= N:
            break
        # Half of the way back after a failure; else on to where the peaks meet the limit.
        record = measure(problem, peer, N)
        if record["status"] != "ok":
            too_large, note = N, f"N = {N}: {record['status']}"
            pending = [(result["samples"] + N) // 2]
            continue
        tried.append((N, record["peak"]))
        if record["peak"] <= LIMIT:
            result |= {"samples": N, "peak": record["peak"], "seconds": record["seconds"]}
            if record["peak"] > 0.95 * LIMIT:
                break
        else:
            too_large, pending = N, []
            note = f"N = {N} takes {record['peak'] / 2**30:.2f} GiB"
    return result | {"note": note, "meets": crossing(tried) if tried else None}
