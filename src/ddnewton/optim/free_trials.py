r"""Trial steps of one batch by products, for any damping from one Krylov space or its directions.

With a momentum μ, the step before s' and weight decay w, the step of a damping δ of all directions
is μ s' + x with

    (G + (δ + w) I) x = −(g + w (θ + μ s') + μ G s'),

whose right side is the same for every δ: all trials of a batch share a space (`iterative.krylov`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.groups import Block
from ddnewton.iterative.krylov import Krylov, grown
from ddnewton.optim.free_directions import Pull, step_along
from ddnewton.optim.free_matrices import FreeMatrix
from ddnewton.optim.settings import Complement
from ddnewton.quadratic.matrix_free.along import Along, along_of
from ddnewton.quadratic.matrix_free.free_model import FreeModel, operator_of
from ddnewton.quadratic.matrix_free.steps import is_linear
from ddnewton.quadratic.proximal import Proximal
from ddnewton.trees import along_block, joined

SAME_ROUNDINGS = 1e-14
"""Up to which share of its length a vector may be off a multiple of another, and count as one."""

SPACE_BYTES, SPACE_VECTORS = 2**30, 200
"""Up to which size, and how many, the vectors of a Krylov space are kept. One cut short makes
a shorter step, as in Steihaug's trust region, and a step is judged by the loss it leads to."""


class Space(NamedTuple):
    """The Krylov space of a right side, and G of the centre that this is made with."""

    krylov: Krylov
    of_centre: Float[Tensor, " d"]


class Tried(NamedTuple):
    """A step s, and G s of all parameters."""

    step: Float[Tensor, " d"]
    image: Float[Tensor, " d"]


class FreeTrials(NamedTuple):
    """What trial steps by products are made of; spaces and directions grow as trials need them."""

    model: FreeModel
    matrices: Sequence[FreeMatrix]
    complement: Complement
    proximal: Proximal | None
    free: Bool[Tensor, " d"] | None  # the parameters that no bound holds, None for all
    spaces: dict[tuple[int, float], Space]  # of every block and momentum
    directions: dict[int, Along]  # of every block
    tried: list[Tried]  # the step of the last trial, where its product came with it


def free_trial_step(
    trials: FreeTrials, delta: Tensor, momentum: float | Tensor
) -> Float[Tensor, " d"]:
    """Return the step for a damping δ, above what the blocks say, and a momentum."""
    model = trials.model
    steps = [
        _step_of_block(trials, number, delta, float(momentum))
        for number in range(len(model.blocks))
    ]
    step = joined(steps, model.leaves, model.sizes)
    return step if trials.free is None else trials.free * step


def _step_of_block(
    trials: FreeTrials, number: int, delta: Tensor, momentum: float
) -> Float[Tensor, " d"]:
    """Return the step of a block: of a linear system, or along directions."""
    block = trials.model.blocks[number]
    # Of a linear system, in the space of its right side.
    if _is_linear(trials, block):
        return _linear_step(trials, number, delta, momentum)
    # Along directions, computed in the first trial.
    if number not in trials.directions:
        operator = trials.matrices[number].operator
        trials.directions[number] = along_of(trials.model, operator, block)
    centre, params = _centre(trials, block, momentum), _decayed_params(trials, block)
    pull, gradient = Pull(centre, params, _decay(trials)), trials.matrices[number].gradient
    directions = trials.directions[number]
    return step_along(directions, block, gradient, pull, delta, trials.complement)


def _linear_step(
    trials: FreeTrials, number: int, delta: Tensor, momentum: float
) -> Float[Tensor, " d"]:
    """Return the step of a block that solves a linear system; note G s, which comes with it."""
    block = trials.model.blocks[number]
    krylov, of_centre = _space(trials, number, momentum)
    damping = _damping(trials, block, delta)
    grown(krylov, float(damping), trials.model.arguments.tol)
    image, solution = krylov.image_and_solution(damping)
    step: Tensor = _centre(trials, block, momentum) - solution
    if len(trials.model.blocks) == 1 and _is_all(trials):
        trials.tried[:] = [Tried(step, of_centre - image)]
    return step


def _is_all(trials: FreeTrials) -> bool:
    """Return whether the first block has all parameters in their order."""
    return list(trials.model.leaves[0]) == list(range(len(trials.model.sizes)))


def _is_linear(trials: FreeTrials, block: Block) -> bool:
    """Return whether a step of a block solves a linear system."""
    complement = block.damping if trials.complement == "damping" else trials.complement
    return is_linear(trials.model, block, None if callable(complement) else complement)


