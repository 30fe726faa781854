"""Damping rules: functions of what is known of every direction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.checks import check_nonnegative
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import bare, surely
from ddnewton.types import DampingRule


def constant(delta: float | Tensor) -> DampingRule:
    """Return a rule that damps every direction by δ ≥ 0, in the units of curvature.

    Examples
    --------
    >>> import torch
    >>> evals = torch.tensor([1.0, 2.0])
    >>> constant(0.5)(evals, torch.eye(2), torch.ones(2, 2), torch.ones(2, 2))
    tensor([0.5000, 0.5000])
    """
    check_nonnegative("damping", delta)

    def damping(
        evals: Float[Tensor, " k"],
        evecs: Float[Tensor, "i k"],
        gammas: Float[Tensor, "n k"],
        lambdas: Float[Tensor, "n k"],
    ) -> Float[Tensor, " k"]:
        return delta * torch.ones_like(evals)

    return damping


def as_rule(damping: float | Tensor | DampingRule) -> DampingRule:
    """Return a number as a constant rule, and a rule as it is."""
    return damping if callable(damping) else constant(damping)


def check_dampings(dampings: object, directions: int) -> None:
    """Require one damping per direction: not negative, not nan; infinite ones skip theirs."""
    if not isinstance(dampings, Tensor):
        rule = "damping must return a tensor of shape [K]"
        got, remedy = type(dampings).__name__, "Build it with torch, like its arguments."
        raise BadType(sentence(rule, got, remedy))
    if dampings.shape != (directions,):
        rule = f"damping must return one value for each of the K = {directions} directions"
        remedy = "Return a tensor of shape [K], such as δ * torch.ones_like(evals)."
        raise BadValue(sentence(rule, f"shape {list(dampings.shape)}", remedy))
    if surely(~(dampings >= 0)):
        values = bare(dampings)
        rule = "damping must not be negative or nan"
        got = f"{float(values[~(values >= 0)][0])}"
        raise BadValue(sentence(rule, got, "Return 0 or more; inf skips a direction."))
