"""Columns of the Jacobian, layer by layer: dense, or as sums of outer products Σ_t b_t ⊗ a_t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

from ddnewton.columns.asked_of_ranks import ColumnsOfRanks
from ddnewton.columns.large_products import product_by_sample
from ddnewton.devices import has_fast_float64

INTERMEDIATE_BYTES, INTERMEDIATE_BYTES_ON_GPUS = 2**25, 2**29
"""How large an intermediate may be: a few of them at once stay in a processor's cache, while a GPU
waits for the next of many small ones."""

WRITTEN_ENTRIES, WRITTEN_PRODUCTS = 2**19, 2**25
"""Up to how many entries columns are kept dense, and of how many multiplications of their inner
products: so many take a few milliseconds."""


class Outer(NamedTuple):
    """Columns of some samples as outer products.

    Integers [n 1 t] in place of ``a`` stand for rows of zeros with a single one: each is the place
    of that one in its row, or −1 where there is none.
    """

    a: Num[Tensor, "n g t ..."]
    b: Float[Tensor, "n m g o t"]
    widths: tuple[int, ...]  # of the pieces, a weight and its bias, that make up axis p


class Stack(NamedTuple):
    """Columns of every sample, some after the others, each part with positions of its own.

    A column of one position of the outputs reaches few positions of a layer, in a causal net none
    behind it. All parts have the same groups, outputs and widths.
    """

    parts: tuple[Outer, ...]


Factor: TypeAlias = Tensor | Outer | Stack
"""Columns of some samples along some parameters: dense [n·m, d], or as outer products."""


class Jacobian(NamedTuple):
    """The columns of a batch, computed chunk by chunk, as factors that stand side by side.

    ``visit`` returns the factors of a chunk of samples. ``pieces`` says for every factor from which
    leaves its pieces are, and how many entries of the leaf each has. ``order`` is the place of
    every parameter among the entries of all factors, one past the last for a parameter that is in
    none; None if the parameters follow each other as they are. Where several processes hold the
    samples, none of this is known here, and ``of_ranks`` is asked instead.
    """

    visit: Callable[[slice], Sequence[Factor]]
    chunks: Sequence[slice]
    samples: int
    columns: int  # of one sample: m
    sizes: Sequence[int]  # of the leaves
    pieces: Sequence[Sequence[tuple[int, int]]]
    order: Int[Tensor, " d"] | None
    device: torch.device
    eps: float  # the rounding of a column
    sums: float  # the rounding of sums of products of columns, 0 for that of float64
    scale: Float[Tensor, " d"] | None = None  # the columns are S A, with S = diag(scale)
    of_ranks: ColumnsOfRanks | None = None


def written_out(jacobian: Jacobian, factors: Sequence[Factor], whole: int = 0) -> Jacobian:
    """Return a Jacobian with these factors, all in one chunk, as dense columns where they are few.

    Products of small matrices take less time than finding out how to leave them out. All pieces are
    of one factor. Where the samples are a part of a batch, its ``whole`` number of them counts.
    """
    count = max(jacobian.samples, whole) * jacobian.columns
    d = sum(map(entry_count, factors))
    if count * d > WRITTEN_ENTRIES or count * d * min(count, d) > WRITTEN_PRODUCTS:
        return jacobian
    columns = torch.cat([piece for factor in factors for piece in dense_pieces(factor)], 1)
    pieces = [piece for of_factor in jacobian.pieces for piece in of_factor]
    return jacobian._replace(visit=lambda _: [columns], pieces=[pieces])


def entry_count(factor: Factor) -> int:
    """Return the number of parameters along which the columns are."""
    if isinstance(factor, Stack):
        return entry_count(factor.parts[0])
    if not isinstance(factor, Outer):
        return factor.shape[1]
    return math.prod(factor.b.shape[2:4]) * sum(factor.widths)


def for_exact_sums(factor: Factor) -> Factor:
    """Return columns for products that are summed in float64: in it, where it is fast."""
    if not has_fast_float64(device_of(factor)):  # where products of narrow ones are exact
        return factor
    if isinstance(factor, Stack):
        parts = map(for_exact_sums, factor.parts)
        return Stack(tuple(part for part in parts if isinstance(part, Outer)))
    if not isinstance(factor, Outer):
        return factor.double()
    return factor._replace(
        a=factor.a.double() if factor.a.is_floating_point() else factor.a, b=factor.b.double()
    )


def device_of(factor: Factor) -> torch.device:
    """Return where columns are."""
    if isinstance(factor, Stack):
        return factor.parts[0].b.device
    return factor.b.device if isinstance(factor, Outer) else factor.device


def pieces(factor: Factor, wanted: Sequence[bool], sizes: Sequence[int]) -> Factor | None:
    """Return a factor cut to the wanted ones of its pieces, None if it has none of them."""
    if all(wanted):
        return factor
    if not any(wanted):
        return None
    # All parts of a stack alike; of outer products, the entries of a.
    if isinstance(factor, Stack):
        cut_parts = (pieces(part, wanted, sizes) for part in factor.parts)
        return Stack(tuple(part for part in cut_parts if isinstance(part, Outer)))
    if not isinstance(factor, Outer):
        parts = zip(factor.split(list(sizes), 1), wanted, strict=True)
        return torch.cat([part for part, keep in parts if keep], 1)
    widths = tuple(width for width, keep in zip(factor.widths, wanted, strict=True) if keep)
    parts = zip(factor.a.split(factor.widths, -1), wanted, strict=True)
    return Outer(torch.cat([part for part, keep in parts if keep], -1), factor.b, widths)


def of_samples(factor: Factor, samples: slice, m: int) -> Factor:
    """Return the factor of some of its samples, of m columns each, without a copy."""
    if isinstance(factor, Stack):
        return Stack(
            tuple(part._replace(a=part.a[samples], b=part.b[samples]) for part in factor.parts)
        )
    if isinstance(factor, Outer):
        return factor._replace(a=factor.a[samples], b=factor.b[samples])
    return factor[samples.start * m : samples.stop * m]


def of_columns(factor: Factor, columns: slice, m: int) -> Factor:
    """Return the factor of some of every sample's m columns; of a stack, those of one part."""
    if isinstance(factor, Stack):
        stops = accumulate(part.b.shape[1] for part in factor.parts)
        return factor.parts[list(stops).index(columns.stop)]
    if isinstance(factor, Outer):
        return factor._replace(b=factor.b[:, columns])
    rows: Tensor = factor.unflatten(0, (-1, m))[:, columns].flatten(0, 1)
    return rows