def _damping(trials: FreeTrials, block: Block, delta: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
    """Return the damping of all directions of a block, weight decay included."""
    assert not callable(block.damping)
    return delta + block.damping + _decay(trials)


def _decay(trials: FreeTrials) -> float | Tensor:
    """Return the one weight decay of all parameters."""
    proximal = trials.proximal
    if proximal is None or not len(proximal.params):
        return 0.0
    if isinstance(proximal.decay, Tensor) and proximal.decay.ndim:
        rule = 'weight_decay must be one number with gram="free", and in the units of the steps'
        got = "one that differs between parameters"
        raise BadValue(sentence(rule, got, "Pass one number, and scale=None."))
    return proximal.decay


def _space(trials: FreeTrials, number: int, momentum: float) -> Space:
    """Return the Krylov space of a block, begun in the first trial with a momentum."""
    key = (number, momentum if trials.proximal is not None else 0.0)
    if key not in trials.spaces:
        # g + w (θ + μ s') + μ G s'.
        block, matrix = trials.model.blocks[number], trials.matrices[number]
        operator, right = matrix.operator, matrix.gradient
        centre, decay = _centre(trials, block, momentum), _decay(trials)
        theta = _decayed_params(trials, block)
        if theta is not None:
            right = right + decay * (theta + centre)
        of_centre = operator.along(centre) if bool((centre != 0).any()) else 0 * centre
        right = right + of_centre
        # With g = B t it is B (t + Bᵀ μ s'), but for weight decay.
        length = trials.model.square**0.5 + max(0.0, float(centre @ of_centre)) ** 0.5
        krylov = Krylov(
            product=operator.along,
            right=right,
            rounding=operator.eps,
            limit=max(1, min(SPACE_VECTORS, SPACE_BYTES // right.nbytes)),
            squared=length**2 if theta is None else math.inf,
        )
        trials.spaces[key] = Space(krylov, of_centre)
    return trials.spaces[key]


def _decayed_params(trials: FreeTrials, block: Block) -> Float[Tensor, " d"] | None:
    """Return the parameters of a block, None without weight decay."""
    if trials.proximal is None or not len(trials.proximal.params):
        return None
    return along_block(trials.proximal.params[0], block.leaves, trials.model.sizes)


def _centre(trials: FreeTrials, block: Block, momentum: float) -> Float[Tensor, " d"]:
    """Return μ s', the part of the step before along the parameters of a block."""
    sizes, proximal = trials.model.sizes, trials.proximal
    if proximal is None or not len(proximal.previous) or momentum == 0:
        like = trials.matrices[0].gradient
        return like.new_zeros(sum(sizes[leaf] for leaf in block.leaves))
    return momentum * along_block(proximal.previous[0], block.leaves, sizes)


class Lengths(NamedTuple):
    """The lengths of steps for some dampings, which fall with these from the least one upwards.

    Those by products are of the spaces so far: ``grow`` makes these large enough for a damping, and
    says whether that has changed them.
    """

    of_dampings: Callable[[Float[Tensor, " k"]], Float[Tensor, " k"]]
    least: Float[Tensor, ""]
    grow: Callable[[Float[Tensor, ""]], bool]


def free_lengths(trials: FreeTrials) -> Lengths | None:
    """Return the lengths of steps that solve linear systems, None where each takes a step."""
    model = trials.model
    if trials.proximal is not None or trials.complement is not None:
        return None
    if not all(_is_linear(trials, block) for block in model.blocks):
        return None
    spaces = [_space(trials, number, 0.0).krylov for number in range(len(model.blocks))]

    # ‖s(δ)‖, of all blocks together.
    def lengths(deltas: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        squares = [
            space.lengths(_damping(trials, block, deltas)).square()
            for space, block in zip(spaces, model.blocks, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt()

    # More of every space, until it is accurate enough for a damping.
    def grow(delta: Float[Tensor, ""]) -> bool:
        counts = [len(space.vectors) for space in spaces]
        for space, block in zip(spaces, model.blocks, strict=True):
            grown(space, float(_damping(trials, block, delta)), model.arguments.tol)
        return counts != [len(space.vectors) for space in spaces]

    # The least damping that stands out from rounding.
    traces = torch.stack([matrix.trace() for matrix in trials.matrices])
    return Lengths(lengths, 1e-15 * traces.amax(), grow)


def along_all(trials: FreeTrials, vectors: Float[Tensor, "k d"]) -> tuple[Tensor, Tensor]:
    """Return slopes gᵀv and curvatures vᵀG v' of the loss between vectors of all parameters."""
    model = trials.model
    operator, gradient = trials.matrices[0].operator, trials.matrices[0].gradient
    if len(model.blocks) > 1 or not _is_all(trials):
        operator = operator_of(model, range(len(model.sizes)))
        gradient = operator.gradient()
    images = _images_of_tried(trials, vectors)
    if images is None:
        images = operator.product(vectors)
    return vectors @ gradient, vectors @ images.mT


def _images_of_tried(
    trials: FreeTrials, vectors: Float[Tensor, "k d"]
) -> Float[Tensor, "1 d"] | None:
    """Return G v of a vector that is a multiple of the last step, None where it is none."""
    if len(vectors) != 1 or not trials.tried:
        return None
    ((step, image),), vector = trials.tried, vectors[0]
    square = step.square().sum()
    multiple = torch.where(square > 0, step @ vector / square, 0)
    same = (vector - multiple * step).norm() <= SAME_ROUNDINGS * vector.norm()
    return multiple * image[None] if bool(same) else None
