"""Directions by products: leading eigenpairs of a block, on whichever of its sides is shorter.

Of K = BᵀB [i, i] and G = B Bᵀ [d, d], which have the same nonzero eigenvalues, the shorter one is
multiplied with; of a pair of eigenvectors u and e each gives the other, e = B u / √λ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.errors import BadValue, sentence, warn
from ddnewton.inputs.checks import check_dependence
from ddnewton.inputs.memory import check_fits
from ddnewton.iterative.lanczos import (
    START_VECTORS,
    Eigenpairs,
    leading_eigenpairs,
    start_block,
)
from ddnewton.linearize.use_of_parameters import depends_on_parameters
from ddnewton.quadratic.arguments import Arguments
from ddnewton.quadratic.directions import orthonormal
from ddnewton.quadratic.eigenpairs import BlockDerivatives, BlockEigenpairs
from ddnewton.quadratic.kept import checked_selection
from ddnewton.quadratic.matrix_free.free_model import FreeModel, free_model, operator_of
from ddnewton.quadratic.matrix_free.operator import Operator
from ddnewton.select import Above, Leading
from ddnewton.types import Select

WHOLE_SIDE = 2048
"""Up to which side all eigenpairs are computed where they are asked for: by the products of as many
unit vectors."""

RESIDUAL_SHARE = 1e-4
"""How long, of ``tol`` and the largest eigenvalue, the residuals of eigenpairs may be."""

FIRST_COUNT = 16
"""How many pairs are computed at first, where it is not known how many lie above a threshold."""

EIGENPAIR_PRODUCTS = 2000
"""How many products are made before eigenpairs are returned as they are, with a warning."""


class FreeDirections(NamedTuple):
    """The kept directions of a block, orthonormal, in the order asked for.

    A direction that is not ``live`` has no eigenvalue beyond rounding; it is zero. Without any
    positive eigenvalue the matrix is not ``curved``.
    """

    evals: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d"]
    live: Bool[Tensor, " k"]
    residuals: Float[Tensor, " k"]
    rank: int  # −1 where it is not known
    products: int
    curved: bool


def free_directions(
    operator: Operator, select: Select | None, tol: float, dtype: torch.dtype
) -> FreeDirections:
    """Return the directions that ``select`` asks for, all above the rank tolerance for None."""
    on_columns = operator.i < operator.d and operator.has_columns
    side = operator.i if on_columns else operator.d
    pairs = _eigenpairs(operator, select, tol, side, on_columns=on_columns)
    # Which of them are known, and which are kept: of all, as many as there are columns.
    largest = pairs.evals.amax().clamp(min=0) if len(pairs.evals) else pairs.evals.sum()
    live = pairs.evals > _rounding(operator, side) * largest
    every = len(pairs.evals) == side
    padding = max(0, operator.i - side) if every else 0
    evals, positive = (F.pad(part, (padding, 0)) for part in (pairs.evals.clamp(min=0), live))
    if select is None:
        indices = positive.nonzero()[:, 0]
    else:
        indices, _ = checked_selection(select(evals.to(dtype, copy=True)), evals)
    places = (indices - padding).clamp(min=0)
    live = positive[indices]
    # As parameters, orthonormal to the last digit.
    vectors = pairs.vectors.mT[places]
    if on_columns:
        roots = torch.where(live, evals[indices], 1).sqrt()
        vectors = operator.to_parameters(vectors / roots[:, None])
    vectors = torch.where(live[:, None], vectors, 0)
    return FreeDirections(
        evals=evals[indices],
        vectors=orthonormal(vectors, evals[indices], live),
        live=live,
        residuals=torch.where(indices >= padding, pairs.residuals[places], 0),
        rank=int(positive.sum()) if every else -1,
        products=pairs.products,
        curved=bool(largest > 0),
    )


def free_eigenpairs(arguments: Arguments) -> BlockEigenpairs:
    """Return the eigenpairs of all blocks, by products."""
    with free_model(arguments) as model:
        kept = _of_blocks(model, _operators(model))
    vectors = [block.vectors for block in kept]
    return BlockEigenpairs([block.evals for block in kept], vectors, model.dtype)


def free_derivatives(arguments: Arguments) -> BlockDerivatives:
    """Return the derivatives along the directions of all blocks, by products."""
    with free_model(arguments) as model:
        operators = _operators(model)
        pairs = zip(operators, _of_blocks(model, operators), strict=True)
        return BlockDerivatives(
            [operator.derivatives(kept.vectors) for operator, kept in pairs], model.dtype
        )


def _operators(model: FreeModel) -> list[Operator]:
    """Return the operator of every block."""
    return [operator_of(model, block.leaves) for block in model.blocks]


def _of_blocks(model: FreeModel, operators: Sequence[Operator]) -> list[FreeDirections]:
    """Return the kept directions of every block; refuse outputs that depend on no parameter."""
    tol, dtype = model.arguments.tol, model.dtype
    kept = [
        free_directions(operator, block.select, tol, dtype)
        for operator, block in zip(operators, model.blocks, strict=True)
    ]
    if not any(block.curved for block in kept):
        check_dependence(any(depends_on_parameters(term.linearization) for term in model.terms))
    return kept


def coordinates_of(operator: Operator, kept: FreeDirections) -> Float[Tensor, "i k"]:
    """Return the eigenvectors u_k = Bᵀe_k / √λ_k of the Gram matrix, as damping rules take them."""
    if not operator.has_columns:
        rule = "a damping rule must be of a criterion whose Hessian has a root at hand"
        got = "one whose Hessian is known by products alone"
        raise BadValue(sentence(rule, got, "Pass a number as damping."))
    evecs = operator.to_columns(kept.vectors)
    normalised: Tensor = F.normalize(evecs, dim=1).mT
    return normalised


def _rounding(operator: Operator, side: int) -> float:
    """Return the rounding of the eigenvalues relative to the largest."""
    eps = torch.finfo(torch.float64).eps
    return max(eps * side, 32 * operator.eps if operator.eps > eps else 0.0)


def _eigenpairs(
    operator: Operator, select: Select | None, tol: float, side: int, *, on_columns: bool
) -> Eigenpairs:
    """Return so many leading eigenpairs that the wanted ones are among them."""

    def product(block: Float[Tensor, "side b"]) -> Float[Tensor, "side b"]:
        if on_columns:
            return operator.to_columns(operator.to_parameters(block.mT)).mT
        return operator.product(block.mT).mT

    def leading(k: int) -> Eigenpairs:
        return _leading(product, operator, side, k, tol)

    if isinstance(select, Leading):
        return leading(min(select.k, side))
    # Above a threshold: more and more, until one is below.
    count = FIRST_COUNT
    while isinstance(select, Above) and 4 * count < side:
        pairs = leading(count)
        if not bool(select(pairs.evals)[0]):
            return pairs
        count *= 2
    if side > WHOLE_SIDE:
        rule = (
            f'with gram="free" all of the {side} eigenpairs of a block must be at most {WHOLE_SIDE}'
        )
        remedy = (
            "Pass select=top_k(k), or above(threshold); or one number as damping, and the same as "
            "complement, which needs no eigenpairs."
        )
        raise BadValue(sentence(rule, "a damping or a selection that asks for all", remedy))
    return leading(side)


def _leading(
    product: Callable[[Float[Tensor, "side b"]], Float[Tensor, "side b"]],
    operator: Operator,
    side: int,
    k: int,
    tol: float,
) -> Eigenpairs:
    """Return the k leading eigenpairs, with a warning where they did not converge."""
    # The basis, and its products.
    check_fits(
        2 * (2 * k + 20) * side * torch.float64.itemsize,
        f"a basis for {k} eigenpairs of side {side}",
        "Pass top_k(k) of fewer, or groups of the parameters.",
        operator.device,
    )
    pairs = leading_eigenpairs(
        product,
        side,
        k,
        tol=RESIDUAL_SHARE * tol,
        limit=EIGENPAIR_PRODUCTS,
        start=start_block(side, operator.device),
        rounding=operator.eps,
    )
    if not pairs.converged:
        worst = float(pairs.residuals.amax() / pairs.evals.amax())
        remedy = "Eigenvalues that lie close together need fewer, or more, of them."
        if pairs.products + START_VECTORS <= EIGENPAIR_PRODUCTS:
            remedy = "That is the rounding of products: pass params and X in float64."
        warn(
            f"{k} leading eigenpairs have not converged after {pairs.products} products: residuals "
            f"are up to {worst:.1e} of the largest eigenvalue, where tol={tol:g} asks for "
            f"{RESIDUAL_SHARE * tol:.1e}. {remedy}"
        )
    return pairs
