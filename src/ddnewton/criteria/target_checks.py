"""Checks of the targets y for each loss: type, shape and range."""

from __future__ import annotations

import torch
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import any_known, any_not_finite, unwrapped
from ddnewton.types import PyTree


def check_real(outputs: Tensor, y: PyTree) -> None:
    """Require one finite real target per output."""
    _check_tensor(y)
    if not y.is_floating_point():
        raise BadType(
            sentence("y must be floating-point for this loss", y.dtype, "Pass y.to(outputs.dtype).")
        )
    _check_values(outputs, y)


def check_probabilities(outputs: Tensor, y: PyTree) -> None:
    """Require one target in [0, 1] per output."""
    check_real(outputs, y)
    if any_known((y < 0) | (y > 1)):
        values = unwrapped(y)
        rule = "y must lie in [0, 1] for binary cross-entropy"
        got = f"y from {values.amin().item():.3g} to {values.amax().item():.3g}"
        raise BadValue(sentence(rule, got, "Pass labels 0 and 1, or probabilities."))


def check_counts(outputs: Tensor, y: PyTree) -> None:
    """Require one number ≥ 0 per output, an integer or not."""
    _check_tensor(y)
    _check_values(outputs, y)
    if any_known(y < 0):
        rule = "y must not be negative for a Poisson loss"
        raise BadValue(sentence(rule, f"{unwrapped(y).amin().item():.3g}", "Pass counts or rates."))


def check_variances(outputs: Tensor, var: object) -> None:
    """Require variances ≥ 0: a number, or a tensor of a shape that torch takes for these outputs.

    As in `torch.nn.functional.gaussian_nll_loss`, that is the outputs' shape, the same with 1 on
    one axis, or the same without the last axis.
    """
    # A number holds for all outputs.
    if isinstance(var, bool) or not isinstance(var, (int, float, Tensor)):
        rule = "var must be a number or a tensor"
        raise BadType(sentence(rule, type(var).__name__, "Pass the variance of every target."))
    # Nothing but these shapes is broadcast.
    variances = torch.as_tensor(var, device=outputs.device)
    if isinstance(var, Tensor) and not _is_variance_shape(var.shape, outputs.shape):
        rule = "var must have the outputs' shape, with 1 on one axis or without the last at most"
        got = f"outputs: {list(outputs.shape)}, var: {list(var.shape)}"
        raise BadValue(sentence(rule, got, "Pass one number to use it for all."))
    # "Not ≥ 0" is true of nan as well.
    if any_known(~(variances >= 0)):
        rule, got = "var must not be negative or nan", f"{unwrapped(variances).amin().item():.3g}"
        raise BadValue(sentence(rule, got, "Pass variances, not their logarithms."))


def check_pair(y: PyTree) -> None:
    """Require y to be a pair of targets and variances."""
    if not isinstance(y, (tuple, list)) or len(y) != 2:
        rule = "y must be a tuple (target, var) for this loss"
        remedy = "Pass both, or partial(torch.nn.functional.gaussian_nll_loss, var=…)."
        raise BadType(sentence(rule, type(y).__name__, remedy))


def check_classes(outputs: Tensor, y: PyTree, ignore_index: int) -> None:
    """Require one class index, or one probability per class, for every position."""
    # The classes are on axis 1 of the outputs.
    _check_tensor(y)
    if outputs.ndim < 2:
        rule = "cross-entropy needs outputs of shape [N, C] or [N, C, …]"
        got, remedy = f"outputs: {list(outputs.shape)}", "Let the model return one logit a class."
        raise BadValue(sentence(rule, got, remedy))
    # The dtype of y tells indices from probabilities, as in torch.
    if not y.is_floating_point():
        _check_class_indices(outputs, y, ignore_index)
        return
    # Probabilities need not sum to 1, but none may be negative; torch, too, has no index to ignore
    # among them.
    check_real(outputs, y)
    if ignore_index >= 0:
        rule = "ignore_index is for class indices in y"
        got = f"probabilities, and ignore_index={ignore_index}"
        raise BadValue(sentence(rule, got, "Give what is to be ignored probabilities of 0."))
    if any_known(y < 0):
        rule = "class probabilities in y must not be negative"
        raise BadValue(sentence(rule, f"{unwrapped(y).amin().item():.3g}", "Pass probabilities."))


def _check_class_indices(outputs: Tensor, y: Tensor, ignore_index: int) -> None:
    """Require int64 indices from 0 to C − 1, as `torch.nn.CrossEntropyLoss` does."""
    # One index for every position: the outputs' shape without the classes.
    if y.dtype != torch.int64:
        rule = "class indices in y must be int64, or y floating-point probabilities"
        raise BadType(sentence(rule, y.dtype, "Pass y.long()."))
    if y.shape != outputs.shape[:1] + outputs.shape[2:]:
        rule = "class indices in y must have shape [N], or [N, …] for outputs [N, C, …]"
        got = f"outputs: {list(outputs.shape)}, y: {list(y.shape)}"
        remedy = "Put the classes on axis 1 of the outputs, or pass probabilities as floats."
        raise BadValue(sentence(rule, got, remedy))
    # An ignored position may hold any number.
    classes = outputs.shape[1]
    counted = y != ignore_index
    if any_known(((y < 0) | (y >= classes)) & counted):
        values = unwrapped(y)[unwrapped(counted)]
        rule = f"class indices in y must lie in 0 to {classes - 1} for {classes} outputs"
        remedy = "Count classes from 0, and give the model one output a class."
        got = f"indices from {int(values.amin())} to {int(values.amax())}"
        raise BadValue(sentence(rule, got, remedy))


def _is_variance_shape(shape: torch.Size, outputs: torch.Size) -> bool:
    """Return whether a shape is the outputs', or that with 1 on one axis or without the last."""
    if shape in (outputs, outputs[:-1]):
        return True
    differing = [length for length, full in zip(shape, outputs, strict=False) if length != full]
    return len(shape) == len(outputs) and differing == [1]


def _check_values(outputs: Tensor, y: Tensor) -> None:
    """Require finite targets of the outputs' shape."""
    if y.shape != outputs.shape:
        rule = "y must have the shape of the model's outputs"
        got = f"outputs: {list(outputs.shape)}, y: {list(y.shape)}"
        raise BadValue(sentence(rule, got, "Reshape one of them; nothing is broadcast."))
    if any_not_finite(y):
        raise BadValue(sentence("y must be finite", "nan or inf in y", "Clean the targets."))


def _check_tensor(y: PyTree) -> None:
    """Require y to be one tensor."""
    if not isinstance(y, Tensor):
        raise BadType(
            sentence("y must be a tensor for this loss", type(y).__name__, "Pass one tensor.")
        )
