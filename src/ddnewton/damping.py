"""Damping rules: functions that give every direction its damping.

A rule ``damping(evals [K], evecs [NM, K], gammas [N, K], lambdas [N', K]) -> [K]`` gets the kept
eigenpairs and every sample's slope γ_nk and curvature λ_nk along them, and returns δ_k ≥ 0 in the
units of curvature. With γ_k and λ_k the means over samples, the step along direction k is
−γ_k / (λ_k + δ_k); δ_k = ∞ skips it. Sub-sampling makes N and N' differ. Bad arguments are refused
when the rule is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_nonnegative, check_resampling
from ddnewton.resampling import Bootstrap
from ddnewton.transforms import any_known, unwrapped
from ddnewton.types import DampingRule


def constant(delta: float | Tensor) -> DampingRule:
    """Return a rule that damps every direction by δ ≥ 0, in the units of curvature.

    Examples
    --------
    >>> import torch
    >>> constant(0.5)(torch.ones(2), torch.eye(2), torch.ones(2, 2), torch.ones(2, 2))
    tensor([0.5000, 0.5000])
    """
    check_nonnegative("damping", delta)
    return partial(_constant, delta)


def _constant(
    delta: float | Tensor,
    evals: Float[Tensor, " k"],
    evecs: object,
    gammas: Float[Tensor, "n k"],
    lambdas: Float[Tensor, "n2 k"],
) -> Float[Tensor, " k"]:
    """Return δ for every direction."""
    return delta * torch.ones_like(evals)


def relative(fraction: float | Tensor) -> DampingRule:
    """Return a rule that damps every direction by a fraction of the largest kept eigenvalue.

    δ = fraction · max_k eval_k has the units of curvature, the fraction ≥ 0 has none.

    Examples
    --------
    >>> import torch
    >>> evals = torch.tensor([1.0, 2.0])
    >>> relative(0.1)(evals, torch.eye(2), torch.ones(2, 2), torch.ones(2, 2))
    tensor([0.2000, 0.2000])
    """
    check_nonnegative("relative: fraction", fraction)
    return partial(_relative, fraction)


def _relative(
    fraction: float | Tensor,
    evals: Float[Tensor, " k"],
    evecs: object,
    gammas: Float[Tensor, "n k"],
    lambdas: Float[Tensor, "n2 k"],
) -> Float[Tensor, " k"]:
    """Return the fraction of the largest eigenvalue for every direction."""
    # The last of the sorted ones, not amax(), which raises where K = 0.
    return fraction * evals.sort().values[-1:].expand_as(evals)


def signal_to_noise(caution: float | Tensor = 1.0) -> DampingRule:
    """Return a rule that damps a direction by how uncertain its slope and its curvature are.

    With means, unbiased variances and standard errors over the samples,

        δ_k = (λ_k + caution · se(λ_k)) / shrink_k − λ_k,   shrink_k = 1 − var(γ_k) / (N γ_k²),

    and ∞ where shrink_k ≤ 0. So a shrunken slope is divided by a pessimistic curvature:

        −γ_k / (λ_k + δ_k) = −γ_k shrink_k / (λ_k + caution · se(λ_k)).

    Directions are skipped if their signal-to-noise ratio γ_k² / var(γ_k) does not exceed 1/N, or if
    λ_k + caution · se(λ_k) is zero. δ has the units of curvature, ``caution`` ≥ 0 has none.
    The rule measures noise, not how far the quadratic model holds: on a fresh net, flat directions
    with certain slopes are hardly damped. There, add a floor to the δ it returns. Called with fewer
    than two samples it raises a ValueError.

    The ratio and its threshold 1/N are those of Dangel, Tatzel, Hennig, *ViViT*, TMLR 2022, arXiv
    2106.02624; the shrinkage has the positive-part James-Stein form, with 1 for dimension − 2.

    Examples
    --------
    Slopes of 3 ± 1 shrink by 8/9 and are divided by λ + se(λ) = 2; those of 1 ± 1 are noise:

    >>> import torch
    >>> gammas = torch.tensor([[2.0, 0.0], [4.0, 2.0]])
    >>> lambdas = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    >>> signal_to_noise()(torch.ones(2), torch.eye(2), gammas, lambdas)
    tensor([1.2500,    inf])
    """
    check_nonnegative("signal_to_noise: caution", caution)
    return partial(_signal_to_noise, caution)


def _signal_to_noise(
    caution: float | Tensor,
    evals: Float[Tensor, " k"],
    evecs: object,
    gammas: Float[Tensor, "n k"],
    lambdas: Float[Tensor, "n2 k"],
) -> Float[Tensor, " k"]:
    """Return the dampings of `signal_to_noise`."""
    # An unbiased variance divides by N − 1.
    n, n2 = gammas.shape[0], lambdas.shape[0]
    if min(n, n2) < 2:
        rule, got = "signal_to_noise: a spread needs two samples", f"gammas: {n}, lambdas: {n2}"
        raise BadValue(sentence(rule, got, "Pass a larger batch, or damp by another rule."))
    # noise = var(γ_k) / (N γ_k²) is 1 − shrink_k; taken directly, it keeps all its digits.
    gammas, lambdas = gammas.double(), lambdas.double()
    gamma, lambda_ = gammas.mean(0), lambdas.mean(0)
    noise = (gammas - gamma).square().sum(0) / (n * (n - 1)) / gamma.square()
    # excess = caution · se(λ_k) is what makes the curvature pessimistic.
    excess = caution * ((lambdas - lambda_).square().sum(0) / (n2 * (n2 - 1))).sqrt()
    # (λ + excess) / shrink − λ over one denominator, so that λ does not cancel.
    delta = (lambda_ * noise + excess) / (1 - noise)
    # Both comparisons are false of nan, as from slopes that are all zero: those are skipped.
    certain = (noise < 1) & (lambda_ + excess > 0)
    return torch.where(certain, delta.clamp(min=0), torch.inf).to(evals.dtype)


def bootstrap(
    grid: Sequence[float] | Tensor,
    generator: torch.Generator,
    resamples: int = 1000,
    quantile: float = 0.05,
) -> DampingRule:
    """Return a rule that takes the damping of a grid whose gain has the best low quantile.

    Each δ of the grid is a step τ = −γ / (λ + δ). Redrawing the samples with replacement makes
    other means γ_b and λ_b, for which the same step would lower the loss by

        gain_b = −γ_b τ − ½ λ_b τ².

    The rule takes the δ with the largest ``quantile`` of gain_b over the resamples, the smallest δ
    if several tie, and skips the direction if that quantile is negative. It never takes a δ with
    λ + δ = 0. γ and λ are redrawn together if they have equally many samples, else independently.
    The grid has the units of curvature; ``quantile`` lies in 0 to 1. Every call draws anew from
    ``generator``, once for all directions and all members of a ``vmap``. The scheme is that of
    ``BootstrapDamping2`` in ViViT's research code (arXiv 2106.02624): github.com/f-dangel/vivit,
    vivit/optim/damping.py.

    Examples
    --------
    Slopes of 1 and 3 agree on a step; slopes of −2 and 3 do not agree on its sign:

    >>> import torch
    >>> gammas, lambdas = torch.tensor([[1.0, -2.0], [3.0, 3.0]]), torch.ones(2, 2)
    >>> rule = bootstrap([0.0, 1.0, 10.0], torch.Generator().manual_seed(0))
    >>> rule(torch.ones(2), torch.eye(2), gammas, lambdas)
    tensor([1., inf])
    """
    ascending = _ascending_dampings(grid)
    check_resampling(generator, resamples, quantile)
    return Bootstrap(ascending, generator, resamples, quantile)


def _ascending_dampings(grid: Sequence[float] | Tensor) -> Float[Tensor, " g"]:
    """Return the dampings of a grid in ascending order; raise if one is not a number ≥ 0."""
    rule, got = "bootstrap: grid must be a sequence of numbers ≥ 0, at least one", repr(grid)
    remedy = "Pass some dampings, such as torch.logspace(-3, 2, 20)."
    try:
        deltas = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(sentence(rule, got, remedy)) from error
    if deltas.ndim != 1 or deltas.numel() == 0 or any_known(~(deltas >= 0)):
        raise BadValue(sentence(rule, got, remedy))
    return deltas.sort().values


def as_rule(damping: float | Tensor | DampingRule) -> DampingRule:
    """Return a damping as a rule: a number becomes a constant one, a rule stays."""
    return damping if callable(damping) else constant(damping)


def check_dampings(dampings: object, directions: int) -> None:
    """Require one damping ≥ 0 per direction, not nan; an infinite one skips its direction."""
    # A tensor of real numbers, before their values can be looked at.
    if not isinstance(dampings, Tensor):
        rule = "damping must return a tensor of shape [K]"
        got, remedy = type(dampings).__name__, "Build it with torch, like its arguments."
        raise BadType(sentence(rule, got, remedy))
    if dampings.dtype == torch.bool or dampings.is_complex():
        rule, remedy = "damping must return real numbers", "To choose directions, use select."
        raise BadType(sentence(rule, dampings.dtype, remedy))
    # Nothing is broadcast: one number for all directions may be a mistake.
    if dampings.shape != (directions,):
        rule = f"damping must return one value for each of the K = {directions} directions"
        remedy = "Return a tensor of shape [K], such as δ * torch.ones_like(evals)."
        raise BadValue(sentence(rule, f"shape {list(dampings.shape)}", remedy))
    # "Not ≥ 0" is true of nan as well.
    if any_known(~(dampings >= 0)):
        values = unwrapped(dampings)
        rule = "damping must not be negative or nan"
        got = f"{float(values[~(values >= 0)][0])}"
        raise BadValue(sentence(rule, got, "Return 0 or more; inf skips a direction."))
