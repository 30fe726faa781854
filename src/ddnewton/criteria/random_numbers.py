"""Random numbers that one seed determines, whatever is computed of them, and how often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.loss import Uniform
from ddnewton.transforms import untransformed

LEAST_UNIFORM = 2.0**-54
"""Replaces a random number of 0, whose quantile may be infinite; `torch.rand`'s next is 2⁻⁵³."""

SEEDS = 2**63 - 1
"""Seeds are below it."""


Seed: TypeAlias = int | Tensor
"""A number, or a tensor on the CPU that holds it, for a graph that is not made anew for another."""


class RowsOfBatch(NamedTuple):
    """Samples of a larger batch, one after the other, as their place in it, and its size."""

    first: int
    whole: int


def drawn_seed(generator: torch.Generator) -> int:
    """Draw a seed, also under ``vmap``: all members of an ensemble share it."""
    with untransformed():
        return int(torch.randint(SEEDS, (), generator=generator, device=generator.device))


def further_seed(first: Seed, number: int) -> Seed:
    """Return the seed of a batch of a data set, the first one for the first batch."""
    if number == 0:
        return first
    generator = torch.Generator("cpu").manual_seed(int(first))
    return int(torch.randint(SEEDS, (number,), generator=generator, device="cpu")[-1])


def uniform_from(seed: Seed, device: torch.device, rows: RowsOfBatch | None = None) -> Uniform:
    """Return a source of random numbers that the seed determines, on every device alike.

    Those of some ``rows`` of a batch, which are on the first axis, are what all of it draws there.
    """
    drawn = 0

    def uniform(shape: Sequence[int]) -> Tensor:
        nonlocal drawn
        # One sequence of numbers, of which those drawn before, and of earlier rows, are not these.
        n, *axes = shape
        first, whole = (0, n) if rows is None else rows
        skipped, drawn = drawn + first * math.prod(axes), drawn + whole * math.prod(axes)
        if isinstance(seed, Tensor):
            of_graph: Tensor = numbers_of_graph(seed, skipped, shape, device)
            return of_graph
        with untransformed():
            return uniform_numbers(seed, skipped, shape, device)

    return uniform


def uniform_numbers(
    seed: Seed, skipped: int, shape: Sequence[int], device: torch.device
) -> Float[Tensor, "..."]:
    """Return the numbers of a seed behind some that are skipped."""
    generator, count = torch.Generator("cpu").manual_seed(int(seed)), math.prod(shape)
    numbers = torch.rand(skipped + count, generator=generator, dtype=torch.float64, device="cpu")
    drawn = numbers[skipped:].reshape(tuple(shape)).clamp(min=LEAST_UNIFORM)
    # From pinned memory to a GPU, so that nothing waits for the copy.
    on_gpu = device.type == "cuda"
    return (drawn.pin_memory() if on_gpu else drawn).to(device, non_blocking=on_gpu)


numbers_of_graph = torch.library.custom_op(
    "ddnewton::uniform_numbers",
    uniform_numbers,
    mutates_args=(),
    schema="(Tensor seed, SymInt skipped, SymInt[] shape, Device device) -> Tensor",
    tags=[torch.Tag.cudagraph_unsafe],
)
"""`uniform_numbers` as one operation of a graph, with the seed as an input: no other has a graph of
its own. They come from the host, which no CUDA graph does by itself."""


@numbers_of_graph.register_fake
def _without_values(
    seed: Tensor, skipped: int, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Return a tensor like the numbers."""
    return torch.empty(tuple(shape), dtype=torch.float64, device=device)
