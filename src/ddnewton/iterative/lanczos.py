r"""The leading eigenpairs of G by a block Lanczos method with thick restarts.

The basis V of a block Krylov space is kept orthonormal by full reorthogonalisation, so that

    G V = V T + Q S Eᵀ,        T = VᵀG V,        E = the last columns of the identity,

with the next block Q. A pair T w = λ w gives the Ritz vector u = V w with the residual

    ‖G u − λ u‖ = ‖S Eᵀw‖.

A full basis is compressed to its leading Ritz vectors, and Q, taken before, is what goes on.
(Golub, Underwood, "The block Lanczos method for computing eigenvalues", 1977; Wu, Simon, "Thick-
restart Lanczos method for large symmetric eigenvalue problems", 2000.)

A Krylov space of b vectors holds an eigenvalue b times at most. Converged pairs are therefore put
to a test: with a random block orthogonal to them the basis is filled once more, and if that moves
an eigenvalue, there was one missing, and the iteration goes on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.products import FLOAT64_ROUNDING, BlockProduct, finite

WHOLE_SPACE = 64
"""Up to this size, and from a third of it in eigenpairs on, the matrix itself is made."""

ROWS_AT_ONCE = 4096
"""Of a basis that is compressed."""

BREAKDOWN_ROUNDINGS = 8.0
"""A vector of the next block that is shorter is replaced by a random one."""

EIGENVALUE_ROUNDING = 32 * FLOAT64_ROUNDING
"""Of the pairs of a small matrix and of their vectors, relative to the largest eigenvalue."""


class Eigenpairs(NamedTuple):
    """Leading eigenpairs, ascending; ``residuals`` are ‖G u − λ u‖, rounding included."""

    evals: Float[Tensor, " k"]
    vectors: Float[Tensor, "side k"]
    residuals: Float[Tensor, " k"]
    products: int
    converged: bool


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


def leading_eigenpairs(
    product: BlockProduct,
    side: int,
    k: int,
    *,
    tol: float,
    limit: int,
    start: Float[Tensor, "side b"],
    rounding: float = 0.0,
    memory: float | None = None,
) -> Eigenpairs:
    """Return the k ≥ 1 leading eigenpairs of G, or all where there are fewer.

    ``product`` is V ↦ G V for some columns at once. ``tol`` is that of the residuals, relative to
    the largest eigenvalue; an eigenvalue is then off by that at most. ``limit`` counts products
    with single vectors (as many as give k vectors are made in any case), ``memory`` the bytes of
    the basis. The same ``start`` gives the same pairs. ``rounding`` is that of a product relative
    to ‖G‖ ‖v‖.

    Source: Golub, Underwood, 1977, section 3; Wu, Simon, 2000, section 2.

    Raises
    ------
    NotFinite
        A product has nan or inf.

    >>> G = torch.arange(100, dtype=torch.float64).diag()
    >>> start = torch.randn(100, 2, dtype=torch.float64)
    >>> leading_eigenpairs(lambda V: G @ V, 100, 3, tol=1e-8, limit=900, start=start).evals
    tensor([97., 98., 99.], dtype=torch.float64)
    """
    rounding, b, k = max(rounding, FLOAT64_ROUNDING), start.shape[1], min(k, side)
    # The size of the basis: there must be room for two blocks beside the pairs.
    capacity = max(2 * k + 10, k + 20)
    if memory is not None:
        capacity = min(capacity, int(memory / (8 * max(side, 1))))
    capacity = max(capacity, k + 2 * b)
    if side <= max(WHOLE_SPACE, 3 * k, capacity + b):
        return of_whole_space(product, side, k, start, rounding)
    return restarted(product, k, (tol, limit, capacity), start, rounding)


def of_whole_space(
    product: BlockProduct, side: int, k: int, start: Float[Tensor, "side b"], rounding: float
) -> Eigenpairs:
    """Return the leading eigenpairs by a product with every column of the identity."""
    identity = torch.eye(side, dtype=start.dtype, device=start.device)
    columns = [finite(product(block)) for block in identity.split(start.shape[1], dim=1)]
    matrix = torch.cat(columns, 1) if columns else identity
    evals, evecs = torch.linalg.eigh((matrix + matrix.mT) / 2)
    # Of all pairs the last k, with what the products say of them.
    first = side - k
    evals, vectors = evals[first:].clamp(min=0), evecs[:, first:].clone()
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * evals, dim=0)
    residuals = residuals + (rounding + EIGENVALUE_ROUNDING) * evals[-1]
    return Eigenpairs(evals, vectors, residuals, side, converged=True)


def restarted(
    product: BlockProduct,
    k: int,
    limits: tuple[float, int, int],
    start: Float[Tensor, "side b"],
    rounding: float,
) -> Eigenpairs:
    """Return the leading eigenpairs by the Lanczos method with a basis of bounded size."""
    (tol, limit, capacity), (side, b) = limits, start.shape
    # Columns that lie one behind the other: a block of them is one piece of memory.
    vectors = start.new_zeros(capacity, side).mT
    basis = Basis(vectors, torch.zeros(capacity, capacity, dtype=start.dtype), 0, 0)
    block, basis = orthonormalized(basis, start, 0.0)
    products, passed, dropped = 0, False, 0.0
    tested: Tensor | None = None
    while not passed and (products + b <= limit or basis.size < k):
        # One more block, and the Ritz pairs of the basis with it.
        basis, block, coupling, left_out = extended(product, basis, block, rounding)
        products, dropped = products + b, math.hypot(dropped, left_out)
        ritz = ritz_pairs(basis, coupling, k)
        goal = max(tol / 4, rounding) * float(ritz.evals[-1])
        accurate = basis.size >= k and bool((ritz.residuals <= goal).all())
        if accurate and tested is None:
            # The pairs have converged. Put them to the test: go on from random vectors.
            tested = ritz.evals[-k:]
            dropped = math.hypot(dropped, float(ritz.residuals.norm()))
            basis = compressed(basis, ritz, k)
            block, basis = orthonormalized(basis, torch.zeros_like(block), 0.0)
        elif basis.size + b > capacity:
            # The basis is full. A test is passed that moves no eigenvalue.
            passed = (
                tested is not None
                and accurate
                and bool((ritz.evals[-k:] - tested <= 4 * goal).all())
            )
            basis = compressed(basis, ritz, k if passed else restart_size(k, b, capacity))
            tested = None
    # Where the limit came first, the basis is as large as it happens to be.
    if not passed:
        basis = compressed(basis, ritz, k)
    evals = ritz.evals[-k:]
    residuals = ritz.residuals + dropped + (rounding + EIGENVALUE_ROUNDING) * evals[-1]
    passed = passed and bool((residuals <= tol * evals[-1]).all())
    device = start.device
    kept = basis.vectors[:, :k]
    return Eigenpairs(
        evals.clamp(min=0).to(device), kept.clone(), residuals.to(device), products, passed
    )


def restart_size(k: int, b: int, capacity: int) -> int:
    """Return the number of Ritz vectors that are kept of a full basis."""
    return min(k + (capacity - k) // 3, capacity - 2 * b)


def extended(
    product: BlockProduct, basis: Basis, block: Float[Tensor, "side b"], rounding: float
) -> tuple[Basis, Float[Tensor, "side b"], Float[Tensor, "b b"], float]:
    """Return the basis with a block more, the next block Q, S, and how much Q leaves out."""
    # The block joins the basis, and its product is written in it, twice for all digits.
    first, size = basis.size, basis.size + block.shape[1]
    basis.vectors[:, first:size] = block
    basis = basis._replace(size=size)
    V, T = basis.vectors[:, :size], basis.matrix
    image = finite(product(block))
    columns = V.mT @ image
    image = image - V @ columns
    corrections = V.mT @ image
    image = image - V @ corrections
    columns = (columns + corrections).to(T.device)
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
    columns = block[:, :0]
    for column in block.unbind(1):
        vector = beside(V, columns, beside(V, columns, column))
        if not vector.norm() > max(shortest, EIGENVALUE_ROUNDING * float(column.norm())):
            # The space is exhausted, or there was nothing to begin with.
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(len(vector), dtype=vector.dtype, generator=generator)
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
