"""Negative log-likelihoods of outputs that do not interact: Bernoulli, Poisson and Gaussian."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from ddnewton.criteria.elementwise import (
    Terms,
    broadcast_to_outputs,
    elementwise,
    normal_quantile,
)
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
from ddnewton.records import pickled_as_call
from ddnewton.transforms import any_known, unwrapped
from ddnewton.types import PyTree

QUANTILE_BISECTIONS = 32
"""Enough to narrow 18 standard deviations down to one count, for rates up to 1e16."""


@pickled_as_call
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

    def class_weights(f: Float[Tensor, "*c"], y: Float[Tensor, "*c"]) -> tuple[Tensor, Tensor]:
        # w_1 = w a y and w_0 = w (1 − y): a term is −w_1 log σ(f) − w_0 log σ(−f).
        w, y = broadcast_to_outputs(weight, f), y.double()
        return w * broadcast_to_outputs(pos_weight, f) * y, w * (1 - y)

    def terms(f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."]) -> Terms:
        # p_0 is σ(−f), not 1 − p_1, which would lose all its digits where p_1 is near 1.
        (w_1, w_0), p_1, p_0 = class_weights(f, y), f.sigmoid(), (-f).sigmoid()
        values = -w_0 * F.logsigmoid(-f) - w_1 * F.logsigmoid(f)
        # z is σ(f) − y without cancellation: for y = 0 and y = 1 one of the terms is exactly zero.
        z = w_0 * p_1 - w_1 * p_0
        h = (w_1 + w_0) * (p_1 * p_0).clamp(min=SMALLEST_CURVATURE)
        return Terms(values, z, h)

    def score(
        f: Float[Tensor, "n ..."], y: Float[Tensor, "n ..."], u: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        # The derivative is σ(f) − 1 at a drawn target of 1, which has probability σ(f), and σ(f)
        # at 0; times √(w_1 + w_0), for the mean square to be h.
        p_1, p_0 = f.sigmoid()[..., None], (-f).sigmoid()[..., None]
        w_1, w_0 = class_weights(f, y)
        return (w_1 + w_0).sqrt()[..., None] * torch.where(u < p_1, -p_0, p_1)

    def check(outputs: Tensor, y: PyTree) -> None:
        check_probabilities(outputs, y)
        check_broadcasts("weight", weight, outputs)
        check_broadcasts("pos_weight", pos_weight, outputs)

    return elementwise(terms, per_element(reduction), check, score)


@pickled_as_call
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
        constant = _log_factorial(y) if full else torch.zeros_like(y)
        # The rate is eᶠ: h = eᶠ is never zero, but would underflow for f < −745.
        if log_input:
            rate = f.exp()
            h = rate.clamp(min=SMALLEST_CURVATURE)
            return Terms(rate - y * f + constant, z=rate - y, h=h)
        # The rate is f + ε: z = 1 − y / rate, and h is zero where y is.
        rate = f + eps
        return Terms(f - y * rate.log() + constant, z=(rate - y) / rate, h=y / rate.square())

    def score(
        f: Float[Tensor, "n ..."], y: Num[Tensor, "n ..."], u: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        # Only for log-rates, where h = eᶠ does not depend on the target; a linear rate's does.
        rate = f.exp()[..., None]
        return rate - poisson_quantile(u, rate)

    def check(outputs: Tensor, y: PyTree) -> None:
        check_counts(outputs, y)
        if not log_input and any_known(outputs <= -eps):
            rule = "outputs must be rates above −eps"
            got = f"{unwrapped(outputs).amin().item():.3g}"
            raise BadValue(sentence(rule, got, "Let the model return logarithms: log_input=True."))

    # A linear rate's Fisher information is 1 / rate, whatever the target.
    if not log_input:
        return elementwise(
            terms, per_element(reduction), check, information=lambda f, y: 1 / (f + eps)
        )
    return elementwise(terms, per_element(reduction), check, score)


@pickled_as_call
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

    def target_and_variance(y: PyTree) -> tuple[Tensor, float | Tensor]:
        return (y[0], y[1]) if var is None else (y, var)

    def output_variances(f: Float[Tensor, "*c"], variance: float | Tensor) -> Float[Tensor, "*c"]:
        # v = max(var, ε) for every output; a variance without the last axis holds for all of it.
        v = torch.as_tensor(variance, dtype=f.dtype, device=f.device)
        v = v[..., None] if v.shape != f.shape and v.shape == f.shape[:-1] else v
        return broadcast_to_outputs(v, f).clamp(min=eps)

    def terms(f: Float[Tensor, "n ..."], y: PyTree) -> Terms:
        target, variance = target_and_variance(y)
        residual, v = f - target.double(), output_variances(f, variance)
        constant = math.log(2 * math.pi) / 2 if full else 0.0
        values = (v.log() + residual.square() / v) / 2 + constant
        return Terms(values, z=residual / v, h=1 / v)

    def score(
        f: Float[Tensor, "n ..."], y: PyTree, u: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        # At y ~ N(f, v) the derivative (f − y) / v is N(0, 1 / v).
        _, variance = target_and_variance(y)
        return normal_quantile(u, output_variances(f, variance).rsqrt())

    def check(outputs: Tensor, y: PyTree) -> None:
        if var is None:
            check_pair(y)
        target, variance = target_and_variance(y)
        check_real(outputs, target)
        check_variances(outputs, variance)

    return elementwise(terms, per_element(reduction), check, score)


def poisson_quantile(u: Float[Tensor, "*c"], rate: Float[Tensor, "..."]) -> Float[Tensor, "*c"]:
    """Return the smallest count k with P(K ≤ k) ≥ u for K ~ Poisson(rate), by bisection.

    P(K ≤ k) is the regularised incomplete gamma function Q(k + 1, rate). By Chernoff's bounds on
    both tails, the first interval contains the count for all u from 2⁻⁵⁴ to 1 − 2⁻⁵³.
    """
    # P(K ≤ low) < u ≤ P(K ≤ high) holds from here on; low may be −1, where P is zero.
    reach = 9 * rate.sqrt()
    low = (rate - reach).floor().clamp(min=0) - 1 + torch.zeros_like(u)
    high = (rate + reach).ceil() + 26 + torch.zeros_like(u)
    for _ in range(QUANTILE_BISECTIONS):
        middle = ((low + high) / 2).floor()
        enough = torch.special.gammaincc(middle.clamp(min=0) + 1, rate.expand_as(u)) >= u
        enough = enough & (middle >= 0)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def _log_factorial(y: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Return Stirling's approximation of log y! where y > 1, and else 0, as torch does."""
    k = torch.where(y > 1, y, 1)  # no logarithm of zero, not even where it is not selected
    return torch.where(y > 1, k * k.log() - k + (2 * math.pi * k).log() / 2, 0)
