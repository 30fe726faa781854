"""The table of torch's losses with a closed form: a new one takes one line here and a factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ddnewton.criteria.convex import convex
from ddnewton.criteria.gaussian import with_gaussian_fisher
from ddnewton.criteria.likelihoods import bce_with_logits, gaussian_nll, poisson_nll
from ddnewton.criteria.loss import Loss, check_reduction, without_stale_products
from ddnewton.criteria.probabilities import bce, nll
from ddnewton.criteria.regression import huber, mse, smooth_l1
from ddnewton.criteria.softmax import cross_entropy
from ddnewton.criteria.trained import (
    check_constant,
    check_holds_no_parameters,
    check_options_are_constant,
)
from ddnewton.errors import BadType, sentence
from ddnewton.inputs.callables import ORDER
from ddnewton.records import pickled_as_call
from ddnewton.types import Criterion, PyTree


class TorchLoss(NamedTuple):
    """One of torch's losses: module, function, factory, and the options that the factory takes.

    ``module_options`` are those that the module has as well.
    """

    module: type[nn.Module]
    function: Callable[..., Tensor]
    factory: Callable[..., Loss]
    module_options: frozenset[str]
    function_options: frozenset[str]


def _torch_loss(
    module: type[nn.Module], function: Callable[..., Tensor], factory: Callable[..., Loss]
) -> TorchLoss:
    """Return a row of the table; the options are the parameters of the factory."""
    options, attributes = (inspect.signature(x).parameters.keys() for x in (factory, module))
    return TorchLoss(module, function, factory, frozenset(options & attributes), frozenset(options))


TORCH_LOSSES = [
    _torch_loss(nn.MSELoss, F.mse_loss, mse),
    _torch_loss(nn.HuberLoss, F.huber_loss, huber),
    _torch_loss(nn.SmoothL1Loss, F.smooth_l1_loss, smooth_l1),
    _torch_loss(nn.CrossEntropyLoss, F.cross_entropy, cross_entropy),
    _torch_loss(nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, bce_with_logits),
    _torch_loss(nn.PoissonNLLLoss, F.poisson_nll_loss, poisson_nll),
    _torch_loss(nn.GaussianNLLLoss, F.gaussian_nll_loss, gaussian_nll),
    _torch_loss(nn.NLLLoss, F.nll_loss, nll),
    _torch_loss(nn.BCELoss, F.binary_cross_entropy, bce),
]


def record_of(criterion: Criterion | Loss) -> Loss:
    """Return the record of a criterion: in closed form for a torch loss, else by torch.func.

    Criteria with parameters of their own are refused, and others that read what is trained in the
    check of the record.
    """
    if isinstance(criterion, Loss):
        return without_stale_products(criterion)
    if not callable(criterion) or isinstance(criterion, type):
        raise BadType(_no_loss(criterion))
    check_holds_no_parameters(criterion)
    # A loss of the table, as module, function or partial, with the options it was given.
    for loss in TORCH_LOSSES:
        options = _options_of(criterion, loss)
        if options is not None:
            check_options_are_constant(options)
            return loss.factory(**options)
    # Any other function, and torch's own with options of no closed form.
    if isinstance(criterion, nn.Module) and getattr(criterion, "reduction", "mean") == "none":
        check_reduction("none")
    return _of_function(criterion)


def _no_loss(criterion: object) -> str:
    """Return the message for what is no criterion: what it may be instead."""
    got = repr(criterion)
    remedy = "Pass a loss module such as torch.nn.MSELoss(), a function, or a Loss record."
    # Targets, or the weight of a term.
    if isinstance(criterion, Tensor) and criterion.ndim > 0:
        got = f"a tensor of shape {list(criterion.shape)}"
        remedy = f"If it is y, pass it before the criterion: {ORDER}"
    elif isinstance(criterion, (Real, Tensor)) and not isinstance(criterion, bool):
        weight = "weight" if isinstance(criterion, Tensor) else criterion
        remedy = (
            "A number is no loss: to give a term a weight, write "
            f"ddnewton.weighted(torch.nn.MSELoss(), {weight}) in its place."
        )
    return sentence("criterion must be a loss function", got, remedy)


@pickled_as_call
def _of_function(criterion: Criterion) -> Loss:
    """Return the record of a function that has no closed form."""
    record = with_gaussian_fisher(convex(criterion))

    def check(outputs: Tensor, y: PyTree) -> None:
        record.check(outputs, y)
        check_constant(criterion, outputs, y)

    return record._replace(check=check)


def _options_of(criterion: Criterion, loss: TorchLoss) -> dict[str, Any] | None:
    """Return the options of a criterion; None if it is another loss or its factory lacks one."""
    if type(criterion) is loss.module:
        return {name: getattr(criterion, name) for name in loss.module_options}
    if isinstance(criterion, partial):
        is_loss = criterion.func is loss.function and not criterion.args
        supported = criterion.keywords.keys() <= loss.function_options
        return criterion.keywords if is_loss and supported else None
    return {} if criterion is loss.function else None
