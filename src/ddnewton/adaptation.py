"""How damping follows what steps do: the part of δ that all directions share.

An `Adaptation` is a record of functions. In every update its control, δ itself or what δ follows
from, leads to a trial step, and ``judge`` says whether to take that and which control comes next:
for the next batch, or, where the step is not taken, for the next trial on the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.checks import check_damping, check_positive
from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.types import DampingRule

GOOD, POOR, ANY = 0.75, 0.25, 1e-4
"""Ratios of the actual to the predicted decrease: trust more above, less below, do not step."""

SMALLEST = 1e-15
"""The least damping, relative to the size of the curvature: what rounding adds anyway."""

RESCUE = 1e-3
"""What a damping that led to no finite loss is raised to at least, relative to the curvature."""

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


@public
def fixed(damping: float | Tensor | DampingRule) -> Adaptation:
    """Return damping that stays what it is, a number or a rule of `ddnewton.damping`.

    Only where a step would lead to no finite loss is more added to it, which halves with every
    step that does.

    Examples
    --------
    >>> fixed(0.1).rule
    0.1
    """
    check_damping("damping", damping)

    def judge(control: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        finite = outcome.after.isfinite()
        rescue = torch.maximum(10 * control, RESCUE * outcome.curvature.trace)
        relaxed = torch.where(control > SMALLEST * outcome.curvature.trace, control / 2, 0)
        return finite, torch.where(finite, relaxed, rescue)

    return Adaptation(
        rule=damping,
        start=lambda curvature: 0 * curvature.trace,
        damping=lambda control, curvature: control,
        judge=judge,
        by_length=False,
        choice=None,
        learning_rate=1.0,
        momentum=0.0,
    )


@public
def levenberg_marquardt(
    start: float = 1e-3, *, rule: float | Tensor | DampingRule = 0.0
) -> Adaptation:
    r"""Return damping for losses without noise, that sees to it that they never rise.

    A step is taken where the loss falls. With ρ for the actual over the predicted decrease, the
    next δ is then

    .. math:: \delta \max(\tfrac13, 1 - (2 \rho - 1)^3),

    less where the quadratic model holds, more where it does not. A step that is not taken doubles
    δ, the next one on the same batch takes it fourfold, then eightfold, with nothing decomposed
    anew where eigenpairs are at hand. The first δ is ``start`` times the trace of the Gauss-Newton
    matrix, which is of the size of its largest eigenvalue.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", SIAM
    J. Appl. Math. 11, 1963; the rule is Nielsen's: Madsen, Nielsen, Tingleff, *Methods for
    Non-Linear Least Squares Problems*, 2nd ed., 2004, eq. 2.21.

    Examples
    --------
    >>> levenberg_marquardt().learning_rate
    1.0
    """
    check_positive("start", start)
    check_damping("rule", rule)

    def judge(delta: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _falls(outcome)
        less = (1 - (2 * outcome.ratio - 1) ** 3).clamp(min=1 / 3)
        following = delta * torch.where(taken, less, 2.0 ** (outcome.attempts + 1))
        return taken, following.clamp(min=SMALLEST * outcome.curvature.trace)

    return fixed(rule)._replace(start=_share(start), judge=judge)


@public
def trust_region(start: float = 1e-3, *, rule: float | Tensor | DampingRule = 0.0) -> Adaptation:
    """Return damping for losses without noise, by the longest step that is trusted.

    δ is the smallest for which the step is no longer than the radius, to a tenth. The radius
    becomes a quarter of the step where the loss fell by less than ¼ of what the quadratic model
    predicts, and doubles where it fell by more than ¾ and the step was as long as it could be. The
    first radius is the length of the step whose δ is ``start`` times the trace of the Gauss-Newton
    matrix.

    Source: Moré, "The Levenberg-Marquardt algorithm: implementation and theory", 1978; Nocedal,
    Wright, *Numerical Optimization*, algorithm 4.1.

    Examples
    --------
    >>> trust_region().by_length
    True
    """
    check_positive("start", start)
    check_damping("rule", rule)

    def judge(radius: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _falls(outcome)
        poor = ~taken | ~(outcome.ratio >= POOR)
        long = outcome.length >= radius * SLACK
        following = torch.where((outcome.ratio > GOOD) & long, 2 * radius, radius)
        return taken, torch.where(poor, torch.minimum(outcome.length, radius) / 4, following)

    return fixed(rule)._replace(
        start=_share(start),
        damping=lambda control, curvature: SMALLEST * curvature.trace,
        judge=judge,
        by_length=True,
    )


SLACK = 0.9
"""How much shorter than the radius a step may be that is as long as it can be."""


@public
def held_out(
    fraction: float = 0.25,
    *,
    every: int = 10,
    grid: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
    start: float = 1.0,
    rule: float | Tensor | DampingRule = 0.0,
) -> Adaptation:
    """Return damping for mini-batches, chosen on a part of some that the step is not made of.

    δ is a multiple of the mean eigenvalue of the batch's Gauss-Newton matrix, tr G over how many of
    them can be positive: what is right for one net and loss is so, about, for others. The multiple
    is ``start`` at first. Then, in one of ``every`` so many updates, steps are made of the first
    part of the batch, and of those of a ``grid`` of multiples the one is found whose whole step,
    without momentum, leads to the lowest loss on the other part, a ``fraction`` of the batch: the
    multiple moves half the way there, in its logarithm. So batches should come shuffled.

    The learning rate falls from 0.2 as 1/√(1 + t/10) with the number t of updates, and momentum is
    0.9, both unless told otherwise.

    Examples
    --------
    >>> import torch
    >>> held_out().learning_rate(torch.tensor(30))
    tensor(0.1000, dtype=torch.float64)
    """
    check_positive("start", start)
    check_damping("rule", rule)
    check_positive("fraction", fraction)
    if fraction >= 1:
        least = "fraction must be less than 1"
        raise BadValue(sentence(least, fraction, "Pass a share of the batch, such as 0.25."))
    if isinstance(every, bool) or not isinstance(every, int):
        raise BadType(sentence("every must be an integer", repr(every), "Pass a count, as 10."))
    if every < 1:
        raise BadValue(sentence("every must be at least 1", every, "Pass a count, as 10."))
    if not isinstance(grid, Sequence) or not grid:
        rule_ = "grid must be a sequence of positive numbers"
        raise BadType(sentence(rule_, repr(grid), "Pass some multiples, such as (0.1, 1.0, 10.0)."))
    for multiple in grid:
        check_positive("grid", multiple)
    return fixed(rule)._replace(
        start=lambda curvature: start + 0 * curvature.trace,
        damping=lambda control, curvature: control * curvature.mean,
        judge=_follow,
        choice=Choice(every, fraction, tuple(map(float, grid))),
        learning_rate=_falling,
        momentum=0.9,
    )


def _falling(updates: Tensor) -> Tensor:
    """Return the learning rate of mini-batches: averaging over them takes ever shorter steps."""
    return 0.2 / (1 + updates.double() / 10).sqrt()


def _share(start: float) -> Callable[[Curvature], Tensor]:
    """Return what makes a share of the trace the first damping."""
    return lambda curvature: start * curvature.trace


def _follow(control: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Take every step to a finite loss; damp more where it is none."""
    finite = outcome.after.isfinite()
    return finite, torch.where(finite, control, 10 * control)


def _falls(outcome: Outcome) -> Bool[Tensor, ""]:
    """Return whether a step lowers the loss as it should."""
    return (outcome.after <= outcome.before) & (outcome.ratio > ANY)


def as_adaptation(damping: float | Tensor | DampingRule | Adaptation) -> Adaptation:
    """Return a number or a rule as damping that stays what it is."""
    return damping if isinstance(damping, Adaptation) else fixed(damping)
