"""The loss of a batch around the parameters, where a step leads, and what rounding leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ddnewton.inputs.groups import is_whole
from ddnewton.linearize.precision import narrowest
from ddnewton.optim.adaptation import Curvature
from ddnewton.optim.box import Box, clipped_to
from ddnewton.optim.free_matrices import FreeMatrix
from ddnewton.optim.free_trials import FreeTrials
from ddnewton.optim.solved_trials import TrialSteps
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.matrix_free.free_model import FreeModel
from ddnewton.quadratic.proximal import Proximal
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.quadratic.trial_loss import TrialTerm, trial_of
from ddnewton.trees import (
    along_block,
    as_real,
    flattened,
    tree_leaves,
    tree_map,
    unflattened,
)
from ddnewton.types import PyTree

LOSS_ROUNDINGS = 16.0
"""From how many roundings of the loss upwards a decrease of it can be compared with another."""


class LocalModel(NamedTuple):
    """The loss of a batch around the parameters: its quadratic model, trial steps, and size."""

    model: QuadraticModel | FreeModel
    trials: TrialSteps | FreeTrials
    params: PyTree
    scale: Float[Tensor, " d"] | None
    proximal: Proximal | None
    updates: Int[Tensor, ""]
    damping: Float[Tensor, ""]  # of the step before
    held_out: Sequence[Int[Tensor, " _"]] | None  # samples of every term to choose a damping on
    curvature: Curvature
    box: Box | None
    slopes: Sequence[Float[Tensor, " _"]]  # of the blocks, with weight decay, 0 where bounds hold
    gradient_norm: Float[Tensor, ""]  # without weight decay
    loss: Float[Tensor, ""]  # of the samples of the gradient, with its penalty
    noise: Float[Tensor, ""]  # by how much rounding moves it

    @property
    def scaled_params(self) -> Float[Tensor, " d"]:
        """The parameters in the units of the quadratic model, as steps are."""
        return in_model_units(self.params, self.scale)


class BlockSizes(NamedTuple):
    """Sizes of the parameters of a block, of the slopes and of the curvatures along them.

    One number stands for all of them, their norms and the trace, where G is on the other side.
    """

    params: Float[Tensor, " p"]
    slopes: Float[Tensor, " p"]
    curvatures: Float[Tensor, " p"]


class TrialPoint(NamedTuple):
    """Where a step leads: the loss there, with its penalty, and the outputs of every term."""

    loss: Float[Tensor, ""]
    outputs: Sequence[Float[Tensor, "_ ..."]]


def point_at(
    local: LocalModel,
    decay: float | Tensor,
    vector: Float[Tensor, " d"],
    samples: Sequence[Int[Tensor, " _"] | None],
) -> TrialPoint:
    """Return the loss and the outputs of some samples of every term after a step.

    They are taken at the parameters as their dtype has them.
    """
    # As `added`, leaf by leaf; a complex one is pairs of reals.
    leaves = tree_leaves(as_real(local.params))
    parts = in_params_units(local, vector).split([leaf.numel() for leaf in leaves])
    pairs = zip(leaves, parts, strict=True)
    moved = [leaf + part.reshape(leaf.shape).to(leaf) for leaf, part in pairs]
    if local.box is not None:
        sides = zip(moved, *map(tree_leaves, local.box), strict=True)
        moved = [leaf.clamp(lower, upper) for leaf, lower, upper in sides]
    # The losses of all terms there, and the penalty.
    terms: Sequence[TrialTerm] = local.model.terms
    of_terms = zip(terms, samples, strict=True)
    trials = [trial_of(term, moved, indices) for term, indices in of_terms]
    loss = reduce(torch.add, (trial.loss for trial in trials))
    if isinstance(decay, Tensor) or decay != 0:
        loss = loss + _penalty(decay, in_model_units(moved, local.scale))
    return TrialPoint(loss, [trial.outputs for trial in trials])


def _penalty(decay: float | Tensor, scaled_params: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    """Return the penalty of weight decay, both in the units of the model."""
    return (decay * scaled_params.square()).sum() / 2


def added(params: PyTree, vector: Float[Tensor, " d"], box: Box | None) -> PyTree:
    """Return the parameters after a step, inside of their bounds."""
    return clipped_to(box, tree_map(torch.add, params, unflattened(vector, params)))


def noise_of(local: LocalModel) -> Float[Tensor, ""]:
    """Return by how much the rounding of the loss and of the parameters moves the loss.

    Every parameter is rounded by itself, whatever its unit.
    """
    eps = torch.finfo(narrowest(tree_leaves(as_real(local.params)))).eps
    outputs = [term.linearization.precise for term in local.model.terms]
    of_loss = torch.finfo(narrowest(outputs)).eps * local.loss.abs()
    of_params = [
        size.slopes @ (eps * size.params) + size.curvatures @ (eps * size.params).square()
        for size in sizes_of_blocks(local)
    ]
    of_outputs = torch.stack([term.rounding for term in local.model.terms]).sum()
    return torch.stack(of_params).sum() + of_outputs + LOSS_ROUNDINGS * of_loss


def sizes_of_blocks(local: LocalModel) -> list[BlockSizes]:
    """Return the parameters of every block, with the slope and the curvature along each of them."""
    matrices: Sequence[GaussNewton | FreeMatrix] = local.trials.matrices
    decay, whole = decay_of(local.proximal), is_whole(local.model.leaves, len(local.model.sizes))
    # Of one block without decay, on the side of the columns, both norms are at hand.
    if whole and decay is None and (isinstance(matrices[0], FreeMatrix) or matrices[0].on_columns):
        parts = (local.curvature.params, local.gradient_norm, matrices[0].trace())
        return [BlockSizes(*(part[None] for part in parts))]
    theta = by_block(local.model, local.scaled_params)
    decays = None if decay is None else by_block(local.model, decay)
    blocks = []
    for b, (params, slopes, matrix) in enumerate(zip(theta, local.slopes, matrices, strict=True)):
        # The curvatures of single parameters are the diagonal of G, where that is what is known.
        if isinstance(matrix, FreeMatrix) or matrix.on_columns:
            curvature = matrix.trace() + (0 if decays is None else decays[b].sum())
            blocks.append(BlockSizes(params.norm()[None], slopes.norm()[None], curvature[None]))
        else:
            curvature = matrix.diagonal() + (0 if decays is None else decays[b])
            blocks.append(BlockSizes(params.abs(), slopes.abs(), curvature))
    return blocks


def by_block(
    model: QuadraticModel | FreeModel, vector: Shaped[Tensor, " d"]
) -> list[Shaped[Tensor, " _"]]:
    """Return the parts of a vector along the parameters of every block."""
    if is_whole(model.leaves, len(model.sizes)):
        return [vector]
    return [along_block(vector, block, model.sizes) for block in model.leaves]


def decay_of(proximal: Proximal | None) -> Float[Tensor, " d"] | None:
    """Return the weight decay of every parameter, None where there is none."""
    if proximal is None or not len(proximal.params):
        return None
    return 0 * proximal.params[0] + proximal.decay


def in_params_units(local: LocalModel, vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return a step in the units of the parameters."""
    return vector if local.scale is None else local.scale * vector


def in_model_units(params: PyTree, scale: Float[Tensor, " d"] | None) -> Float[Tensor, " d"]:
    """Return parameters, or a step, in the units of a quadratic model."""
    vector = flattened(params)
    return vector if scale is None else vector / scale


def length_of(params: PyTree, scale: Float[Tensor, " d"] | None) -> Float[Tensor, ""]:
    """Return ‖θ / scale‖."""
    parts = tree_leaves(as_real(params)) if scale is None else [in_model_units(params, scale)]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    length: Tensor = torch.stack(norms).norm()
    return length


def loss_before(model: QuadraticModel | FreeModel, proximal: Proximal | None) -> Float[Tensor, ""]:
    """Return the loss of the samples of the gradient, with its penalty, before a step."""
    loss: Tensor = reduce(torch.add, (term.losses_of_gradient.mean() for term in model.terms))
    if proximal is None or not len(proximal.params):
        return loss
    return loss + _penalty(proximal.decay, proximal.params[0])
