"""Products AᵀB of all columns with all others, written tile by tile into one matrix a block.

The matrix of a few thousand columns is what a step takes of memory, so that there is one of it: a
tile, some samples on either side, is multiplied and written to its place, and of a set of columns
with itself to the transposed place too. Chunks are for the memory of a visit, tiles for that of
products: they are parts of chunks, of which nothing is computed anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.alignment import Leaves, Pairing, paired
from ddnewton.columns.contraction import inner
from ddnewton.columns.factors import Factor, Jacobian, Stack, of_columns, of_samples
from ddnewton.columns.units import in_units
from ddnewton.transforms import is_batched, summed
from ddnewton.trees import chunks

TILE_COLUMNS, TILES_A_SIDE = 2048, 8
"""How many columns a tile has at least, 32 MiB of products, and how many make up a side."""


class Tile(NamedTuple):
    """The products of some samples' columns with those of others, along a block."""

    products: Float[Tensor, "n m n2 m2"]
    block: int  # its number
    left: slice | Tensor
    right: slice | Tensor
    on_diagonal: bool  # of a symmetric matrix of which only the upper tiles are made


class Grid(NamedTuple):
    """Where the columns of Jacobians start in a matrix: along its rows, and along its columns."""

    rows: Sequence[int]
    columns: Sequence[int]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.rows[-1], self.columns[-1]


def side_by_side(
    rows: Sequence[Jacobian], columns: Sequence[Jacobian], blocks: Sequence[Leaves]
) -> list[Float[Tensor, "a i"]]:
    """Return AᵀB for every block, where A and B are the columns of several Jacobians."""
    grid = Grid(_starts(rows), _starts(columns))
    matrices: list[Tensor | None] = [None for _ in blocks]
    for r, left in enumerate(rows):
        for c, right in enumerate(columns):
            # Of two that both sides have, one product is the transpose of the other.
            mirrored = r < len(columns) and c < len(rows)
            mirrored = mirrored and left is columns[r] and right is rows[c]
            if mirrored and c < r:
                continue
            of_pair = left.of_ranks.tiles if left.of_ranks else partial(tiles_of, left)
            for tile in of_pair(right, blocks, symmetric=mirrored and r == c):
                written = partial(_written, shape=grid.shape)
                places = [(left, tile.left, grid.rows[r]), (right, tile.right, grid.columns[c])]
                matrix = written(matrices[tile.block], tile.products, places)
                if mirrored and not tile.on_diagonal:
                    places = [(right, tile.right, grid.rows[c]), (left, tile.left, grid.columns[r])]
                    matrix = written(matrix, tile.products.permute(2, 3, 0, 1), places)
                matrices[tile.block] = matrix
    return [matrix for matrix in matrices if matrix is not None]


def products(
    left: Jacobian, right: Jacobian, blocks: Sequence[Leaves]
) -> list[Float[Tensor, "i j"]]:
    """Return AᵀB for every block; for A = B half of it is computed, and mirrored."""
    return side_by_side([left], [right], blocks)


def _starts(jacobians: Sequence[Jacobian]) -> list[int]:
    """Return where the columns of every Jacobian start, and how many all of them have."""
    counts = (jacobian.samples * jacobian.columns for jacobian in jacobians)
    return list(accumulate(counts, initial=0))


def _written(
    matrix: Float[Tensor, "a i"] | None,
    products: Float[Tensor, "n m n2 m2"],
    places: Sequence[tuple[Jacobian, slice | Tensor, int]],
    shape: tuple[int, int],
) -> Float[Tensor, "a i"]:
    """Return a matrix with products in their places, which count columns as everywhere else.

    A place is that of some samples of a Jacobian, whose columns start at a number.
    """
    by_column = products.permute(1, 0, 3, 2)
    if matrix is None:
        if by_column.shape[0] * by_column.shape[1] == shape[0] and (
            by_column.shape[2] * by_column.shape[3] == shape[1]
        ):
            return by_column.flatten(0, 1).flatten(1, 2)
        matrix = products.new_empty(shape)
    elif is_batched(products):
        matrix = matrix + products.new_zeros(())  # mapped as they are
    place = matrix
    for axis, (jacobian, _, start) in zip((0, 2), places, strict=True):
        count = jacobian.samples * jacobian.columns
        place = place.narrow(axis, start, count).unflatten(axis, (jacobian.columns, -1))
    # Samples that follow each other are a view, others are written one by one.
    rows, columns = (samples for _, samples, _ in places)
    if isinstance(rows, slice) and isinstance(columns, slice):
        place[:, rows, :, columns] = by_column
    else:
        row_numbers = torch.arange(place.shape[1], device=place.device)[rows]
        column_numbers = torch.arange(place.shape[3], device=place.device)[columns]
        place[:, row_numbers[:, None], :, column_numbers] = by_column.permute(1, 3, 0, 2)
    return matrix


