"""The Gaussian likelihood of a predicted mean and a predicted log-variance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.convex import sample_expansions
from ddnewton.criteria.elementwise import diagonal, normal_quantile
from ddnewton.criteria.hessian_products import criterion_root
from ddnewton.criteria.loss import (
    SMALLEST_CURVATURE,
    Loss,
    Reduction,
    Uniform,
    check_reduction,
)
from ddnewton.criteria.root import diagonal_root
from ddnewton.criteria.target_checks import check_real
from ddnewton.errors import BadValue, public, sentence
from ddnewton.records import pickled_as_call
from ddnewton.types import PyTree


@pickled_as_call
@public
def heteroscedastic_nll(reduction: Reduction = "mean", *, full: bool = False) -> Loss:
    r"""Return the negative log-likelihood of y ~ N(m, v) for predicted m and log v.

    .. math:: \ell = \tfrac12 \sum \left(\log v + \frac{(y - m)^2}{v}\right), \qquad
              F = \operatorname{diag}\left(\frac1v, \frac12\right)

    with the Fisher information F of every pair (m, log v). The outputs are [N, …, 2] with the mean
    and the logarithm of the variance on the last axis, y is [N, …] or [N, …, 1], and the mean
    divides by the number of targets, as that of `torch.nn.GaussianNLLLoss` does. ``full`` adds
    log(2π) / 2 for every target.

    The Hessian has a negative eigenvalue wherever y ≠ m: take the curvature from
    `fisher(heteroscedastic_nll())`, `monte_carlo` or `clipped`.

    `torch.nn.GaussianNLLLoss` takes a predicted variance as its third argument, which no
    ``criterion(outputs, y)`` has: let the model return ``torch.stack([mean, log_variance], -1)``,
    or ``torch.stack([mean, variance.log()], -1)`` from one that returns variances.

    Parameters
    ----------
    reduction
        "mean" over the targets, or "sum".
    full
        Whether the constant log(2π) / 2 is part of a term.

    Returns
    -------
    Loss
        The criterion.

    Raises
    ------
    ValueError
        Where the reduction is another one.

    Notes
    -----
    Source: Nix and Weigend, "Estimating the mean and variance of the target probability
    distribution", ICNN 1994.

    Examples
    --------
    >>> import torch
    >>> from ddnewton import fisher
    >>> outputs = torch.tensor([[1.0, 0.0]])  # a mean of 1, a variance of 1
    >>> expansion = fisher(heteroscedastic_nll()).expand(outputs, torch.tensor([3.0]))
    >>> expansion.value.item(), expansion.z.tolist(), expansion.h.tolist()
    (2.0, [[-2.0, -1.5]], [[1.0, 0.5]])
    """
    check_reduction(reduction)
    constant = math.log(2 * math.pi) / 2 if full else 0.0

    def terms(f: Float[Tensor, "n ... 2"], y: PyTree) -> tuple[Tensor, Tensor, Tensor]:
        # The residuals m − y and the precisions 1 / v of all targets, and their terms.
        f = f.double()
        residual, precision = f[..., 0] - y.double().reshape(f.shape[:-1]), (-f[..., 1]).exp()
        values = (f[..., 1] + residual.square() * precision) / 2 + constant
        return residual, precision, values

    def gradient(f: Float[Tensor, "n ... 2"], y: PyTree) -> tuple[Tensor, Tensor]:
        residual, precision, values = terms(f, y)
        z = torch.stack([residual * precision, (1 - residual.square() * precision) / 2], -1)
        return values.flatten(1).sum(1) if values.ndim > 1 else values, z.flatten(1)

    def of_information(f: Float[Tensor, "n ... 2"], y: PyTree) -> tuple[Tensor, Tensor, Tensor]:
        value, z = gradient(f, y)
        _, precision, _ = terms(f, y)
        h = torch.stack([precision.clamp(min=SMALLEST_CURVATURE), 0 * precision + 0.5], -1)
        return value, z, h.flatten(1)

    def scores(
        f: Float[Tensor, "n ... 2"], y: PyTree, count: int, uniform: Uniform
    ) -> Float[Tensor, "n c m"]:
        # At y = m − √v ε with ε ~ N(0, 1), drawn for every target.
        _, precision, _ = terms(f, y)
        noise = normal_quantile(uniform((*precision.shape, count)), torch.ones_like(precision))
        columns = torch.stack([precision.sqrt()[..., None] * noise, (1 - noise.square()) / 2], -2)
        return columns.reshape(f.shape[0], -1, count)

    def denominator(outputs: Tensor, y: PyTree) -> float:
        return outputs.numel() / 2 if reduction == "mean" else 1.0

    # The Hessian is that of the sum over a sample's targets, by torch.func.
    def total(f: Float[Tensor, "n ... 2"], y: PyTree) -> Tensor:
        return terms(f, y)[2].sum()

    return Loss(
        lambda f, y: sample_expansions(total, f, y),
        denominator,
        _check,
        scores,
        gradient,
        fisher=lambda f, y: diagonal(*of_information(f, y)),
        root=lambda f, y: criterion_root(total, f, y, lambda f, y: 1.0, gradient),
        fisher_root=lambda f, y: diagonal_root(*of_information(f, y)),
    )


def _check(outputs: Tensor, y: PyTree) -> None:
    """Require pairs of a mean and a log-variance, and a target for each."""
    if outputs.ndim < 2 or outputs.shape[-1] != 2:
        rule = "outputs must hold a mean and a log-variance on the last axis, [N, …, 2]"
        remedy = "Let the model return torch.stack([mean, log_variance], -1)."
        raise BadValue(sentence(rule, f"outputs: {list(outputs.shape)}", remedy))
    target = y
    if isinstance(y, Tensor) and y.shape == (*outputs.shape[:-1], 1):
        target = y[..., 0]
    check_real(outputs[..., 0], target)
