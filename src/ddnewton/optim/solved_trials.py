"""By what trial steps are solved: factorizations for the first few, then decompositions.

A factorization serves one damping, a decomposition all of them, and is made where that is first
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.columns.gram import matmat
from ddnewton.columns.normal_equations import scaled_rows
from ddnewton.inputs.groups import Block, is_whole
from ddnewton.optim.free_trials import FreeTrials, Lengths, free_lengths
from ddnewton.optim.settings import Complement
from ddnewton.quadratic.directions import directions_of
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import BlockDirections
from ddnewton.quadratic.proximal import Centre, Proximal, ProximalBlock, proximal_blocks
from ddnewton.quadratic.quadratic_model import QuadraticModel, to_parameters
from ddnewton.quadratic.shifted import Shifted, of_gradient, shifted, squared_lengths, step_at
from ddnewton.quadratic.solution import damped_more, is_linear, solve, without_eigenpairs
from ddnewton.scalars import scalar_like
from ddnewton.transforms import any_known
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
    gradients: Sequence[Float[Tensor, " _"]]  # of the blocks, without the penalty
    complement: Complement
    proximal: Proximal | None
    proximal_blocks: Sequence[ProximalBlock]
    free: Bool[Tensor, " d"] | None  # the parameters that no bound holds, None for all
    decompositions: Decompositions
    exact: Bool[Tensor, ""]  # whether δ so far is below what the matrices resolve


def trial_steps(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    gradients: Sequence[Float[Tensor, " _"]],
    complement: Complement,
    proximal: Proximal | None,
    free: Bool[Tensor, " d"] | None,
    *,
    exact: Bool[Tensor, ""],
) -> TrialSteps:
    """Return the trial steps of a batch."""
    pulls: list[ProximalBlock] = []
    if proximal is not None:
        pulls = proximal_blocks(proximal, model, scaled=model.scaling.scale is not None)
    return TrialSteps(
        model=model,
        matrices=matrices,
        gradients=gradients,
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


def from_centres(
    trials: TrialSteps, vectors: Sequence[Tensor], centres: Sequence[Centre] | None
) -> Float[Tensor, "*k d"]:
    """Return the steps of all leaves from those of the blocks, each from its centre."""
    model = trials.model
    if centres is not None:
        pairs = zip(centres, vectors, strict=True)
        vectors = [centre.vector + vector for centre, vector in pairs]
    whole = is_whole(model.leaves, len(model.sizes))
    step = vectors[0] if whole else joined(vectors, model.leaves, model.sizes)
    return step if trials.free is None else trials.free * step


def damping_of_all(block: Block, delta: Tensor) -> Tensor:
    """Return the damping that all directions of a block share: of a rule, only what is added."""
    return delta if callable(block.damping) else scalar_like(block.damping, delta)


def by_factorizations(
    trials: TrialSteps,
    damped: QuadraticModel,
    outside: Sequence[Tensor | None],
    centres: Sequence[Centre] | None,
) -> list[Float[Tensor, " _"]] | None:
    """Return the coordinates of steps from their centres by a factorization for each damping.

    It is None from where on all matrices are decomposed.
    """
    decompositions = trials.decompositions
    if decompositions.directions or decompositions.shifted or not is_linear(damped, outside):
        return None
    if decompositions.factorizations >= MOST_FACTORIZATIONS:
        return None
    decompositions.factorizations += 1
    return without_eigenpairs(damped, trials.matrices, outside, centres, TRIAL_CONDITION)


def from_coordinates(
    trials: TrialSteps,
    coordinates: Sequence[Float[Tensor, "... _"]],
    outside: Sequence[Float[Tensor, "..."] | None],
) -> list[Float[Tensor, "... _"]]:
    """Return the vectors of steps by factorizations, of all blocks in one visit of the model.

    What they have of the gradient's own columns is that of −g / δ, and g is at hand.
    """
    # Of all columns, where the gradient has none of its own.
    model, i = trials.model, len(trials.model.curvature_weights)
    dampings = [damping[..., None] for damping in outside if damping is not None]
    by_gradient = len(model.gradient_weights) > i and len(dampings) == len(coordinates)
    if not (by_gradient and all(matrix.on_columns for matrix in trials.matrices)):
        return to_parameters(model, trials.matrices, coordinates)
    # Of those of the curvature, and a multiple of the gradient.
    pairs = zip(coordinates, dampings, strict=True)
    first = [of_block[..., :i] + model.gradient_weights[:i] / delta for of_block, delta in pairs]
    flat = [of_block.reshape(-1, i) for of_block in first]
    inside = matmat(model.curvature_jacobians, model.leaves, flat)
    inside = [v.reshape(*w.shape[:-1], -1) for v, w in zip(inside, first, strict=True)]
    triples = zip(inside, trials.gradients, dampings, strict=True)
    return [torch.addcdiv(vector, gradient, delta, value=-1) for vector, gradient, delta in triples]


def column_slopes_of(
    trials: TrialSteps,
    coordinates: Sequence[Float[Tensor, " _"]],
    centres: Sequence[Centre] | None,
) -> Float[Tensor, " i"] | None:
    """Return A₁ᵀs of a step by its coordinates, where matrices are of products of columns."""
    if trials.free is not None or not all(matrix.on_columns for matrix in trials.matrices):
        return None
    pairs = zip(trials.matrices, coordinates, strict=True)
    slopes = [matrix.entries.mT @ of_block for matrix, of_block in pairs]
    slopes += [] if centres is None else [centre.column_slopes for centre in centres]
    return reduce(torch.add, slopes)


def by_decompositions(
    trials: TrialSteps,
    damped: QuadraticModel,
    outside: Sequence[Tensor | None],
    centres: Sequence[Centre] | None,
) -> list[Float[Tensor, " _"]]:
    """Return the steps of all blocks from their centres, by decompositions for all dampings."""
    matrices, decompositions = trials.matrices, trials.decompositions
    by_shifts = not decompositions.directions and centres is None and is_linear(damped, outside)
    if by_shifts and (steps := _shifted(trials)) is not None:
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
        options = {"everywhere": trials.complement is not None, "exact": any_known(trials.exact)}
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
    return list(
        map(step_at, steps, [damping_of_all(block, like).to(like) for block in damped.blocks])
    )


def further_step(
    trials: TrialSteps, delta: Tensor, weights: Float[Tensor, " i"]
) -> Float[Tensor, " d"]:
    """Return the step of another gradient A₁ u, by the weights u of the columns of the curvature.

    The matrices must have been decomposed by a trial before it.
    """
    steps = [of_gradient(of_block, weights) for of_block in trials.decompositions.shifted]
    damped = damped_more(trials.model, [delta] * len(steps))
    return from_centres(trials, _steps_at(steps, damped), None)


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
    dampings = [damping_of_all(block, steps[0].evals[0]) for block in model.blocks]

    def lengths(deltas: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        pairs = zip(steps, dampings, strict=True)
        squares = [squared_lengths(of_block, deltas + damping) for of_block, damping in pairs]
        return torch.stack(squares).sum(0).sqrt()

    least = 2 * torch.stack([of_block.rounding for of_block in steps]).amax()
    return Lengths(lengths, least, lambda delta: False)
