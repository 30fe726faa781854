r"""The leading eigenpairs of a matrix K ⪰ 0 that is at hand, without its other ones.

Lanczos's method from one vector: the next vector of the basis V is K times the one before, made
orthogonal to the last two, as in exact arithmetic, and then to all of V. With T = VᵀKV and a pair
T w = λ w the Ritz vector u = V w has the residual β |w_m|, β the length of the next vector.
Products with one vector are cheap as long as there are tens of them; a decomposition of K costs as
much as hundreds.

A Krylov space of one vector holds an eigenvalue once. That none is missing above some σ is proved
by eigenvalues where they are at hand, and else by Cholesky's factorization: with the pairs Λ, U

    σI − K + U Λ Uᵀ ≻ 0

if and only if all further eigenvalues are below σ (Sylvester's law of inertia; Parlett, "The
symmetric eigenvalue problem", 1998, section 3.3). What is not proved is not returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

FIRST_SIZE, GROWTH = 24, 1.2
"""How large the basis is when the host first looks at it, and how many times larger each time."""

LARGEST_SHARE = 4
"""How many times smaller than K the basis stays: beyond, all eigenpairs are as cheap."""

PAIRS_SHARE = 16
"""How many times fewer than all the pairs have to be."""

ESTIMATED_RESIDUAL, TRUE_RESIDUAL = 1e-14, 1e-13
"""The residuals of pairs relative to λ_max: as the basis tells them, and as products show them."""

HOPEFUL_SHARE, HOPEFUL_RESIDUAL = 0.6, 3e-4
"""From which share of its largest size on, and with which residuals, the basis goes on growing."""

FLOAT32_MARGINS = 4.0
"""How many times the rounding of float32 the next eigenvalue is below for a proof in float32."""

MOST_TESTS = 2
"""How often pairs may be found wanting."""

Asked: TypeAlias = Callable[[Float[Tensor, " m"], Float[Tensor, ""]], tuple[int, float | None]]
"""Of ascending leading eigenvalues and the sum of all: how many of them are asked for, and the
bound that they are above, if there is one."""


class LeadingPairs(NamedTuple):
    """The largest eigenvalues, ascending, and their eigenvectors: ``asked_for``, at least one.

    Where none is asked for, the largest shows that none is above the bound.
    """

    evals: Float[Tensor, " k"]
    vectors: Float[Tensor, "side k"]
    asked_for: int


class RitzPairs(NamedTuple):
    """All pairs of T on the host, ascending, and their residuals."""

    evals: Float[Tensor, " m"]
    weights: Float[Tensor, "m m"]
    residuals: Float[Tensor, " m"]


def leading_pairs(
    matrix: Float[Tensor, "side side"],
    asked: Asked,
    evals: Float[Tensor, " side"] | None = None,
) -> LeadingPairs | None:
    """Return the leading eigenpairs that are asked for, at least one; None if they would be dear.

    ``evals`` are all eigenvalues, ascending, if they are at hand. Of a matrix on another device
    the host reads a few numbers at every look at the basis, and at the end of each test. The same
    matrix gives the same pairs.

    >>> K = torch.linspace(0, 1, 400, dtype=torch.float64).square().square().diag()
    >>> leading_pairs(K, lambda ritz, trace: (2, None)).evals
    tensor([0.9900, 1.0000], dtype=torch.float64)
    """
    side = len(matrix)
    largest, total = side // LARGEST_SHARE, matrix.trace()
    vectors, products = _started(matrix, largest)
    size, goal, tests = 0, min(FIRST_SIZE, largest), 0
    while size < goal:
        # Some vectors more, without a look at them, then one look.
        for row in range(size, goal):
            _extend(matrix, vectors, products, row)
        size, goal = goal, min(int(GROWTH * goal) + 1, largest)
        ritz = _ritz_pairs(products[: size + 1, :size].cpu())
        if ritz is None:
            return None
        # As many as are asked for, as far as is known; never more than are in the end.
        count, bound = asked(ritz.evals, total)
        taken, resolved = max(count, 1), _rounding(matrix) * float(ritz.evals[-1])
        if taken > side // PAIRS_SHARE or (bound is not None and bound <= resolved):
            return None
        accurate = ritz.residuals[-taken:] <= ESTIMATED_RESIDUAL * ritz.evals[-1]
        if taken < size and bool(accurate.all()):
            evals_of, weights = (x[..., -taken:].to(matrix.device) for x in ritz[:2])
            pairs = LeadingPairs(evals_of, vectors[:size].mT @ weights, count)
            if _are_leading(matrix, pairs, bound, evals, float(ritz.evals[-taken - 1])):
                return pairs
            tests += 1
        # No more vectors where the pairs come too slowly.
        hopeful = ritz.residuals[-taken:] <= HOPEFUL_RESIDUAL * ritz.evals[-1]
        late = size >= HOPEFUL_SHARE * largest and not bool(hopeful.all())
        if late or tests == MOST_TESTS:
            return None
    return None


def _started(
    matrix: Float[Tensor, "side side"], largest: int
) -> tuple[Float[Tensor, "m side"], Float[Tensor, "m m"]]:
    """Return room for the basis, as rows, and for T; the first row is the same every time."""
    side = len(matrix)
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(side, dtype=matrix.dtype, generator=generator, device="cpu")
    vectors = matrix.new_empty(largest + 1, side)
    vectors[0] = (start / start.norm()).to(matrix.device)
    return vectors, matrix.new_zeros(largest + 1, largest + 1)


def _extend(
    matrix: Float[Tensor, "side side"],
    vectors: Float[Tensor, "m side"],
    products: Float[Tensor, "m m"],
    row: int,
) -> None:
    """Write the next vector of the basis behind a row, and the row of T with the length behind it.

    Only the lower triangle of T is right.
    """
    # In exact arithmetic the last two vectors are all that the product is not orthogonal to.
    first, image = max(row - 1, 0), matrix @ vectors[row]
    basis, neighbours = vectors[: row + 1], vectors[first : row + 1]
    inner = torch.mv(neighbours, image, out=products[row, first : row + 1])
    remainder = image.addmv_(neighbours.mT, inner, alpha=-1)
    remainder.addmv_(basis.mT, basis @ remainder, alpha=-1)
    length = torch.linalg.vector_norm(remainder, out=products[row + 1, row])
    torch.div(remainder, length, out=vectors[row + 1])


def _ritz_pairs(products: Float[Tensor, "m2 m"]) -> RitzPairs | None:
    """Return the pairs of T from its lower triangle and the length below; None if it is not finite.

    That length is zero, and the next vector nan, only where the basis is a space that K maps to
    itself to the last digit; most often rounding leads out of it.
    """
    if not bool(products.isfinite().all()):
        return None
    evals, weights = torch.linalg.eigh(products[:-1])
    return RitzPairs(evals, weights, (products[-1, -1] * weights[-1]).abs())


def _are_leading(
    matrix: Float[Tensor, "side side"],
    pairs: LeadingPairs,
    bound: float | None,
    evals: Float[Tensor, " side"] | None,
    following: float,
) -> bool:
    """Return whether the pairs are accurate, and no further eigenvalue is above all but them.

    ``following`` is what the basis takes for the next eigenvalue.
    """
    leading, vectors, _ = pairs
    scale = leading[-1].abs()
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * leading, dim=0)
    accurate = (residuals <= TRUE_RESIDUAL * scale).all()
    if evals is not None:
        errors = (evals[-len(leading) :] - leading).abs()
        return bool(accurate & (errors <= TRUE_RESIDUAL * scale).all())
    # Below are all others, up to what a decomposition would not tell apart.
    below = torch.addmm(matrix, vectors * leading, vectors.mT, beta=-1)
    least = leading[0].clamp(min=bound or 0.0)
    # Where the next one is not close, float32 proves as much, in half the time.
    if matrix.is_cpu and matrix.dtype == torch.float64:
        margin = float(least) * len(matrix) * torch.finfo(torch.float32).eps
        if following < float(least) - FLOAT32_MARGINS * margin:
            narrow = below.float()
            narrow.diagonal().add_(least - margin)
            if bool(accurate) and not int(torch.linalg.cholesky_ex(narrow).info):
                return True
    below.diagonal().add_(least + _rounding(matrix) * scale)
    _, failed = torch.linalg.cholesky_ex(below)
    return bool(accurate & (failed == 0))


def _rounding(matrix: Float[Tensor, "side side"]) -> float:
    """Return the rounding of a decomposition, relative to the largest eigenvalue."""
    return torch.finfo(matrix.dtype).eps * len(matrix)
