"""Damping for losses without noise: by how much of what a step promises comes true."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from ddnewton.errors import public
from ddnewton.inputs.checks import check_positive
from ddnewton.optim.adaptation.adaptation import Adaptation, Curvature, Outcome
from ddnewton.optim.adaptation.fixed import SMALLEST_DAMPING, bounded, fixed_damping
from ddnewton.types import DampingRule

GOOD_RATIO, POOR_RATIO, LEAST_RATIO = 0.75, 0.25, 1e-4
"""Ratios of the actual to the predicted decrease: trust more above, less below, do not step."""

RADIUS_SLACK = 0.9
"""How much shorter than the radius a step may be that is as long as it can be."""


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

    def judge(delta: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _falls(outcome)
        less = (1 - (2 * outcome.ratio - 1) ** 3).clamp(min=1 / 3)
        following = delta * torch.where(taken, less, 2.0 ** (outcome.attempts + 1))
        return taken, bounded(following, outcome)

    return fixed_damping("rule", rule)._replace(start=_share(start), judge=judge)


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

    def judge(radius: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        taken = _falls(outcome)
        poor = ~taken | ~(outcome.ratio >= POOR_RATIO)
        long = outcome.length >= radius * RADIUS_SLACK
        following = torch.where((outcome.ratio > GOOD_RATIO) & long, 2 * radius, radius)
        following = torch.where(poor, torch.fmin(outcome.length, radius) / 4, following)
        return taken, torch.where(outcome.length > 0, following, torch.nan)  # to start anew

    return fixed_damping("rule", rule)._replace(
        start=_share(start),
        damping=lambda control, curvature: SMALLEST_DAMPING * curvature.trace,
        judge=judge,
        by_length=True,
    )


def _share(start: float) -> Callable[[Curvature], Tensor]:
    """Return what makes a share of the trace the first damping."""
    return lambda curvature: start * curvature.trace


def _falls(outcome: Outcome) -> Bool[Tensor, ""]:
    """Return whether a step lowers the loss as it should."""
    return (outcome.after <= outcome.before) & (outcome.ratio > LEAST_RATIO)
