r"""The damped step of a block: by Cholesky's factorization where possible, or by eigenpairs.

With one damping δ of all directions it is −(G + δI)⁻¹g, a linear system. Otherwise it is walked
along the directions, −γ_k / (λ_k + δ_k) each. Either may start from a centre: `quadratic.proximal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.damping import as_rule, check_dampings
from ddnewton.inputs.groups import Block
from ddnewton.quadratic.cholesky import CHOLESKY_CONDITION, damped_step
from ddnewton.quadratic.complement import outside, vanishing
from ddnewton.quadratic.flat import flat_share
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.info import NewtonInfo, record_of
from ddnewton.quadratic.kept import BlockDirections
from ddnewton.quadratic.proximal import Centre, along_directions, centred_gradient_weights
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.scalars import scalar_like
from ddnewton.types import DampingRule


class Solution(NamedTuple):
    """A step along the directions of a block, and in the coordinates of its spectrum."""

    dampings: Float[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    coordinates: Float[Tensor, " j"]


def without_eigenpairs(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    complements: Sequence[float | Tensor | None],
    centres: Sequence[Centre] | None = None,
    condition: float = CHOLESKY_CONDITION,
) -> list[Float[Tensor, " _"]] | None:
    """Return the steps of the blocks, or None unless one damping of all directions is all asked."""
    if not is_linear(model, complements):
        return None
    steps = []
    for b, (block, matrix) in enumerate(zip(model.blocks, matrices, strict=True)):
        delta, complement = block.damping, complements[b]
        assert not callable(delta)
        # The gradient at the centre, and a step from there.
        centre = None if centres is None else centres[b]
        weights = centred_gradient_weights(model.gradient_weights, model.curvature_weights, centre)
        everywhere = complement is not None
        step = damped_step(matrix, weights, delta, everywhere=everywhere, condition=condition)
        if step is None:
            return None
        steps.append(step)
    return steps


def is_linear(model: QuadraticModel, complements: Sequence[float | Tensor | None]) -> bool:
    """Return whether the steps solve linear systems: one damping of all directions of a block.

    A selection, a rule, or another damping of the complement asks for directions.
    """
    if model.has_curvature_samples:
        return False
    return all(map(is_one_damping, model.blocks, complements))


def is_one_damping(block: Block, complement: float | Tensor | None) -> bool:
    """Return whether one number damps all directions of a block, and what is outside of them."""
    if block.select is not None or callable(block.damping):
        return False
    return complement is None or _is_same_damping(complement, block.damping)


def damped_more(model: QuadraticModel, deltas: Sequence[Tensor]) -> QuadraticModel:
    """Return the model with the dampings of all directions of every block raised by its δ."""
    return model._replace(blocks=damped_blocks(model.blocks, deltas))


def damped_blocks(blocks: Sequence[Block], deltas: Sequence[Tensor]) -> list[Block]:
    """Return blocks with the dampings of all directions raised by a δ each."""

    def raised(
        damping: float | Tensor | DampingRule, delta: Tensor
    ) -> float | Tensor | DampingRule:
        if not callable(damping):
            return damping + delta
        # Ask the rule, check its answer as where nothing is added, and add δ.
        rule = damping

        def raised_rule(*arguments: Tensor) -> Tensor:
            dampings = rule(*arguments)
            check_dampings(dampings, arguments[0].shape[0])
            return dampings + delta.to(dampings)

        return raised_rule

    return [
        block._replace(damping=raised(block.damping, delta))
        for block, delta in zip(blocks, deltas, strict=True)
    ]


def solve(
    model: QuadraticModel,
    directions: BlockDirections,
    complement: float | Tensor | None,
    centre: Centre | None = None,
) -> Solution:
    """Return the damped step of one block along its directions."""
    block, spectrum, kept, derivatives = directions
    # Ask for the dampings; a rule gets copies, to be changed as it likes.
    arguments = [kept.evals, kept.evecs, *derivatives]
    if callable(block.damping):
        arguments = [tensor.to(model.dtype, copy=True) for tensor in arguments]
    dampings = as_rule(block.damping)(*arguments)
    check_dampings(dampings, kept.evals.shape[0])
    dampings = dampings.to(kept.evals.device)
    # The means over the samples, from the centre where there is one.
    gamma, curvature = derivatives.gammas.mean(0), derivatives.lambdas.mean(0)
    decayed = torch.zeros_like(gamma)  # how far weight decay moves directions that a rule skips
    if centre is not None:
        decayed = along_directions(kept, model.curvature_weights, centre.decay)
        added = torch.where(dampings.isfinite(), dampings - centre.delta, 0)
        inner = along_directions(kept, model.curvature_weights, centre.column_slopes)
        gamma = gamma + curvature * inner + added * decayed
    # s = Σ_k −γ_k / (λ_k + δ_k) e_k.
    coefficients = coefficients_along(gamma, curvature, dampings, kept.live)
    coefficients = torch.where(kept.live & dampings.isinf(), -decayed, coefficients)
    coordinates = kept.vectors @ coefficients
    # What the kept directions leave of the gradient.
    if complement is not None:
        remainder = outside(spectrum, model.gradient_weights, kept)
        delta = scalar_like(complement, remainder)
        coordinates = coordinates - torch.where(delta > 0, remainder / delta, 0)
    elif block.select is None and not callable(block.damping) and not model.has_curvature_samples:
        padding = (0, len(model.gradient_weights) - len(model.curvature_weights))
        curved = F.pad(model.curvature_weights > 0, padding)
        part = vanishing(spectrum, model.gradient_weights, curved, block.damping)
        coordinates = coordinates - part
    return Solution(dampings, coefficients, coordinates)


def coefficients_along(
    gamma: Float[Tensor, " k"],
    curvature: Float[Tensor, " k"],
    dampings: Float[Tensor, " k"],
    live: Bool[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """Return −γ_k / (λ_k + δ_k), 0 along what is not live or has neither curvature nor damping."""
    damped = curvature + dampings.double()
    return torch.where(live & (damped > 0), -gamma / damped, 0)


def info_of(
    model: QuadraticModel,
    directions: BlockDirections,
    gradient: Float[Tensor, " d"],
    solution: Solution,
) -> NewtonInfo:
    """Return the record of the step of one block."""
    kept, square = directions.kept, gradient.square().sum()
    return record_of(
        directions.derivatives,
        kept.live,
        gradient,
        model.dtype,
        loss=model.loss,
        evals=kept.evals,
        dampings=solution.dampings,
        coefficients=solution.coefficients,
        rank=directions.spectrum.rank,
        flat_share=flat_share(model, [directions], square.sqrt()),
        losses=model.losses,
        lost=torch.zeros_like(square),
        products=torch.zeros_like(directions.spectrum.rank),
        residuals=kept.evals[:0],
        rounding=torch.full_like(square, max(jacobian.eps for jacobian in model.jacobians)),
    )


def _is_same_damping(first: float | Tensor, second: float | Tensor) -> bool:
    """Return whether two dampings are known to be one."""
    if isinstance(first, Real) and isinstance(second, Real):
        return first == second
    return first is second
