"""Likelihoods of outputs that are probabilities already, or their logarithms.

The loss is nearly or quite flat in them, and the Fisher information is not: pulled back to logits
it is that of the losses of logits.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.convex import convex
from ddnewton.criteria.elementwise import broadcast_to_outputs, diagonal
from ddnewton.criteria.loss import (
    Loss,
    Reduction,
    check_reduction,
    value_and_gradient,
)
from ddnewton.criteria.option_checks import check_denominator, check_weight, check_weight_shape
from ddnewton.criteria.root import diagonal_root
from ddnewton.criteria.softmax import class_labels, class_weighted, classes_last
from ddnewton.criteria.target_checks import check_classes
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.records import pickled_as_call
from ddnewton.transforms import any_known, unwrapped
from ddnewton.types import PyTree

SUM_OF_PROBABILITIES = 1e-2
"""How far the logarithm of the sum of a sample's probabilities may lie from 0."""

SMALLEST_PROBABILITY = 1e-12
"""Floor of p (1 − p), as in torch's derivative of binary cross-entropy."""


@pickled_as_call
def nll(
    reduction: Reduction = "mean", *, weight: Tensor | None = None, ignore_index: int = -100
) -> Loss:
    """Return the negative log-likelihood of log-probabilities, as in `torch.nn.NLLLoss`.

    The outputs are [N, C] or [N, C, …], and ℓ = −Σ w_y f_y over the positions that are not
    ignored; the mean divides by Σ w_y. It has no Hessian. Its Fisher information is w_y diag(eᶠ).

    Examples
    --------
    >>> import torch
    >>> expansion = nll().expand(torch.tensor([[-1.0, -0.5]]), torch.tensor([1]))
    >>> expansion.value.item(), expansion.z.tolist(), expansion.h.tolist()
    (0.5, [[-0.0, -1.0]], [[0.0, 0.0]])
    """
    check_reduction(reduction)
    check_weight("weight", weight)

    def targets(f: Float[Tensor, "n ..."], y: PyTree) -> Float[Tensor, "n t c"]:
        # w_y at the class y, and 0 at the others and at ignored positions.
        labels, counted = class_labels(f, y, ignore_index)
        return class_weighted(labels, weight) * counted

    def gradient(f: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor]:
        t = targets(f, y)
        # Not 0 · f: a class that is not y may have a probability of zero.
        values = -(t * classes_last(f).masked_fill(t == 0, 0)).sum((1, 2))
        return values, -t.mT.flatten(1)

    def flat(f: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor, Tensor]:
        value, z = gradient(f, y)
        return value, z, 0 * z

    def of_information(f: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor, Tensor]:
        _check_log_probabilities(f)
        value, z = gradient(f, y)
        h = classes_last(f).exp() * targets(f, y).sum(2, keepdim=True)
        return value, z, h.mT.flatten(1)

    def denominator(outputs: Float[Tensor, "n ..."], y: PyTree) -> float | Tensor:
        return 1.0 if reduction == "sum" else targets(outputs, y).sum()

    def check(outputs: Tensor, y: PyTree) -> None:
        check_classes(outputs, y, ignore_index)
        if y.is_floating_point():
            rule, remedy = "y must hold class indices for this loss", "Pass y.argmax(1)."
            raise BadType(sentence(rule, f"y of dtype {y.dtype}", remedy))
        check_weight_shape(weight, outputs.shape[1:2], "one entry a class")
        check_denominator(denominator(outputs, y))

    return Loss(
        expand=lambda f, y: diagonal(*flat(f, y)),
        denominator=denominator,
        check=check,
        gradient=gradient,
        fisher=lambda f, y: diagonal(*of_information(f, y)),
        root=lambda f, y: diagonal_root(*flat(f, y)),
        fisher_root=lambda f, y: diagonal_root(*of_information(f, y)),
    )


@pickled_as_call
def bce(reduction: Reduction = "mean", *, weight: Tensor | None = None) -> Loss:
    """Return binary cross-entropy of probabilities, as in `torch.nn.BCELoss`, by torch.func.

    Its Fisher information is w / p (1 − p) for an output p; the weight broadcasts to the outputs.

    Examples
    --------
    >>> import torch
    >>> p, y = torch.tensor([[0.5]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    >>> bce().expand(p, y).z.item(), bce().fisher(p, y).h.item()
    (-2.0, 4.0)
    """
    check_reduction(reduction)
    loss = convex(partial(F.binary_cross_entropy, reduction=reduction, weight=weight))

    def of_information(p: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor, Tensor]:
        value, z = value_and_gradient(loss, p, y)
        h = broadcast_to_outputs(weight, p) / (p * (1 - p)).clamp(min=SMALLEST_PROBABILITY)
        # The loss of a sample is the mean over its outputs where the reduction is a mean.
        share = z.shape[1] if reduction == "mean" else 1
        return value, z, h.reshape(z.shape).double() / share

    return loss._replace(
        fisher=lambda p, y: diagonal(*of_information(p, y)),
        fisher_root=lambda p, y: diagonal_root(*of_information(p, y)),
    )


def _check_log_probabilities(f: Float[Tensor, "n ..."]) -> None:
    """Require the probabilities of the classes, on axis 1, to sum to one."""
    log_sums = f.logsumexp(1)
    if any_known(log_sums.abs() > SUM_OF_PROBABILITIES):
        total = unwrapped(log_sums).abs().amax().exp().item()
        rule = "outputs must be log-probabilities for the Fisher information of nll_loss"
        got = f"probabilities with a sum or an inverse sum of {total:.3g}"
        remedy = "End the model with log_softmax, or pass the logits to CrossEntropyLoss."
        raise BadValue(sentence(rule, got, remedy))
