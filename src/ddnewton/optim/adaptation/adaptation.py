"""How damping follows what steps do: the part of δ that all directions share.

An `Adaptation` is a record of functions. In every update its control, δ itself or what δ follows
from, leads to a trial step, and ``judge`` says whether to take that and which control comes next:
for the next batch, or, where the step is not taken, for the next trial on the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.types import DampingRule

LearningRate: TypeAlias = float | Callable[[Tensor], float | Tensor] | Literal["exact"]
"""A number, a function of the number of updates so far, or the minimum of the quadratic model."""


class Curvature(NamedTuple):
    """How large the eigenvalues of the Gauss-Newton matrix of a batch are."""

    trace: Float[Tensor, ""]
    mean: Float[Tensor, ""]  # of as many as can be positive


class Outcome(NamedTuple):
    """What a trial step did to the loss of the samples it was made of."""

    before: Float[Tensor, ""]
    after: Float[Tensor, ""]
    predicted: Float[Tensor, ""]  # decrease
    ratio: Float[Tensor, ""]  # actual decrease / predicted
    length: Float[Tensor, ""]  # of the step
    attempts: Int[Tensor, ""]  # trials before this one
    curvature: Curvature


class Choice(NamedTuple):
    """How often a control is chosen from a grid, and on which share of the batch."""

    every: int
    fraction: float
    grid: Sequence[float]


class Adaptation(NamedTuple):
    """How the damping of all directions follows what steps do.

    ``rule`` is what directions are damped by besides. ``start`` gives the first control, and
    ``damping`` the δ of a control; where it is a length, the longest step that is trusted, both are
    dampings from which that follows.
    """

    rule: float | Tensor | DampingRule
    start: Callable[[Curvature], Tensor]
    damping: Callable[[Tensor, Curvature], Tensor]
    judge: Callable[[Tensor, Outcome], tuple[Bool[Tensor, ""], Float[Tensor, ""]]]
    by_length: bool
    choice: Choice | None
    learning_rate: LearningRate
    momentum: float | Literal["exact"]
