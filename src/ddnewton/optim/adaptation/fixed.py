"""Damping that stays what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ddnewton.errors import public
from ddnewton.inputs.checks import check_damping
from ddnewton.optim.adaptation.adaptation import Adaptation, Outcome
from ddnewton.types import DampingRule

SMALLEST_DAMPING, LARGEST_DAMPING = 1e-15, 1e6
"""Between which a damping stays, relative to the trace: what rounding adds anyway, and what makes
so short a gradient step that it takes but tens of updates to come back from it."""

RESCUE_DAMPING = 1e-3
"""What a damping that led to no finite loss is raised to at least, relative to the curvature."""


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
    return fixed_damping("damping", damping)


def fixed_damping(name: str, damping: float | Tensor | DampingRule) -> Adaptation:
    """Return `fixed` for those that call the damping by another name."""
    check_damping(name, damping)

    def judge(control: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        finite = outcome.after.isfinite()
        rescue = torch.maximum(10 * control, RESCUE_DAMPING * outcome.curvature.trace)
        relaxed = torch.where(control > SMALLEST_DAMPING * outcome.curvature.trace, control / 2, 0)
        return finite, torch.where(finite, relaxed, bounded(rescue, outcome))

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


def as_adaptation(damping: float | Tensor | DampingRule | Adaptation) -> Adaptation:
    """Return a number or a rule as damping that stays what it is."""
    return damping if isinstance(damping, Adaptation) else fixed_damping("damping", damping)


def bounded(delta: Tensor, outcome: Outcome) -> Tensor:
    """Return a damping between the least and the largest."""
    trace = outcome.curvature.trace
    return torch.minimum(torch.maximum(delta, SMALLEST_DAMPING * trace), LARGEST_DAMPING * trace)
