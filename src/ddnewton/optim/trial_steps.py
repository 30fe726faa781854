"""Trial steps of one batch, for any damping from one decomposition, and what a step promises.

The dampings of all directions are δ more than what the blocks say; momentum and weight decay pull a
step to a centre, as derived in `ddnewton.quadratic.proximal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.columns.normal_equations import scaled_rows
from ddnewton.inputs.groups import Block
from ddnewton.optim.free_trials import FreeTrials, Lengths, free_lengths, free_trial_step
from ddnewton.optim.settings import Complement
from ddnewton.quadratic.directions import directions_of
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import BlockDirections
from ddnewton.quadratic.leafwise import centre_in_metric, in_metrics, is_leafwise, metric_of
from ddnewton.quadratic.proximal import Centre, Proximal, ProximalBlock, centre_of, proximal_blocks
from ddnewton.quadratic.quadratic_model import QuadraticModel, to_parameters
from ddnewton.quadratic.shifted import Shifted, of_gradient, shifted, squared_lengths, step_at
from ddnewton.quadratic.solution import damped_more, is_linear, solve, without_eigenpairs
from ddnewton.trees import joined

MOST_FACTORIZATIONS = 6
"""How many dampings are factorized for, before matrices are decomposed for all of them."""

TRIAL_CONDITION = 1e10
"""Up to which ratio of the largest curvature to δ a trial goes without eigenpairs: the rounding of
the matrix is a change of δ by less than 1e-4, and δ itself is a guess."""


@dataclass
class Decompositions:
    """The decompositions of the matrices that trials have made so far."""

    directions: list[BlockDirections] = field(default_factory=list)
    shifted: list[Shifted] = field(default_factory=list)
    factorizations: int = 0


class TrialSteps(NamedTuple):
    """What trial steps are made of; the matrices are decomposed where that is first needed."""

    model: QuadraticModel
    matrices: Sequence[GaussNewton]
    complement: Complement
    proximal: Proximal | None
    proximal_blocks: Sequence[ProximalBlock]
    free: Bool[Tensor, " d"] | None  # the parameters that no bound holds, None for all
    decompositions: Decompositions
    exact: bool  # whether δ so far is below what the matrices resolve


def trial_steps(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    complement: Complement,
    proximal: Proximal | None,
    free: Bool[Tensor, " d"] | None = None,
    *,
    exact: bool = False,
) -> TrialSteps:
    """Return the trial steps of a batch."""
    pulls: list[ProximalBlock] = []
    if proximal is not None:
        scaled = model.scaling.scale is not None
        pulls = proximal_blocks(proximal, matrices, model.leaves, model.sizes, scaled=scaled)
    return TrialSteps(
        model=model,
        matrices=matrices,
        complement=complement,
        proximal=proximal,
        proximal_blocks=pulls,
        free=free,
        decompositions=Decompositions(),
        exact=exact,
    )


def with_blocks(
    trials: TrialSteps | FreeTrials, blocks: Sequence[Block]
) -> TrialSteps | FreeTrials:
    """Return trial steps of blocks with other dampings."""
    return trials._replace(model=trials.model._replace(blocks=blocks))  # type: ignore[arg-type]


def trial_step(
    trials: TrialSteps | FreeTrials, delta: Tensor, momentum: float | Tensor
) -> Float[Tensor, " d"]:
    """Return the step for a damping δ, above what the blocks say, and a momentum."""
    if isinstance(trials, FreeTrials):
        return free_trial_step(trials, delta, momentum)
    model, proximal = trials.model, trials.proximal
    if is_leafwise(trials.proximal_blocks):
        return _leafwise_step(trials, delta, momentum)
    # Weight decay is a damping of all directions as well.
    decays = [block.decay for block in trials.proximal_blocks] or [0.0] * len(model.blocks)
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
    return _from_centres(trials, _vectors(trials, damped, outside, centres), centres)


def _leafwise_step(
    trials: TrialSteps, delta: Tensor, momentum: float | Tensor
) -> Float[Tensor, " d"]:
    """Return the step where decays differ inside a block, as derived in quadratic/leafwise.py."""
    model, pulls = trials.model, trials.proximal_blocks
    damped_blocks = damped_more(model, [delta] * len(model.blocks)).blocks
    dampings = [_scalar(block, delta) for block in damped_blocks]
    metrics = list(map(metric_of, pulls, dampings))
    centres = [
        centre_in_metric(pull, matrix, metric, momentum)
        for pull, matrix, metric in zip(pulls, trials.matrices, metrics, strict=True)
    ]
    # In scaled coordinates every direction is damped by 1.
    scaled, matrices = in_metrics(model, trials.matrices, metrics)
    unit_damping = torch.ones_like(delta)
    damped = scaled._replace(
        blocks=[block._replace(damping=unit_damping) for block in model.blocks]
    )
    outside = [None if trials.complement is None else unit_damping for _ in model.blocks]
    fresh = trials._replace(model=scaled, matrices=matrices, decompositions=Decompositions())
    # Back from there.
    pairs = zip(_vectors(fresh, damped, outside, centres), metrics, strict=True)
    vectors = [vector / metric.sqrt() for vector, metric in pairs]
    return _from_centres(trials, vectors, centres)


def _from_centres(
    trials: TrialSteps, vectors: Sequence[Tensor], centres: Sequence[Centre] | None
) -> Float[Tensor, " d"]:
    """Return the step of all leaves from those of the blocks, each from its centre."""
    model = trials.model
    if centres is not None:
        pairs = zip(centres, vectors, strict=True)
        vectors = [centre.vector + vector for centre, vector in pairs]
    step = joined(vectors, model.leaves, model.sizes)
    return step if trials.free is None else trials.free * step


def _scalar(block: Block, delta: Tensor) -> Tensor:
    """Return the damping that all directions of a block share: of a rule, only what is added."""
    return delta if callable(block.damping) else torch.as_tensor(block.damping, dtype=delta.dtype)


def _outside(complement: Complement, scalar: Tensor, delta: Tensor) -> Tensor | None:
    """Return the damping outside the kept directions, that of all of them by its identity."""
    if complement is None:
        return None
    return scalar if complement == "damping" else complement + delta


def _vectors(
    trials: TrialSteps,
    damped: QuadraticModel,
    outside: Sequence[Tensor | None],
    centres: Sequence[Centre] | None,
) -> list[Float[Tensor, " _"]]:
    """Return the steps of all blocks from their centres, by eigenpairs only where these are due."""
    matrices, decompositions = trials.matrices, trials.decompositions
    if not decompositions.directions and is_linear(damped, outside):
        # Factorize for each of the first few dampings, and decompose for all that follow.
        coordinates = None
        if not decompositions.shifted and decompositions.factorizations < MOST_FACTORIZATIONS:
            decompositions.factorizations += 1
            options = (outside, centres, TRIAL_CONDITION)
            coordinates = without_eigenpairs(damped, matrices, *options)
        if coordinates is not None:
            return to_parameters(damped, matrices, coordinates)
        if centres is None and (steps := _shifted(trials)) is not None:
            return _steps_at(steps, damped)
    # Directions, in the first trial that needs them, for all that follow.
    if not decompositions.directions:
        only_kept = trials.complement is None
        decompositions.directions.extend(directions_of(trials.model, matrices, only_kept=only_kept))
    coordinates = []
    pairs = zip(decompositions.directions, damped.blocks, strict=True)
    for b, (directions, block) in enumerate(pairs):
        centre = None if centres is None else centres[b]
        solution = solve(damped, directions._replace(block=block), outside[b], centre)
        coordinates.append(solution.coordinates)
    return to_parameters(damped, matrices, coordinates)


def _shifted(trials: TrialSteps) -> list[Shifted] | None:
    """Return the decompositions of all blocks, None where one has none; made in the first call."""
    model, decompositions = trials.model, trials.decompositions
    if not decompositions.shifted:
        # Of every block, by its rows or by its matrix.
        options = {"everywhere": trials.complement is not None, "exact": trials.exact}
        for matrix, leaves in zip(trials.matrices, model.leaves, strict=True):
            rows = partial(scaled_rows, model.curvature_jacobians, leaves, model.curvature_weights)
            d = sum(model.sizes[leaf] for leaf in leaves)
            of_block = shifted(matrix, model.gradient_weights, rows, d, **options)
            if of_block is None:
                decompositions.shifted.clear()
                return None
            decompositions.shifted.append(of_block)
    return decompositions.shifted


def _steps_at(steps: Sequence[Shifted], damped: QuadraticModel) -> list[Float[Tensor, " _"]]:
    """Return the steps of all blocks, each for its damping."""
    like = steps[0].evals[0]
    return list(map(step_at, steps, [_scalar(block, like).to(like) for block in damped.blocks]))


def further_step(
    trials: TrialSteps, delta: Tensor, weights: Float[Tensor, " i"]
) -> Float[Tensor, " d"]:
    """Return the step of another gradient A₁ u, by the weights u of the columns of the curvature.

    The matrices must have been decomposed by a trial before it.
    """
    steps = [of_gradient(of_block, weights) for of_block in trials.decompositions.shifted]
    damped = damped_more(trials.model, [delta] * len(steps))
    return _from_centres(trials, _steps_at(steps, damped), None)


def lengths_at(trials: TrialSteps | FreeTrials) -> Lengths | None:
    """Return the lengths of the steps for some dampings; None where each of them takes a step."""
    if isinstance(trials, FreeTrials):
        return free_lengths(trials)
    # Where nothing but the gradient makes a step, and linear systems give it.
    model = trials.model
    if trials.proximal is not None or trials.complement is not None:
        return None
    steps = _shifted(trials) if is_linear(model, [None] * len(model.blocks)) else None
    if steps is None:
        return None
    dampings = [_scalar(block, steps[0].evals[0]) for block in model.blocks]

    def lengths(deltas: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        pairs = zip(steps, dampings, strict=True)
        squares = [squared_lengths(of_block, deltas + damping) for of_block, damping in pairs]
        return torch.stack(squares).sum(0).sqrt()

    least = 2 * torch.stack([of_block.rounding for of_block in steps]).amax()
    return Lengths(lengths, least, lambda delta: False)
