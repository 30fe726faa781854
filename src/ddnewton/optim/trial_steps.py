"""Trial steps of one batch, for any damping from one decomposition, and what a step promises.

The dampings of all directions are δ more than what the blocks say; momentum and weight decay pull a
step to a centre, as derived in `ddnewton.quadratic.proximal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.gram import rmatmat
from ddnewton.damping import check_dampings
from ddnewton.inputs.groups import Block
from ddnewton.optim.adaptation import Curvature
from ddnewton.optim.settings import Complement
from ddnewton.quadratic.directions import directions_of
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import BlockDirections
from ddnewton.quadratic.leafwise import LeafwiseBlock, leafwise_blocks, scaled_matrix, unscaled
from ddnewton.quadratic.proximal import (
    Centre,
    Proximal,
    ProximalBlock,
    centre_of,
    proximal_blocks,
)
from ddnewton.quadratic.quadratic_model import QuadraticModel, to_parameters
from ddnewton.quadratic.solution import solve, without_eigenpairs
from ddnewton.trees import joined
from ddnewton.types import DampingRule

TRIAL_CONDITION = 1e10
"""Up to which ratio of the largest curvature to δ a trial goes without eigenpairs: the rounding of
the matrix is a change of δ by less than 1e-4, and δ itself is a guess."""


class Quadratic(NamedTuple):
    """The quadratic model along some vectors: its slopes, and its curvature between any two."""

    slopes: Float[Tensor, " k"]
    curvatures: Float[Tensor, "k k"]


class TrialSteps(NamedTuple):
    """What trial steps are made of; the matrices are decomposed where that is first needed."""

    model: QuadraticModel
    matrices: Sequence[GaussNewton]
    complement: Complement
    proximal: Proximal | None
    proximal_blocks: Sequence[ProximalBlock]
    leafwise: Sequence[LeafwiseBlock]  # none where a block has one weight decay
    known: list[BlockDirections]  # empty until the matrices are decomposed


def trial_steps(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    complement: Complement,
    proximal: Proximal | None,
) -> TrialSteps:
    """Return the trial steps of a batch."""
    sizes = model.sizes
    pulls: list[ProximalBlock] = []
    leafwise: list[LeafwiseBlock] = []
    if proximal is not None:
        pulls = proximal_blocks(proximal, matrices, model.leaves, sizes)
        leafwise = leafwise_blocks(model, matrices, pulls, proximal.decays)
    return TrialSteps(
        model=model,
        matrices=matrices,
        complement=complement,
        proximal=proximal,
        proximal_blocks=pulls,
        leafwise=leafwise,
        known=[],
    )


def trial_step(trials: TrialSteps, delta: Tensor, momentum: float | Tensor) -> Float[Tensor, " d"]:
    """Return the step for a damping δ, above what the blocks say, and a momentum."""
    model, proximal = trials.model, trials.proximal
    if trials.leafwise:
        return _leafwise_step(trials, delta, momentum)
    # Weight decay is a damping of all directions as well.
    decays = [block.decays[0] for block in trials.proximal_blocks] or [0.0] * len(model.blocks)
    deltas = [delta + decay for decay in decays]
    damped = damped_more(model, deltas)
    scalars = list(map(_scalar, damped.blocks, deltas))
    outside = list(map(partial(_outside, trials.complement), scalars, deltas))
    # A centre is that of the damping outside the kept directions; inside, some is added to it.
    centres = None
    if proximal is not None:
        dampings = [x if y is None else y for x, y in zip(scalars, outside, strict=True)]
        centres = [
            centre_of(block, damping, decay, momentum)
            for block, damping, decay in zip(trials.proximal_blocks, dampings, decays, strict=True)
        ]
    coordinates = _coordinates(trials, damped, outside, centres)
    vectors = to_parameters(damped, trials.matrices, coordinates)
    return _from_centres(trials, vectors, centres)


def _leafwise_step(
    trials: TrialSteps, delta: Tensor, momentum: float | Tensor
) -> Float[Tensor, " d"]:
    """Return the step where decays differ inside a block, as derived in quadratic/leafwise.py."""
    model, blocks = trials.model, trials.leafwise
    dampings = [_scalar(block, delta) for block in damped_more(model, [delta] * len(blocks)).blocks]
    one = torch.ones_like(delta)
    centres = [
        centre_of(pull, block.decays + damping, block.decays, momentum)._replace(delta=one)
        for pull, block, damping in zip(trials.proximal_blocks, blocks, dampings, strict=True)
    ]
    # In scaled coordinates every direction is damped by 1.
    damped = model._replace(blocks=[block._replace(damping=one) for block in model.blocks])
    outside = [None if trials.complement is None else one for _ in blocks]
    scaled = list(map(scaled_matrix, trials.matrices, blocks, dampings))
    coordinates = _coordinates(trials._replace(matrices=scaled, known=[]), damped, outside, centres)
    # Back to the parameters.
    vectors = to_parameters(damped, trials.matrices, coordinates)
    vectors = list(map(unscaled, vectors, trials.matrices, blocks, dampings))
    return _from_centres(trials, vectors, centres)


def _from_centres(
    trials: TrialSteps, vectors: Sequence[Tensor], centres: Sequence[Centre] | None
) -> Float[Tensor, " d"]:
    """Return the step of all leaves from those of the blocks, each from its centre."""
    model = trials.model
    if centres is not None:
        vectors = [
            centre.weights @ block.vectors + vector
            for centre, block, vector in zip(centres, trials.proximal_blocks, vectors, strict=True)
        ]
    sizes = model.sizes
    return joined(vectors, model.leaves, sizes)


def quadratic_along(
    trials: TrialSteps, vectors: Float[Tensor, "k d"], delta: Tensor | None = None
) -> Quadratic:
    """Return the quadratic model along vectors, damped by δ where one is given."""
    model, proximal = trials.model, trials.proximal
    # The loss: gᵀv and vᵀG v.
    sizes = model.sizes
    slopes, curvatures = _of_loss(trials, vectors)
    # The penalty of weight decay.
    if proximal is not None and len(proximal.params):
        decayed = proximal.decay * vectors
        slopes = slopes + decayed @ proximal.params[0]
        curvatures = curvatures + decayed @ vectors.mT
    # The damping, of every block by its own.
    if delta is not None:
        parts = vectors.split(sizes, 1)
        for block in damped_more(model, [delta] * len(model.blocks)).blocks:
            of_block = torch.cat([parts[leaf] for leaf in block.leaves], 1)
            scalar = delta if callable(block.damping) else block.damping
            curvatures = curvatures + scalar * (of_block @ of_block.mT)
    return Quadratic(slopes, curvatures)


def _of_loss(trials: TrialSteps, vectors: Float[Tensor, "k d"]) -> Quadratic:
    """Return the quadratic model of the loss alone along vectors."""
    model, (matrix, *others) = trials.model, trials.matrices
    every_leaf = range(len(model.sizes))
    # By G and g of all parameters. The rounding of G is that of a change of δ, as in the solution
    # without eigenpairs; where these were needed, sums of squares have more digits.
    whole = not others and list(model.leaves[0]) == list(every_leaf)
    if whole and not (matrix.on_columns or trials.known):
        return Quadratic(vectors @ matrix.gradient, vectors @ matrix.entries @ vectors.mT)
    # By the slopes of all columns.
    column_slopes = rmatmat(model.jacobians, every_leaf, vectors.mT)
    weights = model.curvature_weights
    of_curvature = column_slopes[: len(weights)]
    return Quadratic(
        slopes=model.gradient_weights @ column_slopes,
        curvatures=of_curvature.mT @ (weights[:, None] * of_curvature),
    )


def curvature_of(matrices: Sequence[GaussNewton]) -> Curvature:
    """Return the size of the curvature, of the block that has most of it."""
    traces = [matrix.trace() for matrix in matrices]
    means = [trace / len(m.diagonal()) for trace, m in zip(traces, matrices, strict=True)]
    return Curvature(torch.stack(traces).amax(), torch.stack(means).amax())


def damped_more(model: QuadraticModel, deltas: Sequence[Tensor]) -> QuadraticModel:
    """Return the model with the dampings of all directions of every block raised by its δ."""

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

    blocks = [
        block._replace(damping=raised(block.damping, delta))
        for block, delta in zip(model.blocks, deltas, strict=True)
    ]
    return model._replace(blocks=blocks)


def _scalar(block: Block, delta: Tensor) -> Tensor:
    """Return the damping that all directions of a block share: of a rule, only what is added."""
    return delta if callable(block.damping) else torch.as_tensor(block.damping)


def _outside(complement: Complement, scalar: Tensor, delta: Tensor) -> Tensor | None:
    """Return the damping outside the kept directions, that of all of them by its identity."""
    if complement is None:
        return None
    return scalar if complement == "damping" else complement + delta


def _coordinates(
    trials: TrialSteps,
    damped: QuadraticModel,
    outside: Sequence[Tensor | None],
    centres: Sequence[Centre] | None,
) -> list[Float[Tensor, " _"]]:
    """Return the steps of all blocks from their centres, by eigenpairs only where these are due."""
    matrices = trials.matrices
    coordinates = without_eigenpairs(damped, matrices, outside, centres, TRIAL_CONDITION)
    if coordinates is not None:
        return coordinates
    # Decompose the matrices in the first trial that needs it, for all that follow.
    if not trials.known:
        only_kept = trials.complement is None
        trials.known.extend(directions_of(trials.model, matrices, only_kept=only_kept))
    return [
        solve(
            damped,
            directions._replace(block=block),
            outside[b],
            None if centres is None else centres[b],
        ).coordinates
        for b, (directions, block) in enumerate(zip(trials.known, damped.blocks, strict=True))
    ]
