"""Damping rules: functions of what is known of every direction.

A rule ``damping(evals [K], evecs [NM, K], gammas [N, K], lambdas [N', K]) -> [K]`` gets the kept
eigenpairs and every sample's slope and curvature along them, and returns δ_k ≥ 0 in the units of
curvature. The step along direction k is −γ_k / (λ_k + δ_k), with the samples' means; δ_k = ∞ skips
it. Sub-sampling makes N and N' differ. Bad arguments are refused where a rule is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_nonnegative
from ddnewton.transforms import any_known, untransformed, unwrapped
from ddnewton.types import DampingRule

GAINS_AT_ONCE = 2**22
"""How many gains of a bootstrap exist at once: 32 MiB."""


def constant(delta: float | Tensor) -> DampingRule:
    """Return a rule that damps every direction by δ ≥ 0, in the units of curvature.

    Examples
    --------
    >>> import torch
    >>> constant(0.5)(torch.ones(2), torch.eye(2), torch.ones(2, 2), torch.ones(2, 2))
    tensor([0.5000, 0.5000])
    """
    check_nonnegative("damping", delta)

    def damping(
        evals: Float[Tensor, " k"],
        evecs: object,
        gammas: Float[Tensor, "n k"],
        lambdas: Float[Tensor, "n2 k"],
    ) -> Float[Tensor, " k"]:
        return delta * torch.ones_like(evals)

    return damping


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

    def damping(
        evals: Float[Tensor, " k"],
        evecs: object,
        gammas: Float[Tensor, "n k"],
        lambdas: Float[Tensor, "n2 k"],
    ) -> Float[Tensor, " k"]:
        return fraction * evals.sort().values[-1:].expand_as(evals)  # K may be 0

    return damping


def signal_to_noise(caution: float | Tensor = 1.0) -> DampingRule:
    """Return a rule that damps a direction by how uncertain its slope and its curvature are.

    With means, unbiased variances and standard errors over the samples,

        δ_k = (λ_k + caution · se(λ_k)) / shrink_k − λ_k,   shrink_k = 1 − var(γ_k) / (N γ_k²),

    and ∞ where shrink_k ≤ 0. So a shrunken slope is divided by a pessimistic curvature:

        −γ_k / (λ_k + δ_k) = −γ_k shrink_k / (λ_k + caution · se(λ_k)).

    Skipped are directions whose signal-to-noise ratio γ_k² / var(γ_k) does not exceed 1/N, and
    those whose curvature is zero even so. δ has the units of curvature, ``caution`` ≥ 0 has none.
    The rule knows of noise, not of how far the quadratic model holds: on a fresh net, flat
    directions with certain slopes are hardly damped. There, add a floor to what it returns. Called
    with fewer than two samples it raises a ValueError.

    The ratio and its line 1/N are those of Dangel, Tatzel, Hennig, *ViViT*, TMLR 2022, arXiv
    2106.02624; the shrinkage is of the positive-part James-Stein form, 1 in place of dimension − 2.

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

    def damping(
        evals: Float[Tensor, " k"],
        evecs: object,
        gammas: Float[Tensor, "n k"],
        lambdas: Float[Tensor, "n2 k"],
    ) -> Float[Tensor, " k"]:
        n, n2 = gammas.shape[0], lambdas.shape[0]
        if min(n, n2) < 2:
            rule, got = "signal_to_noise: a spread needs two samples", f"gammas: {n}, lambdas: {n2}"
            raise BadValue(sentence(rule, got, "Pass a larger batch, or damp by another rule."))
        gammas, lambdas = gammas.double(), lambdas.double()
        slope, curvature = gammas.mean(0), lambdas.mean(0)
        noise = (gammas - slope).square().sum(0) / (n * (n - 1)) / slope.square()  # 1 − shrink
        excess = caution * ((lambdas - curvature).square().sum(0) / (n2 * (n2 - 1))).sqrt()
        delta = (curvature * noise + excess) / (1 - noise)
        certain = (noise < 1) & (curvature + excess > 0)  # not where 0/0 made a nan
        return torch.where(certain, delta.clamp(min=0), torch.inf).to(evals.dtype)

    return damping


