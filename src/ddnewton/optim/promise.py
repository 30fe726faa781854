"""What a step promises: the quadratic model along vectors, its gradient, penalty and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.gram import matmat, rmatmat
from ddnewton.inputs.groups import is_whole
from ddnewton.optim.adaptation import Curvature
from ddnewton.optim.free_matrices import FreeMatrix
from ddnewton.optim.free_trials import FreeTrials, along_all
from ddnewton.optim.solved_trials import TrialSteps
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.quadratic_model import QuadraticModel, gradients
from ddnewton.quadratic.solution import damped_blocks
from ddnewton.transforms import any_known, is_batched
from ddnewton.trees import joined

MATRIX_SHARE = 1e-9
"""From which share of the trace upwards the curvature along a vector has six digits by G itself."""


class Quadratic(NamedTuple):
    """The quadratic model along some vectors: its slopes, and its curvature between any two."""

    slopes: Float[Tensor, " k"]
    curvatures: Float[Tensor, "k k"]
    column_slopes: Float[Tensor, "i k"] | None  # of the curvature along the vectors, where known


def quadratic_along(
    trials: TrialSteps | FreeTrials,
    vectors: Float[Tensor, "k d"],
    delta: Tensor | None = None,
    column_slopes: Float[Tensor, "i k"] | None = None,
) -> Quadratic:
    """Return the quadratic model along vectors, damped by δ where one is given.

    The slopes of the columns of the curvature along them are looked for unless they are passed.
    """
    model, proximal = trials.model, trials.proximal
    # The loss: gᵀv and vᵀG v.
    if isinstance(trials, FreeTrials):
        slopes, curvatures = along_all(trials, vectors)
    elif column_slopes is not None:
        slopes, curvatures, _ = _of_slopes(trials, vectors, column_slopes)
    else:
        slopes, curvatures, column_slopes = _of_loss(trials, vectors)
    # The penalty of weight decay.
    if proximal is not None and len(proximal.params):
        decayed = proximal.decay * vectors
        slopes = slopes + decayed @ proximal.params[0]
        curvatures = curvatures + decayed @ vectors.mT
    # The damping, of every block by its own.
    if delta is not None:
        parts = vectors.split(model.sizes, 1)
        for block in damped_blocks(model.blocks, [delta] * len(model.blocks)):
            of_block = torch.cat([parts[leaf] for leaf in block.leaves], 1)
            scalar = delta if callable(block.damping) else block.damping
            curvatures = curvatures + scalar * (of_block @ of_block.mT)
    return Quadratic(slopes, curvatures, column_slopes)


def _of_loss(trials: TrialSteps, vectors: Float[Tensor, "k d"]) -> Quadratic:
    """Return the quadratic model of the loss alone along vectors."""
    model, matrix = trials.model, trials.matrices[0]
    every_leaf = range(len(model.sizes))
    # By G and g of all parameters, where the curvature along vectors stands out from G's rounding.
    if is_whole(model.leaves, len(every_leaf)) and not (matrix.on_columns or is_batched(vectors)):
        curvatures = vectors @ matrix.entries @ vectors.mT
        quadratic = Quadratic(vectors @ matrix.gradient, curvatures, None)
        least = MATRIX_SHARE * matrix.trace() * vectors.square().sum(1)
        if not any_known(quadratic.curvatures.diagonal() < least):
            return quadratic
    # By the slopes of the columns, whose sum of squares has more digits.
    column_slopes = rmatmat(model.curvature_jacobians, every_leaf, vectors.mT)
    return _of_slopes(trials, vectors, column_slopes)


def _of_slopes(
    trials: TrialSteps, vectors: Float[Tensor, "k d"], column_slopes: Float[Tensor, "i k"]
) -> Quadratic:
    """Return the quadratic model of the loss by the slopes A₁ᵀv of the columns of the curvature."""
    model, weights = trials.model, trials.model.curvature_weights
    # Of a gradient with columns of its own, which are not in A₁, by itself.
    if len(model.gradient_weights) == len(weights):
        slopes = model.gradient_weights @ column_slopes
    else:
        whole = is_whole(model.leaves, len(model.sizes))
        gradients = trials.gradients
        slopes = vectors @ (gradients[0] if whole else joined(gradients, model.leaves, model.sizes))
    curvatures = column_slopes.mT @ (weights[:, None] * column_slopes)
    return Quadratic(slopes, curvatures, column_slopes)


def curvature_of(
    matrices: Sequence[GaussNewton | FreeMatrix], length: Float[Tensor, ""]
) -> Curvature:
    """Return the largest trace and the largest mean eigenvalue of the blocks, with ‖θ‖."""
    traces = [matrix.trace() for matrix in matrices]
    means = [trace / m.side for trace, m in zip(traces, matrices, strict=True)]
    return Curvature(torch.stack(traces).amax(), torch.stack(means).amax(), length)


def gradients_of(
    model: QuadraticModel, matrices: Sequence[GaussNewton]
) -> list[Float[Tensor, " _"]]:
    """Return the gradients of the blocks, of the gradient's own columns alone where these are all.

    Where all samples of the gradient have such columns, those of the curvature have no part in it.
    """
    own_columns = all(term.own_gradient for term in model.terms)
    if not (own_columns and all(matrix.on_columns for matrix in matrices)):
        return gradients(model, matrices)
    weights = model.gradient_weights[None, len(model.curvature_weights) :]
    further = model.jacobians[len(model.terms) :]
    return [sums[0] for sums in matmat(further, model.leaves, [weights] * len(matrices))]
