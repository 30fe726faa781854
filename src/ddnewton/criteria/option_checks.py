"""Checks of the options of a loss: numbers, weights, and the denominator they lead to."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from ddnewton.criteria.trained import check_options_are_constant
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import any_known, unwrapped


def check_number(rule: str, value: object, holds: Callable[[float], bool], usual: float) -> None:
    """Require a real number for which a condition holds."""
    remedy = f"The usual value is {usual}."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadType(sentence(rule, repr(value), remedy))
    if not holds(float(value)):
        raise BadValue(sentence(rule, value, remedy))


def check_weight(name: str, weight: object) -> None:
    """Require a tensor of finite numbers that keep the loss convex, or None."""
    # A constant tensor, before its values can be looked at.
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        rule, remedy = f"{name} must be a tensor or None", "Pass torch.tensor([…]), or weighted(…)."
        raise BadType(sentence(rule, type(weight).__name__, remedy))
    check_options_are_constant({name: weight})
    # With a negative weight a loss is not convex.
    if any_known(~((weight >= 0) & weight.isfinite())):
        values = unwrapped(weight)
        rule = f"{name} must hold finite numbers ≥ 0"
        got = f"numbers from {values.amin().item():.3g} to {values.amax().item():.3g}"
        raise BadValue(sentence(rule, got, "With a negative weight the loss is not convex."))


def check_weight_shape(weight: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """Require a weight, if there is one, of exactly this shape."""
    if weight is not None and weight.shape != shape:
        rule = f"weight must have {meaning}"
        got = f"weight: {list(weight.shape)} instead of {list(shape)}"
        raise BadValue(sentence(rule, got, "Nothing is broadcast."))


def check_broadcasts(name: str, weight: Tensor | None, outputs: Tensor) -> None:
    """Require a weight that broadcasts to the outputs without enlarging them."""
    if weight is None:
        return
    try:
        fits = torch.broadcast_shapes(weight.shape, outputs.shape) == outputs.shape
    except RuntimeError:
        fits = False
    if not fits:
        rule = f"{name} must broadcast to the outputs"
        got = f"{name}: {list(weight.shape)}, outputs: {list(outputs.shape)}"
        raise BadValue(sentence(rule, got, "Pass one weight for each of the last axis's outputs."))


class NoTargets(BadValue):
    """A batch whose mean is over no target: all of them are ignored, or of weight 0."""


def check_denominator(denominator: float | Tensor) -> None:
    """Require a mean that does not divide by zero."""
    if torch.compiler.is_compiling():  # a number of its own would be one for this N alone
        return
    if any_known(denominator == 0):
        rule = "a weighted mean needs a target of positive weight"
        got = "targets that are all ignored or of weight 0"
        raise NoTargets(sentence(rule, got, 'Skip the batch, or use reduction="sum".'))