def without_zeros(outer: Outer) -> Outer:
    """Return columns without the positions at which all their b are zero."""
    t = outer.b.shape[4]
    kept = outer.b.ne(0).flatten(0, 3).any(0).nonzero()[:, 0]
    if len(kept) == t:
        return outer
    if len(kept) == 0:
        kept = kept.new_zeros(1)
    # Positions that follow each other are a view of a, which all parts of a stack then share.
    first, last = int(kept[0]), int(kept[-1])
    if len(kept) == last - first + 1:
        span = slice(first, last + 1)
        return outer._replace(a=outer.a[:, :, span], b=outer.b[..., span].contiguous())
    return outer._replace(a=outer.a[:, :, kept], b=outer.b[..., kept])


def dense_columns(factor: Factor) -> Float[Tensor, "nm _"]:
    """Return columns as the rows of a matrix, outer products summed over positions."""
    return factor if isinstance(factor, Tensor) else torch.cat(dense_pieces(factor), 1)


def dense_pieces(factor: Factor) -> list[Float[Tensor, "nm _"]]:
    """Return columns as rows along every piece, to be put beside those of other factors."""
    if isinstance(factor, Tensor):
        return [factor]
    if isinstance(factor, Stack):
        n, by_part = len(factor.parts[0].b), map(dense_pieces, factor.parts)
        return [
            torch.cat([part.unflatten(0, (n, -1)) for part in piece], 1).flatten(0, 1)
            for piece in zip(*by_part, strict=True)
        ]
    columns = formed(factor.b, rows_of(factor))
    return [part.flatten(2).flatten(0, 1) for part in columns.split(factor.widths, -1)]


def formed(
    b: Float[Tensor, "n m g o t"], a: Float[Tensor, "n g t p"]
) -> Float[Tensor, "n m g o p"]:
    """Return Σ_t b_t ⊗ a_t; a single position takes no sum, and no small products."""
    if a.shape[2] == 1:
        return b * a[:, None]
    if b.shape[1] == 1:
        return (b[:, 0] @ a)[:, None]
    if b.shape[2] == 1:
        columns: Tensor = product_by_sample(b.flatten(1, 3), a[:, 0]).unflatten(1, b.shape[1:4])
        return columns
    return torch.einsum("nmgot,ngtp->nmgop", b, a)


def in_order(
    entries: Float[Tensor, "*rows _"], order: Int[Tensor, " d"] | None
) -> Float[Tensor, "*rows d"]:
    """Return the entries of all factors in the order of the parameters, 0 for those in none."""
    if order is None:
        return entries
    return (entries if len(order) == entries.shape[-1] else F.pad(entries, (0, 1)))[..., order]


def from_order(
    vectors: Float[Tensor, "*rows d"], order: Int[Tensor, " d"] | None, count: int
) -> Float[Tensor, "*rows _"]:
    """Return vectors over parameters as over the factors' entries: the transpose of `in_order`."""
    if order is None:
        return vectors
    entries: Tensor = vectors.new_zeros((*vectors.shape[:-1], count + 1))
    return entries.index_add(-1, order, vectors)[..., :-1]


def single_position(outer: Outer) -> bool:
    """Return whether every column is one outer product: a single position, and one group."""
    _, _, g, _, t = outer.b.shape
    return g == t == 1 and outer.a.is_floating_point()


def entries_at_once(rows: Tensor) -> int:
    """Return the number of entries which, taken of all rows, fit into an intermediate."""
    if torch.compiler.is_compiling():  # all of them, whatever the number of rows
        return rows.shape[1]
    return max(1, intermediate_bytes(rows) // (2 * rows.shape[0]))


def intermediate_bytes(tensor: Tensor) -> int:
    """Return how large an intermediate may be where a tensor is."""
    return INTERMEDIATE_BYTES_ON_GPUS if tensor.is_cuda else INTERMEDIATE_BYTES


def rows_of(outer: Outer) -> Float[Tensor, "n g t p"]:
    """Return a, with the ones written out where it is given by their places."""
    if outer.a.is_floating_point():
        return outer.a
    numbers = torch.arange(sum(outer.widths), device=outer.a.device)
    return (outer.a[..., None] == numbers).to(outer.b.dtype)
