"""Damping for mini-batches: by what a step does to samples that it is not made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.inputs.checks import check_positive
from ddnewton.optim.adaptation.adaptation import Adaptation, Choice, Outcome
from ddnewton.optim.adaptation.fixed import fixed_damping
from ddnewton.types import DampingRule


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
    them can be positive: what is right for one net and loss is so, about, for others. In the first
    and every so-many-th update steps are made of the first part of the batch, and of a ``grid`` of
    multiples the one is found whose whole step, without momentum, leads to the lowest loss on the
    other part, a ``fraction`` of the batch: the multiple, ``start`` before, moves half the way
    there, in its logarithm. So batches should come shuffled. A step that lowers the loss of its own
    samples by less than half of what their quadratic model promises is not taken: δ rises fourfold.

    The learning rate falls from 0.2 as 1/√(1 + t/20) with the number t of updates, and momentum is
    0.9, both unless told otherwise.

    Examples
    --------
    >>> import torch
    >>> held_out().learning_rate(torch.tensor(60))
    tensor(0.1000, dtype=torch.float64)
    """
    check_positive("start", start)
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
    return fixed_damping("rule", rule)._replace(
        start=lambda curvature: start + 0 * curvature.trace,
        damping=lambda control, curvature: control * curvature.mean,
        judge=_follow,
        choice=Choice(every, fraction, tuple(map(float, grid))),
        learning_rate=_falling,
        momentum=0.9,
    )


def _falling(updates: Tensor) -> Tensor:
    """Return the learning rate of mini-batches: averaging over them takes ever shorter steps."""
    return 0.2 / (1 + updates.double() / 20).sqrt()


def _follow(control: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Take a step that keeps half of what it promises; damp more where it does not.

    Momentum may promise a rise of the loss. Without this a net whose curvature has nearly gone,
    fitted to all but a few samples, is thrown far away by those.
    """
    promised = outcome.predicted
    kept = promised * (1 - outcome.ratio) <= promised.abs() / 2
    taken = outcome.after.isfinite() & kept
    return taken, torch.where(taken, control, 4 * control)
