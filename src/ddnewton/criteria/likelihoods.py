"""Negative log-likelihoods of outputs that do not interact."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from ddnewton.criteria.elementwise import Terms, elementwise, normal, spread
from ddnewton.criteria.loss import SMALLEST_CURVATURE, Loss, Reduction, per_element
from ddnewton.criteria.option_checks import check_broadcasts, check_number, check_weight
from ddnewton.criteria.target_checks import (
    check_counts,
    check_pair,
    check_probabilities,
    check_real,
    check_variances,
)
from ddnewton.errors import BadValue, sentence
from ddnewton.transforms import any_known, unwrapped
from ddnewton.types import PyTree

QUANTILE_BISECTIONS = 32
"""As many as lead from 18 standard deviations to one count, for rates up to 1e16."""


def bce_with_logits(
    reduction: Reduction = "mean",
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Loss:
    """Return binary cross-entropy of logits, as in `torch.nn.BCEWithLogitsLoss`; y in [0, 1].

    A term is −w (a y log σ(f) + (1 − y) log σ(−f)) with a the ``pos_weight``; both weights
    broadcast to the outputs, and the mean divides by the number of outputs.

    Examples
    --------
    >>> import torch
    >>> expansion = bce_with_logits().expand(torch.zeros(1, 1), torch.ones(1, 1))
    >>> expansion.z.item(), expansion.h.item()
    (-0.5, 0.25)
    """
    check_weight("weight", weight)
    check_weight("pos_weight", pos_weight)

    def shares(f: Float[Tensor, "*c"], y: Float[Tensor, "*c"]) -> tuple[Tensor, Tensor]:
        w, y = spread(weight, f), y.double()
        return w * spread(pos_weight, f) * y, w * (1 - y)

    def terms(f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Terms:
        (up, down), on, off = shares(f, y), f.sigmoid(), (-f).sigmoid()
        value = -down * F.logsigmoid(-f) - up * F.logsigmoid(f)
        # σ(f) − y without cancellation: for y = 0 and y = 1 one of the terms is exactly zero.
        return Terms(
            value, down * on - up * off, (up + down) * (on * off).clamp(min=SMALLEST_CURVATURE)
        )

    def score(
        f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], u: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        (up, down), on, off = shares(f, y), f.sigmoid()[..., None], (-f).sigmoid()[..., None]
        return (up + down).sqrt()[..., None] * torch.where(u < on, -off, on)

    def check(outputs: Tensor, y: PyTree) -> None:
        check_probabilities(outputs, y)
        check_broadcasts("weight", weight, outputs)
        check_broadcasts("pos_weight", pos_weight, outputs)

    return elementwise(terms, per_element(reduction), check, score)


def poisson_nll(
    reduction: Reduction = "mean",
    *,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
) -> Loss:
    """Return the negative log-likelihood of counts, as in `torch.nn.PoissonNLLLoss`; y ≥ 0.

    The rate is eᶠ, and a term eᶠ − y f; without ``log_input`` it is f > −ε, and a term
    f − y log(f + ε). ``full`` adds Stirling's approximation of log y! where y > 1.

    Examples
    --------
    >>> import torch
    >>> expansion = poisson_nll().expand(torch.zeros(1, 1), torch.tensor([[3]]))
    >>> expansion.z.item(), expansion.h.item()
    (-2.0, 1.0)
    """
    check_number("eps must be a number ≥ 0", eps, lambda x: x >= 0, usual=1e-8)

    def terms(f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."]) -> Terms:
        y = y.double()
        constant = _stirling(y) if full else torch.zeros_like(y)
        if log_input:
            rate = f.exp()
            return Terms(rate - y * f + constant, rate - y, rate.clamp(min=SMALLEST_CURVATURE))
        rate = f + eps
        return Terms(f - y * rate.log() + constant, (rate - y) / rate, y / rate.square())

    def score(
        f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."], u: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        rate = f.exp()[..., None]
        return rate - poisson_quantile(u, rate)

    def check(outputs: Tensor, y: PyTree) -> None:
        check_counts(outputs, y)
        if not log_input and any_known(outputs <= -eps):
            rule, got = (
                "outputs must be rates above −eps",
                f"{unwrapped(outputs).amin().item():.3g}",
            )
            raise BadValue(sentence(rule, got, "Let the model return logarithms: log_input=True."))

    return elementwise(terms, per_element(reduction), check, score if log_input else None)


def gaussian_nll(
    reduction: Reduction = "mean",
    *,
    full: bool = False,
    eps: float = 1e-6,
    var: float | Tensor | None = None,
) -> Loss:
    """Return the negative log-likelihood of y ~ N(f, var), as in `torch.nn.GaussianNLLLoss`.

    A term is (log v + (f − y)² / v) / 2 with v = max(var, ε); ``full`` adds log(2π) / 2. The
    variance is given, with the targets as y = (target, var) or here as ``var``, and fits the
    outputs as in torch: same shape, 1 on one axis, or no last axis.

    Examples
    --------
    >>> import torch
    >>> y = torch.tensor([[1.0]]), torch.tensor([[4.0]])
    >>> expansion = gaussian_nll().expand(torch.tensor([[3.0]]), y)
    >>> expansion.z.item(), expansion.h.item()
    (0.5, 0.25)
    """
    check_number("eps must be a number ≥ 0", eps, lambda x: x >= 0, usual=1e-6)

    def parts(y: PyTree) -> tuple[Tensor, float | Tensor]:
        return (y[0], y[1]) if var is None else (y, var)

    def variances(f: Float[Tensor, "*c"], given: float | Tensor) -> Float[Tensor, "*c"]:
        v = torch.as_tensor(given, dtype=f.dtype, device=f.device)
        v = v[..., None] if v.shape != f.shape and v.shape == f.shape[:-1] else v
        return spread(v, f).clamp(min=eps)

    def terms(f: Float[Tensor, "n ..."], y: PyTree) -> Terms:
        target, given = parts(y)
        residual, v = f - target.double(), variances(f, given)
        constant = math.log(2 * math.pi) / 2 if full else 0.0
        return Terms((v.log() + residual.square() / v) / 2 + constant, residual / v, 1 / v)

    def score(
        f: Float[Tensor, "n ..."], y: PyTree, u: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        return normal(u, variances(f, parts(y)[1]).rsqrt())

    def check(outputs: Tensor, y: PyTree) -> None:
        if var is None:
            check_pair(y)
        target, given = parts(y)
        check_real(outputs, target)
        check_variances(outputs, given)

    return elementwise(terms, per_element(reduction), check, score)


def poisson_quantile(u: Float[Tensor, "*c"], rate: Float[Tensor, "..."]) -> Float[Tensor, "*c"]:
    """Return the smallest count k with P(K ≤ k) ≥ u for K ~ Poisson(rate), by bisection.

    P(K ≤ k) is the regularised incomplete gamma function Q(k + 1, rate). Chernoff's bounds on
    both tails hold the count for all u from 2⁻⁵⁴ to 1 − 2⁻⁵³.
    """
    reach = 9 * rate.sqrt()
    low = (rate - reach).floor().clamp(min=0) - 1 + torch.zeros_like(u)
    high = (rate + reach).ceil() + 26 + torch.zeros_like(u)
    for _ in range(QUANTILE_BISECTIONS):
        middle = ((low + high) / 2).floor()
        enough = torch.special.gammaincc(middle.clamp(min=0) + 1, rate.expand_as(u)) >= u
        enough = enough & (middle >= 0)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def _stirling(y: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    many = torch.where(y > 1, y, 1)
    return torch.where(y > 1, many * many.log() - many + (2 * math.pi * many).log() / 2, 0)
