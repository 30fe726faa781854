"""The orthonormal basis of a block Krylov space, its next block, and its Ritz pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.products import FLOAT64_ROUNDING, BlockProduct, finite

ROWS_AT_ONCE = 4096
"""Of a basis that is compressed."""

BREAKDOWN_ROUNDINGS = 8.0
"""A vector of the next block that is shorter is replaced by a random one."""

EIGENVALUE_ROUNDING = 64 * FLOAT64_ROUNDING
"""Of the pairs of a small matrix and of their vectors, relative to the largest eigenvalue."""


class Basis(NamedTuple):
    """The first ``size`` columns are orthonormal; ``matrix`` is T of all but the last block."""

    vectors: Float[Tensor, "side m"]
    matrix: Float[Tensor, "m m"]  # on the host
    size: int
    seed: int  # of the next random vectors


class Ritz(NamedTuple):
    """All pairs of T, ascending, and the residuals of the k leading ones."""

    evals: Float[Tensor, " m"]
    evecs: Float[Tensor, "m m"]
    residuals: Float[Tensor, " k"]


def extended(
    product: BlockProduct, basis: Basis, block: Float[Tensor, "side b"], rounding: float
) -> tuple[Basis, Float[Tensor, "side b"], Float[Tensor, "b b"], float]:
    """Return the basis with a block more, the next block Q, S, and how much Q leaves out."""
    # The block joins the basis, and its product is written in it.
    first, size = basis.size, basis.size + block.shape[1]
    basis.vectors[:, first:size] = block
    basis = basis._replace(size=size)
    V, T = basis.vectors[:, :size], basis.matrix
    image = finite(product(block))
    columns = V.mT @ image
    image = image - V @ columns
    columns = columns.to(T.device)
    # The new columns of T, and its new rows.
    T[first:size, :size] = columns.mT
    T[:first, first:size] = columns[:first]
    T[first:size, first:size] = (columns[first:] + columns[first:].mT) / 2
    # What is left of the product is the next block.
    shortest = BREAKDOWN_ROUNDINGS * rounding * float(T[:size, :size].diagonal().max())
    following, basis = orthonormalized(basis, image, shortest)
    coupling = following.mT @ image
    left_out = float((image - following @ coupling).norm())
    return basis, following, coupling.to(T.device), left_out


def orthonormalized(
    basis: Basis, block: Float[Tensor, "side b"], shortest: float
) -> tuple[Float[Tensor, "side b"], Basis]:
    """Return an orthonormal block that spans, beside the basis, what this one does.

    Vectors of which no more than ``shortest`` is left make place for random ones.
    """
    V, seed = basis.vectors[:, : basis.size], basis.seed
    # Most often the block is orthogonal to the basis but for the rounding of what it was.
    frame, triangle = torch.linalg.qr(block)
    least = EIGENVALUE_ROUNDING * torch.linalg.vector_norm(block, dim=0)
    if bool((triangle.diagonal().abs() > least.clamp(min=shortest)).all()):
        return torch.linalg.qr(frame - V @ (V.mT @ frame))[0], basis
    # Otherwise it goes vector by vector.
    columns = block[:, :0]
    for column in block.unbind(1):
        vector = beside(V, columns, beside(V, columns, column))
        if not vector.norm() > max(shortest, EIGENVALUE_ROUNDING * float(column.norm())):
            # The space is exhausted, or there was nothing to begin with.
            generator = torch.Generator().manual_seed(seed)
            on_host = torch.empty(len(vector), dtype=vector.dtype, device="cpu")
            drawn = on_host.normal_(generator=generator)
            vector, seed = beside(V, columns, drawn.to(vector.device)), seed + 1
        vector = beside(V, columns, vector / vector.norm())
        columns = torch.cat((columns, (vector / vector.norm())[:, None]), 1)
    return columns, basis._replace(seed=seed)


def beside(
    V: Float[Tensor, "side m"], columns: Float[Tensor, "side c"], vector: Float[Tensor, " side"]
) -> Float[Tensor, " side"]:
    """Return the part of a vector that is orthogonal to orthonormal ones, of two matrices."""
    vector = vector - V @ (V.mT @ vector)
    return vector - columns @ (columns.mT @ vector)


def ritz_pairs(basis: Basis, coupling: Float[Tensor, "b b"], k: int) -> Ritz:
    """Return the pairs of T, and the residuals of the leading ones."""
    T = basis.matrix[: basis.size, : basis.size]
    evals, evecs = torch.linalg.eigh(T)
    residuals = torch.linalg.vector_norm(coupling @ evecs[-len(coupling) :, -k:], dim=0)
    return Ritz(evals, evecs, residuals)


def compressed(basis: Basis, ritz: Ritz, count: int) -> Basis:
    """Return the basis of the leading Ritz vectors, written over the one before."""
    weights = ritz.evecs[:, -count:].to(basis.vectors.device)
    for rows in basis.vectors.split(ROWS_AT_ONCE):
        rows[:, :count] = rows[:, : basis.size] @ weights
    basis.matrix.zero_()
    basis.matrix.diagonal()[:count] = ritz.evals[-count:]
    return basis._replace(size=count)
