"""Random numbers that one seed determines, whatever is computed of them, and how often."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddnewton.criteria.loss import Uniform
from ddnewton.transforms import untransformed

LEAST_UNIFORM = 2.0**-54
"""Replaces a random number of 0, whose quantile may be infinite; `torch.rand`'s next is 2⁻⁵³."""

SEEDS = 2**63 - 1
"""Seeds are below it."""


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


def uniform_from(seed: int, device: torch.device) -> Uniform:
    """Return a source of random numbers that the seed determines, on every device alike."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(shape: Sequence[int]) -> Tensor:
        with untransformed():
            numbers = torch.rand(
                tuple(shape), generator=generator, dtype=torch.float64, device="cpu"
            )
        return numbers.clamp(min=LEAST_UNIFORM).to(device)

    return uniform
