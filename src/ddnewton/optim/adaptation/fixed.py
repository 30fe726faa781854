"""Damping that does not adapt, except to rescue steps to where no loss is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ddnewton.errors import BadValue, public, sentence
from ddnewton.inputs.checks import check_damping, check_positive
from ddnewton.optim.adaptation.adaptation import Adaptation, Outcome
from ddnewton.records import pickled_as_call
from ddnewton.types import DampingRule

SMALLEST_DAMPING, LARGEST_DAMPING = 1e-15, 1e6
"""Bounds of an adapted damping, relative to the trace of the Gauss-Newton matrix: below the lower
one rounding adds more, and from the upper one, a very short gradient step, it takes tens of updates
to come back."""

RESCUE_DAMPING = 1e-3
"""Least damping after a step to where the loss is not finite, relative to the trace."""


@pickled_as_call
@public
def fixed(damping: float | Tensor | DampingRule) -> Adaptation:
    """Return damping that does not adapt: a number, or a rule of `ddnewton.damping`.

    Only where a step would lead to a loss that is not finite, an extra damping is added. It halves
    with every step to a finite loss.

    Examples
    --------
    >>> fixed(0.1).rule
    0.1
    """
    return fixed_damping("damping", damping)


@pickled_as_call
def fixed_damping(name: str, damping: float | Tensor | DampingRule) -> Adaptation:
    """Return `fixed` damping; the message of an error calls it ``name``."""
    check_damping(name, damping)

    # The control is the extra damping, 0 at first.

    def judge(control: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        finite = outcome.after.isfinite()
        rescue = torch.maximum(10 * control, RESCUE_DAMPING * outcome.curvature.trace)
        relaxed = torch.where(control > SMALLEST_DAMPING * outcome.curvature.trace, control / 2, 0)
        return finite, torch.where(finite, relaxed, within_damping_bounds(rescue, outcome))

    return Adaptation(
        rule=damping,
        start=lambda curvature: 0 * curvature.trace,
        damping=lambda control, curvature: control,
        judge=judge,
        by_length=False,
        choice=None,
        learning_rate=1.0,
        momentum=0.0,
        scale=None,
    )


def as_adaptation(damping: float | Tensor | DampingRule | Adaptation) -> Adaptation:
    """Return an adaptation as it is, and a number or a rule as `fixed` damping."""
    return damping if isinstance(damping, Adaptation) else fixed_damping("damping", damping)


def within_damping_bounds(delta: Tensor, outcome: Outcome) -> Tensor:
    """Return a damping, clamped to the bounds relative to the trace."""
    trace = outcome.curvature.trace
    return torch.minimum(torch.maximum(delta, SMALLEST_DAMPING * trace), LARGEST_DAMPING * trace)


def check_factors(**factors: float) -> None:
    """Require factors by which a control grows, or a damping falls, to be above 1."""
    for name, factor in factors.items():
        check_positive(name, factor)
        if not factor > 1:
            remedy = "Pass a factor, such as 1.5: a control that stays ends no search."
            raise BadValue(sentence(f"{name} must be above 1", factor, remedy))
