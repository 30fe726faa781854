r"""Trial steps of one batch by products, for any damping from one Krylov space or its directions.

With a momentum μ, the step before s' and weight decay w, the step of a damping δ of all directions
is μ s' + x with

    (G + (δ + w) I) x = −(g + w (θ + μ s') + μ G s'),

whose right side is the same for every δ: all trials of a batch share a space (`iterative.krylov`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.groups import Block
from ddnewton.iterative.krylov import Krylov, grown
from ddnewton.optim.free_directions import Along, Pull, along_of, step_along
from ddnewton.optim.settings import Complement
from ddnewton.quadratic.matrix_free.free_model import FreeModel
from ddnewton.quadratic.matrix_free.operator import Operator, operator_of
from ddnewton.quadratic.matrix_free.steps import is_linear
from ddnewton.quadratic.proximal import Proximal
from ddnewton.trees import along_block, joined

FEW_PARAMETERS, PROBES = 128, 8
"""Up to how many parameters the trace is exact, and of how many random vectors else the mean: it is
then known to a factor of two, if one eigenvalue is most of it, and better where it is not."""

SPACE_BYTES, SPACE_VECTORS = 2**30, 200
"""Up to which size, and how many, the vectors of a Krylov space are kept. One cut short makes
a shorter step, as in Steihaug's trust region, and a step is judged by the loss it leads to."""


class FreeMatrix(NamedTuple):
    """The Gauss-Newton matrix of a block, known by products; its diagonal is not."""

    operator: Operator
    gradient: Float[Tensor, " d"]
    estimated_trace: Float[Tensor, ""]

    @property
    def side(self) -> int:
        """How many eigenvalues can be positive."""
        return min(self.operator.i, self.operator.d)

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace, by a few random vectors."""
        return self.estimated_trace


class FreeTrials(NamedTuple):
    """What trial steps by products are made of; spaces and directions grow as trials need them."""

    model: FreeModel
    matrices: Sequence[FreeMatrix]
    complement: Complement
    proximal: Proximal | None
    free: Bool[Tensor, " d"] | None  # the parameters that no bound holds, None for all
    spaces: dict[tuple[int, float], Krylov]  # of every block and momentum
    directions: dict[int, Along]  # of every block
    exact: bool = False


def free_matrices(model: FreeModel, free: Bool[Tensor, " d"] | None = None) -> list[FreeMatrix]:
    """Return the matrices of the blocks by products, with their gradients and traces.

    Parameters that are not ``free`` have no slopes and no curvature.
    """
    matrices = []
    for block in model.blocks:
        operator = operator_of(model, block.leaves)
        if free is not None:
            mask = along_block(free, block.leaves, model.sizes).double()
            scale = mask if operator.scale is None else mask * operator.scale
            operator = operator._replace(scale=scale)
        matrices.append(FreeMatrix(operator, operator.gradient(), _trace(operator)))
    return matrices


def _trace(operator: Operator) -> Float[Tensor, ""]:
    """Return the trace of G: the mean of vᵀG v over vectors of random signs (Hutchinson, 1990)."""
    if operator.d <= FEW_PARAMETERS:
        unit = torch.eye(operator.d, dtype=torch.float64, device=operator.device)
        return operator.curvatures(unit).sum()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (PROBES, operator.d), generator=generator).double() * 2 - 1
    return operator.curvatures(signs.to(operator.device)).mean()


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
        space = _space(trials, number, momentum)
        damping = _damping(trials, block, delta)
        grown(space, float(damping), trials.model.arguments.tol)
        return _centre(trials, block, momentum) - space.solution(damping)
    # Along directions, computed in the first trial.
    if number not in trials.directions:
        operator, gradient, _ = trials.matrices[number]
        trials.directions[number] = along_of(trials.model, block, operator, gradient)
    centre, params = _centre(trials, block, momentum), _decayed_params(trials, block)
    pull = Pull(centre, params, _decay(trials))
    return step_along(trials.directions[number], block, pull, delta, trials.complement)


def _is_linear(trials: FreeTrials, block: Block) -> bool:
    """Return whether a step of a block solves a linear system."""
    complement = block.damping if trials.complement == "damping" else trials.complement
    assert not callable(complement) or callable(block.damping)
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


def _space(trials: FreeTrials, number: int, momentum: float) -> Krylov:
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
        if bool((centre != 0).any()):
            right = right + operator.along(centre)
        trials.spaces[key] = Krylov(
            product=operator.along,
            right=right,
            rounding=operator.eps,
            limit=max(1, min(SPACE_VECTORS, SPACE_BYTES // right.nbytes)),
        )
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
    spaces = [_space(trials, number, 0.0) for number in range(len(model.blocks))]

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
    every = range(len(model.sizes))
    operator, gradient = trials.matrices[0].operator, trials.matrices[0].gradient
    if len(model.blocks) > 1 or list(model.leaves[0]) != list(every):
        operator = operator_of(model, every)
        gradient = operator.gradient()
    return vectors @ gradient, vectors @ operator.product(vectors).mT
