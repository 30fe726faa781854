"""Random numbers that one seed determines, whatever is computed of them, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddnewton.criteria.loss import Uniform
from ddnewton.transforms import untransformed

LEAST_UNIFORM = 2.0**-54
"""Replaces a random number of 0, whose quantile may be infinite; `torch.rand`'s next is 2⁻⁵³."""

SEEDS = 2**63 - 1
"""Seeds are below it."""


class RowsOfBatch(NamedTuple):
    """Samples of a larger batch, one after the other, as their place in it, and its size."""

    first: int
    whole: int


def drawn_seed(generator: torch.Generator) -> int:
    """Draw a seed, also under ``vmap``: all members of an ensemble share it."""
    with untransformed():
        return int(torch.randint(SEEDS, (), generator=generator, device=generator.device))


def further_seed(first: int, number: int) -> int:
    """Return the seed of a batch of a data set, the first one for the first batch."""
    if number == 0:
        return first
    generator = torch.Generator("cpu").manual_seed(first)
    return int(torch.randint(SEEDS, (number,), generator=generator, device="cpu")[-1])


def uniform_from(seed: int, device: torch.device, rows: RowsOfBatch | None = None) -> Uniform:
    """Return a source of random numbers that the seed determines, on every device alike.

    Those of some ``rows`` of a batch, which are on the first axis, are what all of it draws there.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(shape: Sequence[int]) -> Tensor:
        n, *axes = shape
        first, whole = (0, n) if rows is None else rows
        with untransformed():
            numbers = torch.rand(
                (whole, *axes), generator=generator, dtype=torch.float64, device="cpu"
            )
        drawn = numbers[first : first + n].clamp(min=LEAST_UNIFORM)
        # From pinned memory to a GPU, so that nothing waits for the copy.
        on_gpu = device.type == "cuda"
        return (drawn.pin_memory() if on_gpu else drawn).to(device, non_blocking=on_gpu)

    return uniform
