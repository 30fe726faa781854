"""The record of an adaptation: how the damping δ that all directions share follows the steps.

An `Adaptation` is a record of functions. It keeps one number, the control: δ itself, or a number
that δ is calculated from. In every update the control leads to a trial step, and ``judge`` says
whether to take that step, and which control comes next: for the next batch, or, where the step is
not taken, for the next trial on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.records import Call, reduced
from ddnewton.types import DampingRule

LearningRate: TypeAlias = float | Callable[[Tensor], float | Tensor] | Literal["exact"]
"""A number, a function of the number of updates so far, or the best one for the quadratic model."""


class Curvature(NamedTuple):
    """How large the eigenvalues of the Gauss-Newton matrix of a batch are, and the parameters.

    Both are in the units that the scale of the parameters makes.
    """

    trace: Float[Tensor, ""]
    mean: Float[Tensor, ""]  # the trace over how many eigenvalues can be positive
    params: Float[Tensor, ""]  # ‖θ / scale‖


class Outcome(NamedTuple):
    """The loss before and after a trial step, on the samples that the step was made of."""

    before: Float[Tensor, ""]
    after: Float[Tensor, ""]
    predicted: Float[Tensor, ""]  # decrease, of the quadratic model
    ratio: Float[Tensor, ""]  # actual decrease / predicted
    length: Float[Tensor, ""]  # of the step, ‖s / scale‖
    attempts: Int[Tensor, ""]  # trials on this batch before this one
    curvature: Curvature


class Choice(NamedTuple):
    """A search for the control on held-out samples: how often, on which share, over which grid."""

    every: int
    fraction: float
    grid: Sequence[float]


class Adaptation(NamedTuple):
    """How the damping of all directions follows the outcomes of steps.

    ``rule`` is a damping that is added to δ, a number or a rule of `ddnewton.damping`. ``start``
    returns the first control, ``damping`` the δ of a control, and ``judge`` whether to take a step
    and the next control. With ``by_length`` the control is the radius of a trust region, the
    longest step ‖s / scale‖ that is allowed: ``damping`` then returns the least δ to try.
    ``choice`` is None, or a search for the control on held-out samples. ``learning_rate``,
    ``momentum`` and ``scale`` are used where the user passes none.
    """

    rule: float | Tensor | DampingRule
    start: Callable[[Curvature], Tensor]
    damping: Callable[[Tensor, Curvature], Tensor]
    judge: Callable[[Tensor, Outcome], tuple[Bool[Tensor, ""], Float[Tensor, ""]]]
    by_length: bool
    choice: Choice | None
    learning_rate: LearningRate
    momentum: float | Literal["exact"]
    scale: Literal["jac"] | None
    made_by: Call | None = None  # by which it is pickled

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self)