def bootstrap(
    grid: Sequence[float] | Tensor,
    generator: torch.Generator,
    resamples: int = 1000,
    quantile: float = 0.05,
) -> DampingRule:
    """Return a rule that takes, of a grid, the damping with the best gain in all but bad luck.

    Each δ of the grid is a step τ = −γ / (λ + δ). Redrawing the samples with replacement makes
    other means γ_b and λ_b, for which the same step would lower the loss by

        gain_b = −γ_b τ − ½ λ_b τ².

    Kept is the δ with the largest ``quantile`` of the gain over the resamples, the smallest of
    several; the direction is skipped where that is negative. λ + δ = 0 is never chosen. γ and λ are
    redrawn together where they have equally many samples, independently where not. The grid has the
    units of curvature; ``quantile`` lies in 0 to 1. Every call draws from ``generator`` anew, once
    for all directions and all members of a ``vmap``. The scheme is that of ``BootstrapDamping2`` in
    ViViT's research code (arXiv 2106.02624): github.com/f-dangel/vivit, vivit/optim/damping.py.

    Examples
    --------
    Slopes of 1 and 3 deserve a step, slopes of −2 and 3 may as well point the other way:

    >>> import torch
    >>> gammas, lambdas = torch.tensor([[1.0, -2.0], [3.0, 3.0]]), torch.ones(2, 2)
    >>> rule = bootstrap([0.0, 1.0, 10.0], torch.Generator().manual_seed(0))
    >>> rule(torch.ones(2), torch.eye(2), gammas, lambdas)
    tensor([1., inf])
    """
    ascending = _ascending(grid)
    _check_resampling(generator, resamples, quantile)

    def damping(
        evals: Float[Tensor, " k"],
        evecs: object,
        gammas: Float[Tensor, "n k"],
        lambdas: Float[Tensor, "n2 k"],
    ) -> Float[Tensor, " k"]:
        gammas, lambdas, deltas = gammas.double(), lambdas.double(), ascending.to(gammas.device)
        counts = dict.fromkeys([gammas.shape[0], lambdas.shape[0]])  # one where they agree
        weights = {n: _weights(n, resamples, generator).to(gammas.device) for n in counts}
        steps = -gammas.mean(0) / (lambdas.mean(0) + deltas[:, None])
        redrawn = (steps, weights[len(gammas)] @ gammas, weights[len(lambdas)] @ lambdas)
        piece = max(1, GAINS_AT_ONCE // (len(deltas) * resamples))
        pieces = zip(*(part.split(piece, dim=1) for part in redrawn), strict=True)
        gains = torch.cat([_gains(quantile, *parts) for parts in pieces], dim=1)
        best = deltas[gains.argmax(0)]  # the first of equals, so the smallest
        return torch.where(gains.amax(0) >= 0, best, torch.inf).to(evals.dtype)

    return damping


def _ascending(grid: Sequence[float] | Tensor) -> Float[Tensor, " g"]:
    """Return the dampings of a grid, the smallest first."""
    rule, got = "bootstrap: grid must be a sequence of numbers ≥ 0, at least one", repr(grid)
    remedy = "Pass some dampings, such as torch.logspace(-3, 2, 20)."
    try:
        deltas = torch.as_tensor(grid, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(sentence(rule, got, remedy)) from error
    if deltas.ndim != 1 or deltas.numel() == 0 or any_known(~(deltas >= 0)):
        raise BadValue(sentence(rule, got, remedy))
    return deltas.sort().values


def _check_resampling(generator: object, resamples: int, quantile: float) -> None:
    """Require what a bootstrap is made of."""
    if not isinstance(generator, torch.Generator):
        rule, remedy = "bootstrap: generator must be a torch.Generator", "Make one from a seed."
        raise BadType(sentence(rule, repr(generator), remedy))
    whole = isinstance(resamples, int) and not isinstance(resamples, bool)
    if not whole or resamples < 1:
        rule = "bootstrap: resamples must be an integer ≥ 1"
        raise (BadValue if whole else BadType)(sentence(rule, repr(resamples), "Pass a count."))
    real = isinstance(quantile, Real) and not isinstance(quantile, bool)
    if not real or not 0 <= quantile <= 1:
        rule, remedy = "bootstrap: quantile must lie in 0 to 1", "Pass a share, such as 0.05."
        raise (BadValue if real else BadType)(sentence(rule, repr(quantile), remedy))


def _weights(n: int, b: int, generator: torch.Generator) -> Float[Tensor, "b n"]:
    """Return each sample's weight in the mean of each resample: how often it came, over n."""
    with untransformed():  # vmap would refuse to draw
        drawn = torch.randint(n, (b, n), generator=generator, device=generator.device)
        ones = torch.ones_like(drawn, dtype=torch.float64)
        return torch.zeros_like(ones).scatter_add_(1, drawn, ones) / n


def _gains(
    quantile: float,
    steps: Float[Tensor, "g k"],
    slopes: Float[Tensor, "b k"],
    curvatures: Float[Tensor, "b k"],
) -> Float[Tensor, "g k"]:
    """Return a quantile of each step's gain over the resamples; −∞ where it is not finite."""
    tau = steps[:, None]
    ordered = (-tau * (slopes + curvatures * tau / 2)).sort(1).values
    position = quantile * (len(slopes) - 1)
    low, high = ordered[:, math.floor(position)], ordered[:, math.ceil(position)]
    found = low.lerp(high, position % 1)
    return torch.where(found.isfinite(), found, -torch.inf)


def as_rule(damping: float | Tensor | DampingRule) -> DampingRule:
    """Return a number as a constant rule, and a rule as it is."""
    return damping if callable(damping) else constant(damping)


def check_dampings(dampings: object, directions: int) -> None:
    """Require one damping per direction: not negative, not nan; infinite ones skip theirs."""
    if not isinstance(dampings, Tensor):
        rule = "damping must return a tensor of shape [K]"
        got, remedy = type(dampings).__name__, "Build it with torch, like its arguments."
        raise BadType(sentence(rule, got, remedy))
    if dampings.dtype == torch.bool or dampings.is_complex():
        rule, remedy = "damping must return real numbers", "To choose directions, use select."
        raise BadType(sentence(rule, dampings.dtype, remedy))
    if dampings.shape != (directions,):
        rule = f"damping must return one value for each of the K = {directions} directions"
        remedy = "Return a tensor of shape [K], such as δ * torch.ones_like(evals)."
        raise BadValue(sentence(rule, f"shape {list(dampings.shape)}", remedy))
    if any_known(~(dampings >= 0)):
        values = unwrapped(dampings)
        rule = "damping must not be negative or nan"
        got = f"{float(values[~(values >= 0)][0])}"
        raise BadValue(sentence(rule, got, "Return 0 or more; inf skips a direction."))
