r"""The leading eigenpairs of G by a block Lanczos method with thick restarts.

The basis V of a block Krylov space is kept orthonormal by full reorthogonalisation, so that

    G V = V T + Q S Eᵀ,        T = VᵀG V,        E = the last columns of the identity,

with the next block Q. A pair T w = λ w gives the Ritz vector u = V w with the residual

    ‖G u − λ u‖ = ‖S Eᵀw‖.

A full basis is compressed to its leading Ritz vectors, and Q, taken before, is what goes on.
(Golub, Underwood, "The block Lanczos method for computing eigenvalues", 1977; Wu, Simon, "Thick-
restart Lanczos method for large symmetric eigenvalue problems", 2000.)

A Krylov space of b vectors holds an eigenvalue b times at most. Where b ≥ 2 converged eigenvalues
are all different, none is there more often. Otherwise they are put to a test: with a random block
orthogonal to the pairs the basis is filled once more, and if that moves an eigenvalue, there was
one missing, and the iteration goes on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.block_basis import (
    EIGENVALUE_ROUNDING,
    Basis,
    compressed,
    extended,
    orthonormalized,
    ritz_pairs,
)
from ddnewton.iterative.products import FLOAT64_ROUNDING, BlockProduct, finite

START_VECTORS = 2
"""Of a block that is multiplied at a time."""

WHOLE_SPACE = 64
"""Up to this size, and from a third of it in eigenpairs on, the matrix itself is made."""


class Eigenpairs(NamedTuple):
    """Leading eigenpairs, ascending; ``residuals`` are ‖G u − λ u‖, rounding included."""

    evals: Float[Tensor, " k"]
    vectors: Float[Tensor, "side k"]
    residuals: Float[Tensor, " k"]
    products: int
    converged: bool


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


def start_block(side: int, device: torch.device) -> Float[Tensor, "side b"]:
    """Return random vectors to start from, the same ones every time: two, for pairs of a value."""
    generator = torch.Generator().manual_seed(0)
    start = torch.empty(side, min(START_VECTORS, side), dtype=torch.float64, device="cpu")
    return start.normal_(generator=generator).to(device)


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
    basis = Basis(vectors, torch.zeros(capacity, capacity, dtype=start.dtype, device="cpu"), 0, 0)
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
            # Converged, and if no two are the same, all. Otherwise go on from random vectors.
            passed = b > 1 and are_apart(ritz.evals[-k:], goal)
            tested = ritz.evals[-k:]
            basis = compressed(basis, ritz, k)
            if not passed:
                dropped = math.hypot(dropped, float(ritz.residuals.norm()))
                block, basis = orthonormalized(basis, torch.zeros_like(block), 0.0)
        elif basis.size + b > capacity:
            # The basis is full. A test is passed that moves no eigenvalue.
            unmoved = tested is not None and bool((ritz.evals[-k:] - tested <= 4 * goal).all())
            passed = accurate and unmoved
            basis = compressed(basis, ritz, k if passed else restart_size(k, b, capacity))
            tested = None
    # Where the limit came first, the basis is as large as it happens to be.
    if not passed:
        basis = compressed(basis, ritz, k)
    residuals = ritz.residuals + dropped + (rounding + EIGENVALUE_ROUNDING) * ritz.evals[-1]
    passed = passed and bool((residuals <= tol * ritz.evals[-1]).all())
    evals, residuals = (x.to(start.device) for x in (ritz.evals[-k:].clamp(min=0), residuals))
    return Eigenpairs(evals, basis.vectors[:, :k].clone(), residuals, products, passed)


def are_apart(evals: Float[Tensor, " k"], goal: float) -> bool:
    """Return whether no two eigenvalues are the same, as far as they are known."""
    return bool((evals.diff() > 4 * goal).all())


def restart_size(k: int, b: int, capacity: int) -> int:
    """Return the number of Ritz vectors that are kept of a full basis."""
    return min(k + (capacity - k) // 3, capacity - 2 * b)
