"""Trial steps: of one batch, for any damping, from one decomposition; and what a step promises.

The dampings of all directions are δ more than what the blocks say. With momentum μ (Goldshlager,
Abrahamsen, Lin, 2024, arXiv 2401.10190) and weight decay w a step is the minimum over s of

    gᵀs + ½ sᵀG s + ½ δ ‖s − μ s'‖² + ½ w ‖θ + s‖²,        s' the step before,

so that damping pulls it to c = (δ μ s' − w θ) / (δ + w), with δ + w for δ: see
`ddnewton.quadratic.solution`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.gram import is_gram, rmatmat
from ddnewton.damping import check_dampings
from ddnewton.optim.adaptation import Curvature
from ddnewton.quadratic.directions import BlockDirections, directions_of
from ddnewton.quadratic.quadratic_model import GaussNewton, QuadraticModel, to_parameters
from ddnewton.quadratic.solution import Centre, solve, without_eigenpairs
from ddnewton.trees import joined
from ddnewton.types import DampingRule

TRIAL_CONDITION = 1e10
"""Up to which ratio of the largest curvature to δ a trial goes without eigenpairs: the rounding of
the matrix is a change of δ by less than 1e-4, and δ itself is a guess."""

Complement: TypeAlias = float | Literal["damping"] | None


class Proximal(NamedTuple):
    """What pulls a step besides the gradient: the step before, and, if they decay, the parameters.

    A vector that does not pull is none.
    """

    previous: Float[Tensor, "_ d"]
    params: Float[Tensor, "_ d"]
    decay: float


class Quadratic(NamedTuple):
    """The quadratic model along some vectors: its slopes, and its curvature between any two."""

    slopes: Float[Tensor, " k"]
    curvatures: Float[Tensor, "k k"]


class Trials(NamedTuple):
    """Steps for any damping δ and momentum, and the quadratic model of the loss along vectors."""

    step: Callable[[Tensor, float | Tensor], Float[Tensor, " d"]]
    model: Callable[[Float[Tensor, "k d"], Tensor | None], Quadratic]  # damped by δ, or not
    known: Callable[[], list[BlockDirections] | None]  # the directions, if any were needed


def trials(
    problem: QuadraticModel,
    systems: Sequence[GaussNewton],
    complement: Complement,
    inertia: Proximal | None,
) -> Trials:
    """Return the trial steps of a problem."""
    sizes = [leaf.numel() for leaf in problem.model.leaves]
    leaves = [block.leaves for block in problem.blocks]
    pulls = None if inertia is None else _pulls(problem, systems, inertia, sizes)

    @cache
    def directions() -> list[BlockDirections]:
        return directions_of(problem, systems, only_kept=complement is None)

    def step(delta: Tensor, momentum: float | Tensor) -> Float[Tensor, " d"]:
        decay = 0.0 if inertia is None else inertia.decay
        damped = with_more(problem, delta + decay)
        scalars = [
            delta + decay if callable(block.damping) else torch.as_tensor(block.damping)
            for block in damped.blocks
        ]
        outside = [_outside(complement, scalar, delta + decay) for scalar in scalars]
        if inertia is None or pulls is None:
            return joined(_lifted(damped, systems, outside, directions, None), leaves, sizes)
        # A centre is that of the damping outside the kept directions; inside, some is added to it.
        usual = [x if each is None else each for x, each in zip(scalars, outside, strict=True)]
        weights = [_weights(inertia, x, momentum) for x in usual]
        centres = [
            _centre(inertia, pull, w, x, momentum)
            for pull, w, x in zip(pulls, weights, usual, strict=True)
        ]
        moved = _lifted(damped, systems, outside, directions, centres)
        parts = [
            w @ pull.vectors + each for pull, w, each in zip(pulls, weights, moved, strict=True)
        ]
        return joined(parts, leaves, sizes)

    def model(vectors: Float[Tensor, "k d"], delta: Tensor | None) -> Quadratic:
        along = rmatmat(problem.columns, range(len(sizes)), vectors.mT)
        i = len(problem.curvature_weights)
        slopes = problem.gradient_weights @ along
        curvatures = along[:i].mT @ (problem.curvature_weights[:, None] * along[:i])
        if inertia is not None and inertia.decay:
            slopes = slopes + inertia.decay * (vectors @ inertia.params[0])
            curvatures = curvatures + inertia.decay * (vectors @ vectors.mT)
        if delta is not None:
            parts = vectors.split(sizes, 1)
            for block, more in zip(problem.blocks, with_more(problem, delta).blocks, strict=True):
                own = torch.cat([parts[leaf] for leaf in block.leaves], 1)
                scalar = delta if callable(more.damping) else more.damping
                curvatures = curvatures + scalar * (own @ own.mT)
        return Quadratic(slopes, curvatures)

    def known() -> list[BlockDirections] | None:
        return directions() if directions.cache_info().currsize else None

    return Trials(step, model, known)


def curvature_of(systems: Sequence[GaussNewton]) -> Curvature:
    """Return the size of the curvature, of the block that has most of it."""
    traces, means = [], []
    for _, weights, matrix in systems:
        diagonal = matrix.diagonal()
        by_columns = is_gram(matrix, weights)
        traces.append((weights * diagonal if by_columns else diagonal).sum())
        means.append(traces[-1] / len(diagonal))
    return Curvature(torch.stack(traces).amax(), torch.stack(means).amax())


def with_more(problem: QuadraticModel, delta: Tensor) -> QuadraticModel:
    """Return the problem with the dampings of all directions raised by δ."""

    def more(damping: float | Tensor | DampingRule) -> float | Tensor | DampingRule:
        if not callable(damping):
            return damping + delta
        rule = damping

        def higher(*known: Tensor) -> Tensor:
            dampings = rule(*known)
            check_dampings(dampings, known[0].shape[0])
            return dampings + delta.to(dampings)

        return higher

    blocks = [block._replace(damping=more(block.damping)) for block in problem.blocks]
    return problem._replace(blocks=blocks)


def _outside(complement: Complement, scalar: Tensor, more: Tensor) -> Tensor | None:
    """Return the damping outside the kept directions, that of all of them by its identity."""
    if complement is None:
        return None
    return scalar if complement == "damping" else complement + more


def _weights(inertia: Proximal, delta: Tensor, momentum: float | Tensor) -> Float[Tensor, " v"]:
    """Return how much of the step before, and of the parameters, the centre is."""
    decay = inertia.decay
    moving = momentum * (delta - decay) / delta if decay else delta * 0 + momentum
    shares = [moving.expand(len(inertia.previous))]
    shares.append((-decay / delta if decay else delta * 0).expand(len(inertia.params)))
    return torch.cat(shares)


class ProximalBlock(NamedTuple):
    """What pulls on a block, and the slopes of the columns along it."""

    vectors: Float[Tensor, "v d"]
    slopes: Float[Tensor, "a v"]


def _centre(
    inertia: Proximal,
    pull: ProximalBlock,
    weights: Float[Tensor, " v"],
    delta: Tensor,
    momentum: float | Tensor,
) -> Centre:
    """Return the centre that pulls make, and how far weight decay has moved it."""
    alone = _weights(inertia._replace(decay=0.0), delta, momentum)
    return Centre(pull.slopes @ weights, pull.slopes @ (weights - alone), delta)


def _pulls(
    problem: QuadraticModel, systems: Sequence[GaussNewton], inertia: Proximal, sizes: Sequence[int]
) -> list[ProximalBlock]:
    parts = torch.cat([inertia.previous, inertia.params]).split(list(sizes), 1)
    vectors = [torch.cat([parts[leaf] for leaf in block.leaves], 1) for block in problem.blocks]
    return [
        ProximalBlock(each, system.columns.rmatmat(each.mT))
        for each, system in zip(vectors, systems, strict=True)
    ]


def _lifted(
    problem: QuadraticModel,
    systems: Sequence[GaussNewton],
    outside: Sequence[float | Tensor | None],
    directions: Callable[[], list[BlockDirections]],
    centres: Sequence[Centre] | None,
) -> list[Float[Tensor, " _"]]:
    """Return the steps of all blocks, from their centres."""
    coordinates = without_eigenpairs(problem, systems, outside, centres, TRIAL_CONDITION)
    if coordinates is None:
        coordinates = [
            solve(
                problem,
                along._replace(block=block),
                outside[b],
                None if centres is None else centres[b],
            ).coordinates
            for b, (along, block) in enumerate(zip(directions(), problem.blocks, strict=True))
        ]
    return to_parameters(problem, systems, coordinates)
