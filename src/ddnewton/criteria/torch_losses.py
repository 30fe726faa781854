"""Which of torch's losses have a closed form: a new one is one line here, and its factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ddnewton.criteria.convex import convex
from ddnewton.criteria.likelihoods import bce_with_logits, gaussian_nll, poisson_nll
from ddnewton.criteria.loss import Loss, check_reduction
from ddnewton.criteria.regression import huber, mse, smooth_l1
from ddnewton.criteria.softmax import cross_entropy
from ddnewton.errors import BadType, sentence
from ddnewton.types import Criterion


class TorchLoss(NamedTuple):
    """A loss of torch's as module and as function, its factory, and the options that both know."""

    module: type[nn.Module]
    function: Callable[..., Tensor]
    factory: Callable[..., Loss]
    of_module: frozenset[str]
    of_function: frozenset[str]


def _torch_loss(
    module: type[nn.Module], function: Callable[..., Tensor], factory: Callable[..., Loss]
) -> TorchLoss:
    """Return a registration; what a factory does not know is an option of no closed form."""
    known, attributes = (inspect.signature(x).parameters.keys() for x in (factory, module))
    return TorchLoss(module, function, factory, frozenset(known & attributes), frozenset(known))


TORCH_LOSSES = [
    _torch_loss(nn.MSELoss, F.mse_loss, mse),
    _torch_loss(nn.HuberLoss, F.huber_loss, huber),
    _torch_loss(nn.SmoothL1Loss, F.smooth_l1_loss, smooth_l1),
    _torch_loss(nn.CrossEntropyLoss, F.cross_entropy, cross_entropy),
    _torch_loss(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, bce_with_logits),
    _torch_loss(nn.PoissonNLLLoss, F.poisson_nll_loss, poisson_nll),
    _torch_loss(nn.GaussianNLLLoss, F.gaussian_nll_loss, gaussian_nll),
]


def record_of(criterion: Criterion | Loss) -> Loss:
    """Return the record of a criterion: in closed form for a torch loss, by torch.func else."""
    if isinstance(criterion, Loss):
        return criterion
    if not callable(criterion) or isinstance(criterion, type):
        rule = "criterion must be a loss function"
        remedy = "Pass a loss module such as torch.nn.MSELoss(), a function, or a Loss record."
        raise BadType(sentence(rule, repr(criterion), remedy))
    for loss in TORCH_LOSSES:
        options = _options(criterion, loss)
        if options is not None:
            return loss.factory(**options)
    if isinstance(criterion, nn.Module) and getattr(criterion, "reduction", "mean") == "none":
        check_reduction("none")
    return convex(criterion)


def _options(criterion: Criterion, loss: TorchLoss) -> dict[str, Any] | None:
    """Return a criterion's options where it is the loss, with options that the factory knows."""
    if type(criterion) is loss.module:
        return {name: getattr(criterion, name) for name in loss.of_module}
    if isinstance(criterion, partial):
        same = criterion.func is loss.function and not criterion.args
        return (
            criterion.keywords if same and criterion.keywords.keys() <= loss.of_function else None
        )
    return {} if criterion is loss.function else None
