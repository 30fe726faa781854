"""Of how many samples the graphs are kept between products with a Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from jaxtyping import Int
from torch import Tensor

from ddnewton.inputs.memory import CHUNK_BYTES
from ddnewton.linearize.first_products import MEASURED_SAMPLES
from ddnewton.linearize.jacobian_products import graph_bytes

OfSamples: TypeAlias = Callable[[Sequence[Tensor], Int[Tensor, " n"] | slice], Tensor]
"""The outputs of some samples, as a function of leaves and indices."""

KEPT_BYTES = 2**29
"""Up to how many bytes the graphs of all samples are kept between products; where they are more,
those of a chunk are made anew for every product."""

GRAPHS = 3
"""How many times the results of a model the graphs take: its own, and that of its pullback."""


def of_leaves(
    function: OfSamples, samples: Int[Tensor, " n"] | slice, leaves: Sequence[Tensor]
) -> Tensor:
    """Call a function of leaves and samples with the samples first, to be bound."""
    return function(leaves, samples)


def samples_of_graphs(
    function: OfSamples, leaves: Sequence[Tensor], n: int, chunk_size: int | None
) -> int:
    """Return for how many samples graphs are made at once: all, where they are kept."""
    if chunk_size is not None:
        return min(n, chunk_size)

    # Mostly a graph of few samples shows that. It has copies of the parameters, which are as large
    # for any number of them, so that otherwise what counts is how much a sample adds.
    def bytes_of(count: int) -> int:
        return GRAPHS * graph_bytes(partial(of_leaves, function, slice(0, count)), leaves)

    first = max(1, min(n // 2, MEASURED_SAMPLES))
    first_bytes = bytes_of(first)
    if n * first_bytes <= first * KEPT_BYTES:
        return n
    size = max(0, bytes_of(2 * first) - first_bytes if n > 1 else first_bytes) // first + 1
    return n if n * size <= KEPT_BYTES else max(1, min(n, CHUNK_BYTES // size))
