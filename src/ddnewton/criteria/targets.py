"""What y must look like for each loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import bare, surely
from ddnewton.types import PyTree


def check_real(outputs: Tensor, y: PyTree) -> None:
    """Require one finite real target per output."""
    _check_tensor(y)
    if not y.is_floating_point():
        raise BadType(
            sentence("y must be floating-point for this loss", y.dtype, "Pass y.to(outputs.dtype).")
        )
    if y.shape != outputs.shape:
        rule = "y must have the shape of the model's outputs"
        got = f"outputs: {list(outputs.shape)}, y: {list(y.shape)}"
        raise BadValue(sentence(rule, got, "Reshape one of them; nothing is broadcast."))
    if surely(~y.isfinite()):
        raise BadValue(sentence("y must be finite", "nan or inf in y", "Clean the targets."))


def check_probabilities(outputs: Tensor, y: PyTree) -> None:
    """Require one target in [0, 1] per output."""
    check_real(outputs, y)
    if surely((y < 0) | (y > 1)):
        values = bare(y)
        rule = "y must lie in [0, 1] for binary cross-entropy"
        got = f"y from {values.amin().item():.3g} to {values.amax().item():.3g}"
        raise BadValue(sentence(rule, got, "Pass labels 0 and 1, or probabilities."))


def check_classes(outputs: Tensor, y: PyTree) -> None:
    """Require one class index, or one probability per class, for every sample."""
    _check_tensor(y)
    if outputs.ndim != 2:
        rule = "cross-entropy needs outputs of shape [N, C]"
        raise BadValue(
            sentence(
                rule, f"outputs: {list(outputs.shape)}", "Let the model return one logit a class."
            )
        )
    if y.is_floating_point():
        check_real(outputs, y)
        if surely(y < 0):
            rule = "class probabilities in y must not be negative"
            raise BadValue(sentence(rule, f"{bare(y).amin().item():.3g}", "Pass probabilities."))
    else:
        _check_class_indices(outputs, y)


def _check_class_indices(outputs: Tensor, y: Tensor) -> None:
    """Require int64 indices from 0 to C − 1, as `torch.nn.CrossEntropyLoss` does."""
    if y.dtype != torch.int64:
        rule = "class indices in y must be int64, or y floating-point probabilities"
        raise BadType(sentence(rule, y.dtype, "Pass y.long()."))
    if y.shape != outputs.shape[:1]:
        rule = "class indices in y must have shape [N]"
        got = f"outputs: {list(outputs.shape)}, y: {list(y.shape)}"
        raise BadValue(sentence(rule, got, "Pass y.reshape(-1), or probabilities as floats."))
    classes = outputs.shape[1]
    if surely((y < 0) | (y >= classes)):
        low, high = int(bare(y).amin()), int(bare(y).amax())
        rule = f"class indices in y must lie in 0 to {classes - 1} for {classes} outputs"
        remedy = "Count classes from 0, and give the model one output a class."
        raise BadValue(sentence(rule, f"indices from {low} to {high}", remedy))


def _check_tensor(y: PyTree) -> None:
    if not isinstance(y, Tensor):
        raise BadType(
            sentence("y must be a tensor for this loss", type(y).__name__, "Pass one tensor.")
        )
