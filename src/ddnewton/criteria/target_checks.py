"""What y must look like for each loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import any_known, unwrapped
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
    """Require one number that is not negative per output, an integer or not."""
    _check_tensor(y)
    _check_values(outputs, y)
    if any_known(y < 0):
        rule = "y must not be negative for a Poisson loss"
        raise BadValue(sentence(rule, f"{unwrapped(y).amin().item():.3g}", "Pass counts or rates."))


def check_variances(outputs: Tensor, var: object) -> None:
    """Require variances ≥ 0, a number or a tensor that leaves out one axis of the outputs' at most.

    They fit where `torch.nn.functional.gaussian_nll_loss` takes them.
    """
    if isinstance(var, bool) or not isinstance(var, (int, float, Tensor)):
        rule = "var must be a number or a tensor"
        raise BadType(sentence(rule, type(var).__name__, "Pass the variance of every target."))
    variances = torch.as_tensor(var)
    if isinstance(var, Tensor) and not _is_variance(var.shape, outputs.shape):
        rule = "var must have the outputs' shape, with 1 on one axis or without the last at most"
        got = f"outputs: {list(outputs.shape)}, var: {list(var.shape)}"
        raise BadValue(sentence(rule, got, "Pass one number to use it for all."))
    if any_known(~(variances >= 0)):
        rule, got = "var must not be negative or nan", f"{unwrapped(variances).amin().item():.3g}"
        raise BadValue(sentence(rule, got, "Pass variances, not their logarithms."))


def check_pair(y: PyTree) -> None:
    """Require targets and variances together."""
    if not isinstance(y, (tuple, list)) or len(y) != 2:
        rule = "y must be a tuple (target, var) for this loss"
        remedy = "Pass both, or partial(torch.nn.functional.gaussian_nll_loss, var=…)."
        raise BadType(sentence(rule, type(y).__name__, remedy))


def check_classes(outputs: Tensor, y: PyTree, ignore_index: int) -> None:
    """Require one class index, or one probability per class, for every position."""
    _check_tensor(y)
    if outputs.ndim < 2:
        rule = "cross-entropy needs outputs of shape [N, C] or [N, C, …]"
        got, remedy = f"outputs: {list(outputs.shape)}", "Let the model return one logit a class."
        raise BadValue(sentence(rule, got, remedy))
    if not y.is_floating_point():
        _check_class_indices(outputs, y, ignore_index)
        return
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
    if y.dtype != torch.int64:
        rule = "class indices in y must be int64, or y floating-point probabilities"
        raise BadType(sentence(rule, y.dtype, "Pass y.long()."))
    if y.shape != outputs.shape[:1] + outputs.shape[2:]:
        rule = "class indices in y must have shape [N], or [N, …] for outputs [N, C, …]"
        got = f"outputs: {list(outputs.shape)}, y: {list(y.shape)}"
        remedy = "Put the classes on axis 1 of the outputs, or pass probabilities as floats."
        raise BadValue(sentence(rule, got, remedy))
    classes = outputs.shape[1]
    counted = y != ignore_index
    if any_known(((y < 0) | (y >= classes)) & counted):
        values = unwrapped(y)[unwrapped(counted)]
        rule = f"class indices in y must lie in 0 to {classes - 1} for {classes} outputs"
        remedy = "Count classes from 0, and give the model one output a class."
        got = f"indices from {int(values.amin())} to {int(values.amax())}"
        raise BadValue(sentence(rule, got, remedy))


def _is_variance(shape: torch.Size, outputs: torch.Size) -> bool:
    if shape in (outputs, outputs[:-1]):
        return True
    differing = [own for own, other in zip(shape, outputs, strict=False) if own != other]
    return len(shape) == len(outputs) and differing == [1]


def _check_values(outputs: Tensor, y: Tensor) -> None:
    if y.shape != outputs.shape:
        rule = "y must have the shape of the model's outputs"
        got = f"outputs: {list(outputs.shape)}, y: {list(y.shape)}"
        raise BadValue(sentence(rule, got, "Reshape one of them; nothing is broadcast."))
    if any_known(~y.isfinite()):
        raise BadValue(sentence("y must be finite", "nan or inf in y", "Clean the targets."))


def _check_tensor(y: PyTree) -> None:
    if not isinstance(y, Tensor):
        raise BadType(
            sentence("y must be a tensor for this loss", type(y).__name__, "Pass one tensor.")
        )
