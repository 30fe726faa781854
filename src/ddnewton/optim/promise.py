"""What a step promises: the quadratic model along vectors, its penalty, damping and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.gram import rmatmat
from ddnewton.optim.adaptation import Curvature
from ddnewton.optim.free_matrices import FreeMatrix
from ddnewton.optim.free_trials import FreeTrials, along_all
from ddnewton.optim.trial_steps import TrialSteps
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.solution import damped_blocks
from ddnewton.transforms import any_known, is_batched

MATRIX_SHARE = 1e-9
"""From which share of the trace upwards the curvature along a vector has six digits by G itself."""


class Quadratic(NamedTuple):
    """The quadratic model along some vectors: its slopes, and its curvature between any two."""

    slopes: Float[Tensor, " k"]
    curvatures: Float[Tensor, "k k"]


def quadratic_along(
    trials: TrialSteps | FreeTrials, vectors: Float[Tensor, "k d"], delta: Tensor | None = None
) -> Quadratic:
    """Return the quadratic model along vectors, damped by δ where one is given."""
    model, proximal = trials.model, trials.proximal
    # The loss: gᵀv and vᵀG v.
    if isinstance(trials, FreeTrials):
        slopes, curvatures = along_all(trials, vectors)
    else:
        slopes, curvatures = _of_loss(trials, vectors)
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
    return Quadratic(slopes, curvatures)


def _of_loss(trials: TrialSteps, vectors: Float[Tensor, "k d"]) -> Quadratic:
    """Return the quadratic model of the loss alone along vectors."""
    model, matrix = trials.model, trials.matrices[0]
    every_leaf = range(len(model.sizes))
    # By G and g of all parameters, where the curvature along vectors stands out from G's rounding.
    in_order = len(trials.matrices) == 1 and list(model.leaves[0]) == list(every_leaf)
    if in_order and not (matrix.on_columns or is_batched(vectors)):
        quadratic = Quadratic(vectors @ matrix.gradient, vectors @ matrix.entries @ vectors.mT)
        least = MATRIX_SHARE * matrix.trace() * vectors.square().sum(1)
        if not any_known(quadratic.curvatures.diagonal() < least):
            return quadratic
    # By the slopes of all columns, whose sum of squares has more digits.
    column_slopes = rmatmat(model.jacobians, every_leaf, vectors.mT)
    weights = model.curvature_weights
    of_curvature = column_slopes[: len(weights)]
    return Quadratic(
        slopes=model.gradient_weights @ column_slopes,
        curvatures=of_curvature.mT @ (weights[:, None] * of_curvature),
    )


def curvature_of(
    matrices: Sequence[GaussNewton | FreeMatrix], params: Float[Tensor, " d"]
) -> Curvature:
    """Return the largest trace and the largest mean eigenvalue of the blocks, and ‖θ‖."""
    traces = [matrix.trace() for matrix in matrices]
    means = [trace / m.side for trace, m in zip(traces, matrices, strict=True)]
    return Curvature(torch.stack(traces).amax(), torch.stack(means).amax(), params.norm())
