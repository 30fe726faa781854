"""Losses of the distance between an output and its target."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.convex import convex
from ddnewton.criteria.elementwise import (
    Terms,
    broadcast_to_outputs,
    elementwise,
    normal_quantile,
)
from ddnewton.criteria.loss import Loss, Reduction, per_element
from ddnewton.criteria.option_checks import (
    check_denominator,
    check_number,
    check_weight,
    check_weight_shape,
)
from ddnewton.criteria.target_checks import check_real
from ddnewton.records import pickled_as_call
from ddnewton.types import PyTree


@pickled_as_call
def mse(reduction: Reduction = "mean", *, weight: Tensor | None = None) -> Loss:
    """Return the squared error ℓ = Σ_c w_c (f_c − y_c)², as in `torch.nn.MSELoss`.

    A weight has the outputs' shape; a weighted mean divides by the sum of the weights. Up to a
    constant, ℓ is the negative log-likelihood of y ~ N(f, 1 / 2w).

    Examples
    --------
    >>> import torch
    >>> expansion = mse().expand(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
    >>> expansion.value.item(), expansion.z.tolist(), expansion.h.tolist()
    (5.0, [[2.0, 4.0]], [[2.0, 2.0]])
    """
    check_weight("weight", weight)
    unweighted = per_element(reduction)

    def terms(f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Terms:
        residual, w = f - y.double(), broadcast_to_outputs(weight, f)
        return Terms(values=w * residual.square(), z=2 * w * residual, h=2 * w)

    def score(
        f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], u: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        # At y ~ N(f, 1 / 2w) the derivative 2 w (f − y) is N(0, 2w), as its mean square is h.
        return normal_quantile(u, (2 * broadcast_to_outputs(weight, f)).sqrt())

    def denominator(outputs: Tensor, y: PyTree) -> float | Tensor:
        # Without weights the mean divides by the number of outputs.
        if weight is None or reduction == "sum":
            return unweighted(outputs, y)
        return broadcast_to_outputs(weight, outputs.double()).sum()

    def check(outputs: Tensor, y: PyTree) -> None:
        check_real(outputs, y)
        check_weight_shape(weight, outputs.shape, "the outputs' shape")
        check_denominator(denominator(outputs, y))

    return elementwise(terms, denominator, check, score)._replace(squares=True)


@pickled_as_call
def huber(
    reduction: Reduction = "mean", *, delta: float = 1.0, weight: Tensor | None = None
) -> Loss:
    """Return the squared error up to a distance δ, and a straight line beyond.

    With d = |f_c − y_c| a term is w_c d² / 2 for d < δ, else w_c δ (d − δ / 2), as in
    `torch.nn.HuberLoss`. A weight has the outputs' shape; the mean divides by their number.

    Examples
    --------
    >>> import torch
    >>> expansion = huber().expand(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    >>> expansion.z.tolist(), expansion.h.tolist()
    ([[0.5, 1.0]], [[1.0, 0.0]])
    """
    check_number("delta must be a number > 0", delta, lambda x: x > 0, usual=1.0)
    check_weight("weight", weight)

    def terms(f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Terms:
        w = broadcast_to_outputs(weight, f)
        return Terms(*(w * part for part in _huber_terms(f - y.double(), delta)))

    def check(outputs: Tensor, y: PyTree) -> None:
        check_real(outputs, y)
        check_weight_shape(weight, outputs.shape, "the outputs' shape")

    return elementwise(terms, per_element(reduction), check)


@pickled_as_call
def smooth_l1(reduction: Reduction = "mean", *, beta: float = 1.0) -> Loss:
    """Return the absolute error with its kink rounded off, as in `torch.nn.SmoothL1Loss`.

    It is `huber` with δ = β, divided by β; for β = 0 the absolute error itself, in no closed form.

    Examples
    --------
    >>> import torch
    >>> expansion = smooth_l1(beta=0.5).expand(torch.tensor([[0.25, 3.0]]), torch.zeros(1, 2))
    >>> expansion.z.tolist(), expansion.h.tolist()
    ([[0.5, 1.0]], [[2.0, 0.0]])
    """
    check_number("beta must be a number ≥ 0", beta, lambda x: x >= 0, usual=1.0)
    denominator = per_element(reduction)
    if beta == 0:
        return convex(partial(F.smooth_l1_loss, reduction=reduction, beta=beta))

    def terms(f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Terms:
        return Terms(*(part / beta for part in _huber_terms(f - y.double(), beta)))

    return elementwise(terms, denominator, check_real)


def _huber_terms(residual: Float[Tensor, "n ..."], delta: float) -> Terms:
    """Return Huber's terms of residuals f − y: quadratic where |f − y| < δ, else linear."""
    distance = residual.abs()
    inside = distance < delta
    values = torch.where(inside, residual.square() / 2, delta * (distance - delta / 2))
    return Terms(values, z=residual.clamp(-delta, delta), h=inside.to(residual))
