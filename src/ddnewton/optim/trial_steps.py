"""Trial steps of one batch, for any damping, and with a momentum.

The dampings of all directions are δ more than what the blocks say; momentum and weight decay pull a
step to a centre, as derived in `ddnewton.quadratic.proximal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.optim.free_trials import FreeTrials, free_trial_step
from ddnewton.optim.settings import Complement
from ddnewton.optim.solved_trials import (
    Decompositions,
    TrialSteps,
    by_decompositions,
    by_factorizations,
    column_slopes_of,
    damping_of_all,
    from_centres,
    from_coordinates,
)
from ddnewton.quadratic.leafwise import centre_in_metric, in_metrics, is_leafwise, metric_of
from ddnewton.quadratic.proximal import Centre, centre_of
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.quadratic.solution import damped_more
from ddnewton.trees import chunks

STEP_BYTES = 2**28
"""How much memory steps may take that are made in one visit of the model."""


class TrialStep(NamedTuple):
    """A step s, and the slopes A₁ᵀs of the columns of the curvature where they come with it."""

    vector: Float[Tensor, " d"]
    column_slopes: Float[Tensor, " i"] | None


def trial_step(
    trials: TrialSteps | FreeTrials, delta: Tensor, momentum: float | Tensor
) -> TrialStep:
    """Return the step for a damping δ, above what the blocks say, and a momentum."""
    if isinstance(trials, FreeTrials):
        return TrialStep(free_trial_step(trials, delta, momentum), None)
    if is_leafwise(trials.proximal_blocks):
        return TrialStep(_leafwise_step(trials, delta, momentum), None)
    asked = _asked(trials, delta, momentum)
    vectors, column_slopes = _solved(trials, asked)
    return TrialStep(from_centres(trials, vectors, asked.centres), column_slopes)


def trial_vectors(
    trials: TrialSteps | FreeTrials, deltas: Sequence[Tensor]
) -> Iterator[Float[Tensor, " d"]]:
    """Yield the steps for some dampings without momentum, many from one visit of the model."""
    if (
        isinstance(trials, FreeTrials)
        or is_leafwise(trials.proximal_blocks)
        or _asked(trials, deltas[0], 0.0).centres
    ):
        yield from (trial_step(trials, delta, 0.0).vector for delta in deltas)
        return
    # As many as fit into the memory for them.
    count = max(1, STEP_BYTES // (torch.float64.itemsize * sum(trials.model.sizes)))
    for part in chunks(len(deltas), count):
        asked = [_asked(trials, delta, 0.0) for delta in deltas[part]]
        coordinates = [by_factorizations(trials, *of_delta) for of_delta in asked]
        if any(of_delta is None for of_delta in coordinates):
            yield from (trial_step(trials, delta, 0.0).vector for delta in deltas[part])
            continue
        of_blocks = [torch.stack(of_block) for of_block in zip(*coordinates, strict=True)]
        outside = [
            None if None in dampings else torch.stack(dampings)
            for dampings in zip(*(of_delta.outside for of_delta in asked), strict=True)
        ]
        yield from from_centres(trials, from_coordinates(trials, of_blocks, outside), None)


class _Asked(NamedTuple):
    """The model with the dampings of a trial, those outside the kept directions, and centres."""

    damped: QuadraticModel
    outside: Sequence[Tensor | None]
    centres: Sequence[Centre] | None


def _asked(trials: TrialSteps, delta: Tensor, momentum: float | Tensor) -> _Asked:
    """Return dampings and centres for a δ, above what the blocks say, and a momentum."""
    # Weight decay is a damping of all directions as well.
    model, pulls = trials.model, trials.proximal_blocks
    decays = [block.decay for block in pulls] or [0.0] * len(model.blocks)
    deltas = [delta + decay for decay in decays] if pulls else [delta] * len(decays)
    damped = damped_more(model, deltas)
    scalars = list(map(damping_of_all, damped.blocks, deltas))
    outside = list(map(partial(_outside, trials.complement), scalars, deltas))
    # A centre is that of the damping outside the kept directions; inside, some is added to it.
    decayed = any(pull.counts[1] for pull in pulls)
    if not decayed and not isinstance(momentum, Tensor) and momentum == 0:
        return _Asked(damped, outside, None)
    dampings = [x if y is None else y for x, y in zip(scalars, outside, strict=True)]
    centres = [
        centre_of(block, damping, decay, momentum)
        for block, damping, decay in zip(pulls, dampings, decays, strict=True)
    ]
    return _Asked(damped, outside, centres or None)


def _solved(
    trials: TrialSteps, asked: _Asked
) -> tuple[list[Float[Tensor, " _"]], Float[Tensor, " i"] | None]:
    """Return the steps of all blocks from their centres, and A₁ᵀs where it comes with them."""
    coordinates = by_factorizations(trials, *asked)
    if coordinates is None:
        return by_decompositions(trials, *asked), None
    vectors = from_coordinates(trials, coordinates, asked.outside)
    return vectors, column_slopes_of(trials, coordinates, asked.centres)


def _leafwise_step(
    trials: TrialSteps, delta: Tensor, momentum: float | Tensor
) -> Float[Tensor, " d"]:
    """Return the step where decays differ inside a block, as derived in quadratic/leafwise.py."""
    model, pulls = trials.model, trials.proximal_blocks
    damped_blocks = damped_more(model, [delta] * len(model.blocks)).blocks
    dampings = [damping_of_all(block, delta) for block in damped_blocks]
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
    pairs = zip(trials.gradients, metrics, strict=True)
    fresh = trials._replace(
        model=scaled,
        matrices=matrices,
        gradients=[gradient / metric.sqrt() for gradient, metric in pairs],
        decompositions=Decompositions(),
    )
    # Back from there.
    vectors, _ = _solved(fresh, _Asked(damped, outside, centres))
    vectors = [vector / metric.sqrt() for vector, metric in zip(vectors, metrics, strict=True)]
    return from_centres(trials, vectors, centres)


def _outside(complement: Complement, scalar: Tensor, delta: Tensor) -> Tensor | None:
    """Return the damping outside the kept directions, that of all of them by its identity."""
    if complement is None:
        return None
    return scalar if complement == "damping" else complement + delta
