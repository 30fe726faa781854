"""Damping for losses without noise, by the ratio of the actual to the predicted decrease."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from ddnewton.errors import public
from ddnewton.inputs.checks import check_positive
from ddnewton.optim.adaptation.adaptation import Adaptation, Curvature, Outcome
from ddnewton.optim.adaptation.fixed import SMALLEST_DAMPING, fixed_damping, within_damping_bounds
from ddnewton.records import pickled_as_call
from ddnewton.types import DampingRule

GOOD_RATIO, POOR_RATIO, LEAST_RATIO = 0.75, 0.25, 1e-4
"""Ratios of the actual to the predicted decrease: above the first trust more, below the second
less, and below the last do not take the step."""

RADIUS_SLACK = 0.9
"""A step of this share of the radius, or longer, counts as being as long as the radius."""


@pickled_as_call
@public
def levenberg_marquardt(
    start: float = 1e-3, *, rule: float | Tensor | DampingRule = 0.0
) -> Adaptation:
    r"""Return damping for losses without noise, by which the loss never rises.

    A step is taken where the loss falls. With ρ for the actual over the predicted decrease, the
    next δ is then

    .. math:: \delta \max(\tfrac13, 1 - (2 \rho - 1)^3),

    less where the quadratic model holds, more where it does not. A step that is not taken doubles
    δ; if the next one on the same batch is not taken either, δ is multiplied by 4, then by 8.
    Where the eigenpairs are known, all trials on a batch share them. The first δ is ``start`` times
    the trace of the Gauss-Newton matrix, which is of the size of its largest eigenvalue.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", SIAM
    J. Appl. Math. 11, 1963; the rule is Nielsen's: Madsen, Nielsen, Tingleff, *Methods for
    Non-Linear Least Squares Problems*, 2nd ed., 2004, eq. 2.21.

    Examples
    --------
    >>> levenberg_marquardt().learning_rate
    1.0
    """
    check_positive("start", start)

    def judge(delta: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _loss_falls(outcome)
        by_ratio = (1 - (2 * outcome.ratio - 1) ** 3).clamp(min=1 / 3)
        next_delta = delta * torch.where(taken, by_ratio, 2.0 ** (outcome.attempts + 1))
        return taken, within_damping_bounds(next_delta, outcome)

    return fixed_damping("rule", rule)._replace(start=_multiple_of_trace(start), judge=judge)


@pickled_as_call
@public
def trust_region(start: float = 1e-3, *, rule: float | Tensor | DampingRule = 0.0) -> Adaptation:
    """Return damping for losses without noise, by a radius that no step may exceed.

    δ is the smallest for which the step is no longer than the radius, to a tenth. The radius
    becomes a quarter of the step's length where the loss fell by less than ¼ of the decrease that
    the quadratic model predicts. It doubles where the loss fell by more than ¾ of that, and the
    step was as long as the radius. The first radius is the length of the step whose δ is ``start``
    times the trace of the Gauss-Newton matrix.

    Source: Moré, "The Levenberg-Marquardt algorithm: implementation and theory", 1978; Nocedal,
    Wright, *Numerical Optimization*, algorithm 4.1.

    Examples
    --------
    >>> trust_region().by_length
    True
    """
    check_positive("start", start)

    def judge(radius: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _loss_falls(outcome)
        poor = ~taken | ~(outcome.ratio >= POOR_RATIO)
        at_radius = outcome.length >= radius * RADIUS_SLACK
        next_radius = torch.where((outcome.ratio > GOOD_RATIO) & at_radius, 2 * radius, radius)
        next_radius = torch.where(poor, torch.fmin(outcome.length, radius) / 4, next_radius)
        return taken, torch.where(outcome.length > 0, next_radius, torch.nan)  # nan: start anew

    return fixed_damping("rule", rule)._replace(
        start=_multiple_of_trace(start),
        damping=lambda control, curvature: SMALLEST_DAMPING * curvature.trace,
        judge=judge,
        by_length=True,
    )


def _multiple_of_trace(start: float) -> Callable[[Curvature], Tensor]:
    """Return a function: the first damping, ``start`` times the trace."""
    return lambda curvature: start * curvature.trace


def _loss_falls(outcome: Outcome) -> Bool[Tensor, ""]:
    """Return whether a step lowers the loss, by some share of the predicted decrease."""
    return (outcome.after <= outcome.before) & (outcome.ratio > LEAST_RATIO)
