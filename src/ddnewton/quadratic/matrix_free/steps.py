r"""Damped steps by products, and how accurate they are.

One damping of all directions makes a step a linear system, (G + δI) s = −g. Conjugate gradients on
it minimize ‖s − s*‖² in the norm of G + δI, which is twice the decrease that the damped quadratic
model gives away; a bound on it is known in every iteration. They run on the side of the parameters,
whatever the shorter one is, as that norm on the side of the columns is another one. Any other
damping is walked along leading directions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.errors import warn
from ddnewton.inputs.checks import check_derivatives
from ddnewton.inputs.groups import Block
from ddnewton.iterative.conjugate_gradients import Solution
from ddnewton.iterative.refinement import refined
from ddnewton.iterative.solve import solve
from ddnewton.quadratic.arguments import Arguments
from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.info import NewtonInfo, record_of
from ddnewton.quadratic.matrix_free.along import along_of, dampings_along, left_out
from ddnewton.quadratic.matrix_free.free_model import (
    FreeModel,
    check_free_slopes,
    free_model,
    operator_of,
)
from ddnewton.quadratic.matrix_free.operator import Operator
from ddnewton.quadratic.solution import coefficients_along, is_one_damping

MOST_PRODUCTS = 1000
"""How many products a linear system is given, before its step is returned as it is."""

SKETCH_BYTES = 2**29
"""The memory that a sketch may take, which is made where a hundred products are not enough."""


class FreeStep(NamedTuple):
    """The step of a block, and what it is made of: directions, and how far to go along each.

    A step that solves a linear system is one direction, s / ‖s‖. ``lost`` bounds the share of the
    promised decrease that is given away, nan for a step along several directions.
    """

    vector: Float[Tensor, " d"]
    evals: Float[Tensor, " k"]
    derivatives: Derivatives | None  # None until they are asked for
    dampings: Float[Tensor, " k"]
    coefficients: Float[Tensor, " k"]
    gradient: Float[Tensor, " d"]
    rank: int  # −1 where it is not known
    lost: float
    products: int
    residuals: Float[Tensor, " k"]
    curved: bool  # whether there is any curvature: along the gradient, or of the directions


def free_steps(arguments: Arguments) -> list[Float[Tensor, " _"]]:
    """Return the steps of all blocks, in the units of the parameters."""
    with free_model(arguments) as model:
        return [vector for vector, _ in _steps(model, recorded=False)]


def free_steps_and_infos(
    arguments: Arguments,
) -> tuple[list[Float[Tensor, " _"]], list[NewtonInfo]]:
    """Return the steps of all blocks, in the units of the parameters, and their records."""
    with free_model(arguments) as model:
        steps = _steps(model, recorded=True)
        return [vector for vector, _ in steps], [_info(model, step) for _, step in steps]


def _steps(model: FreeModel, *, recorded: bool) -> list[tuple[Float[Tensor, " _"], FreeStep]]:
    """Return the steps of all blocks, in the units of the parameters and as they are made.

    Derivatives along a step that solves a linear system are for one that is ``recorded`` alone.
    """
    steps = []
    for block in model.blocks:
        operator = operator_of(model, block.leaves)
        step = _step(model, operator, block)
        step = _with_derivatives(operator, step) if recorded else step
        steps.append((_in_params_units(operator, step), step))
    curved = model.arguments.complement is not None or any(step.curved for _, step in steps)
    check_free_slopes(model, [step.gradient for _, step in steps], curved=curved)
    return steps


def _step(model: FreeModel, operator: Operator, block: Block) -> FreeStep:
    """Return the step of a block: of a linear system, or along directions."""
    complement = model.arguments.complement
    gradient = operator.gradient()
    check_derivatives(gradient)
    if is_linear(model, block, complement):
        return _linear_step(model, operator, block, gradient)
    return _step_along_directions(model, operator, block, gradient)


def is_linear(model: FreeModel, block: Block, complement: float | Tensor | None) -> bool:
    """Return whether a step solves a linear system: one damping, for all of the gradient.

    A gradient in the range of G has no part outside of all directions.
    """
    if model.has_curvature_samples or not is_one_damping(block, None):
        return False
    return model.spans or (complement is not None and is_one_damping(block, complement))


def _linear_step(
    model: FreeModel, operator: Operator, block: Block, gradient: Float[Tensor, " d"]
) -> FreeStep:
    """Return the step of one damping of all directions."""
    assert not callable(block.damping)
    delta = float(block.damping)
    solution = solved(model, operator, gradient, delta)
    length = solution.x.norm()
    return FreeStep(
        vector=-solution.x,
        evals=length.new_zeros(0),
        derivatives=None,
        dampings=torch.full_like(length, delta)[None],
        coefficients=length[None],
        gradient=gradient,
        rank=-1,
        lost=solution.lost,
        products=solution.products,
        residuals=solution.residual * gradient.norm()[None],
        curved=solution.curved,
    )


def _with_derivatives(operator: Operator, step: FreeStep) -> FreeStep:
    """Return a step with slopes and curvatures along it: of a linear system as one direction."""
    if step.derivatives is not None:
        return step
    direction = torch.where(step.coefficients > 0, step.vector / step.coefficients, 0)[None]
    derivatives = operator.derivatives(direction)
    return step._replace(derivatives=derivatives, evals=derivatives.lambdas.mean(0))


def solved(
    model: FreeModel, operator: Operator, gradient: Float[Tensor, " d"], delta: float
) -> Solution:
    """Return (G + δI)⁻¹ g, with a warning where it gives away more than it may."""
    tol = model.arguments.tol
    solution, _ = solve(
        operator.along,
        gradient,
        delta,
        tol=tol,
        limit=MOST_PRODUCTS,
        generator=torch.Generator().manual_seed(0),
        rounding=operator.eps,
        memory=SKETCH_BYTES,
        squared=model.square,
    )
    # Where products have too few digits, residuals in float64 give more.
    if not solution.converged and solution.products < MOST_PRODUCTS:
        wide = model.in_float64()
        if wide is not None:
            precise = operator_of(wide, operator.numbers)
            further = refined(
                operator.along,
                precise.along,
                precise.gradient(),
                delta,
                tol=tol,
                limit=MOST_PRODUCTS - solution.products,
                rounding=operator.eps,
            )
            products = solution.products + further.products
            solution = min(solution, further, key=lambda s: s.lost)._replace(products=products)
    if not solution.converged:
        got = (
            f"a relative residual of {solution.residual:.1e}"
            if delta == 0
            else f"at most {solution.lost:.1e} of the decrease is given away"
        )
        warn(
            f"the step has not converged to tol={tol:g} after {solution.products} products: {got}. "
            "A larger damping takes fewer."
        )
    return solution


def _step_along_directions(
    model: FreeModel, operator: Operator, block: Block, gradient: Float[Tensor, " d"]
) -> FreeStep:
    """Return the step along leading directions, each with its damping."""
    complement, directions = model.arguments.complement, along_of(model, operator, block)
    kept, derivatives = directions.kept, directions.derivatives
    dampings = dampings_along(directions, block)
    # s = Σ_k −γ_k / (λ_k + δ_k) e_k, and what the directions leave of the gradient.
    gamma, curvature = derivatives.gammas.mean(0), derivatives.lambdas.mean(0)
    coefficients = coefficients_along(gamma, curvature, dampings, kept.live)
    vector = coefficients @ kept.vectors
    if complement is not None:
        outside = left_out(directions, gradient)
        delta = torch.as_tensor(complement, dtype=vector.dtype, device=vector.device)
        vector = vector - outside / delta
    return FreeStep(
        vector=vector,
        evals=kept.evals,
        derivatives=derivatives,
        dampings=dampings,
        coefficients=coefficients,
        gradient=gradient,
        rank=kept.rank,
        lost=math.nan,
        products=kept.products,
        residuals=kept.residuals,
        curved=kept.curved,
    )


def _in_params_units(operator: Operator, step: FreeStep) -> Float[Tensor, " d"]:
    """Return a step in the units of the parameters."""
    return step.vector if operator.scale is None else operator.scale * step.vector


def _info(model: FreeModel, step: FreeStep) -> NewtonInfo:
    """Return the record of the step of a block."""
    number = torch.as_tensor(step.rank, device=step.vector.device)
    assert step.derivatives is not None
    return record_of(
        step.derivatives,
        torch.ones_like(step.evals, dtype=torch.bool),
        step.gradient,
        model.dtype,
        loss=model.loss,
        evals=step.evals,
        dampings=step.dampings,
        coefficients=step.coefficients,
        rank=number,
        flat_share=_flat_share(model, step.vector),
        losses=model.losses,
        lost=torch.full_like(step.vector.sum(), step.lost),
        products=torch.full_like(number, step.products),
        residuals=step.residuals,
        rounding=torch.full_like(step.vector.sum(), model.rounding),
    )


def _flat_share(model: FreeModel, like: Tensor) -> Float[Tensor, ""]:
    """Return 0 where every sample with a slope has curvature along it, else nan: not known."""
    flat = any(bool(term.is_flat.any()) for term in model.terms)
    return torch.full_like(like.sum(), math.nan if flat else 0.0)