def tiles_of(
    left: Jacobian, right: Jacobian, blocks: Sequence[Leaves], *, symmetric: bool
) -> Iterator[Tile]:
    """Yield the tiles of a product; of a symmetric one those on the diagonal and above."""
    left = in_units(left)
    right = left if symmetric else in_units(right)
    pairings = [paired(left, right, block) for block in blocks]
    # Visit all pairs of chunks, and cut each into tiles.
    for i, left_chunk in enumerate(left.chunks):
        left_factors = left.visit(left_chunk)
        for j, right_chunk in enumerate(right.chunks):
            if symmetric and j < i:
                continue
            diagonal = symmetric and i == j
            right_factors = left_factors if diagonal else right.visit(right_chunk)
            left_parts = _parts(left, left_chunk, left_factors)
            right_parts = left_parts if diagonal else _parts(right, right_chunk, right_factors)
            # Multiply every pair of parts, along every block.
            for a, (left_samples, x) in enumerate(left_parts):
                for b, (right_samples, y) in enumerate(right_parts):
                    if diagonal and b < a:
                        continue
                    for number, pairs_of in enumerate(pairings):
                        shape = [
                            *(left_samples.stop - left_samples.start, left.columns),
                            *(right_samples.stop - right_samples.start, right.columns),
                        ]
                        tile = _products(pairs_of, x, y, shape, left.device)
                        yield Tile(tile, number, left_samples, right_samples, diagonal and a == b)


def _products(
    pairs_of: Pairing,
    left: Sequence[Factor],
    right: Sequence[Factor],
    shape: Sequence[int],
    device: torch.device,
) -> Float[Tensor, "n m n2 m2"]:
    """Return the products of two sets of factors along a block."""
    pairs = pairs_of(left, right)
    if not pairs:  # a block that the model makes no use of
        return torch.zeros(shape, dtype=torch.float64, device=device)
    m, m2 = shape[1], shape[3]
    rows, columns = _stacked([x for x, _ in pairs], m), _stacked([y for _, y in pairs], m2)
    if len(rows) == len(columns) == 1:
        return reduce(summed, (inner(x, y, (m, m2)) for x, y in pairs))
    # Part by part of stacked columns, which take no more than their place in the matrix.
    products = torch.empty(shape, dtype=torch.float64, device=device)
    symmetric = left is right
    for r, row in enumerate(rows):
        left_parts = [of_columns(x, row, m) for x, _ in pairs]
        for c, column in enumerate(columns):
            if symmetric and c < r:
                continue
            diagonal = symmetric and c == r
            right_parts = left_parts if diagonal else [of_columns(y, column, m2) for _, y in pairs]
            counts = (row.stop - row.start, column.stop - column.start)
            parts = zip(left_parts, right_parts, strict=True)
            part = reduce(summed, (inner(x, y, counts) for x, y in parts))
            products[:, row, :, column] = part
            if symmetric and not diagonal:
                products[:, column, :, row] = part.permute(2, 3, 0, 1)
    return products


def _stacked(factors: Sequence[Factor], m: int) -> list[slice]:
    """Return the columns of the parts of factors that are stacked; all m where none is."""
    for factor in factors:
        if isinstance(factor, Stack):
            stops = accumulate((part.b.shape[1] for part in factor.parts), initial=0)
            return [slice(start, stop) for start, stop in pairwise(stops)]
    return [slice(0, m)]


def _parts(
    jacobian: Jacobian, chunk: slice, factors: Sequence[Factor]
) -> list[tuple[slice, Sequence[Factor]]]:
    """Return the factors of a chunk cut into those of tiles, with the samples of each."""
    if torch.compiler.is_compiling():  # one graph for any number of samples
        return [(chunk, factors)]
    m, n = jacobian.columns, chunk.stop - chunk.start
    columns = max(TILE_COLUMNS, -(-jacobian.samples * m // TILES_A_SIDE))
    parts = chunks(n, max(1, columns // max(1, m)))
    if len(parts) == 1:
        return [(chunk, factors)]
    return [
        (
            slice(chunk.start + part.start, chunk.start + part.stop),
            [of_samples(factor, part, m) for factor in factors],
        )
        for part in parts
    ]
