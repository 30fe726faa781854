"""The rule of `ddnewton.damping.bootstrap`: gains of steps on resampled batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.records import restored_draws, stored_draws
from ddnewton.transforms import untransformed

GAINS_AT_ONCE = 2**22
"""How many gains of a bootstrap are in memory at a time: 32 MiB in float64."""


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """The rule of `bootstrap`: a class, for a generator is pickled by its state."""

    grid: Float[Tensor, " g"]  # ascending
    generator: torch.Generator
    resamples: int
    quantile: float

    def __call__(
        self,
        evals: Float[Tensor, " k"],
        evecs: object,
        gammas: Float[Tensor, "n k"],
        lambdas: Float[Tensor, "n2 k"],
    ) -> Float[Tensor, " k"]:
        """Return the dampings with the best quantiles of their gains."""
        # One resampling for each number of samples, so one for γ and λ if theirs agree.
        gammas, lambdas, deltas = gammas.double(), lambdas.double(), self.grid.to(gammas.device)
        counts = dict.fromkeys([gammas.shape[0], lambdas.shape[0]])
        resampling = {
            n: _mean_weights(n, self.resamples, self.generator).to(gammas.device) for n in counts
        }
        # The steps τ [G, K] at the means of the batch, and the means γ_b and λ_b [B, K].
        steps = -gammas.mean(0) / (lambdas.mean(0) + deltas[:, None])
        gammas_b, lambdas_b = resampling[len(gammas)] @ gammas, resampling[len(lambdas)] @ lambdas
        # All gains [G, B, K] may not fit into memory: take a few directions at a time.
        size = max(1, GAINS_AT_ONCE // (len(deltas) * self.resamples))
        pieces = zip(*(x.split(size, dim=1) for x in (steps, gammas_b, lambdas_b)), strict=True)
        gains = torch.cat([_gain_quantiles(self.quantile, *piece) for piece in pieces], dim=1)
        # argmax takes the first of several largest, so the smallest δ.
        best = deltas[gains.argmax(0)]
        return torch.where(gains.amax(0) >= 0, best, torch.inf).to(evals.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        draws = stored_draws(self.generator)
        return _bootstrap_with_draws, (self.grid, self.resamples, self.quantile, *draws)


def _bootstrap_with_draws(
    grid: Float[Tensor, " g"],
    resamples: int,
    quantile: float,
    device: torch.device,
    state: Tensor,
) -> Bootstrap:
    """Return the rule with a generator in a state."""
    return Bootstrap(grid, restored_draws(device, state), resamples, quantile)


def _mean_weights(n: int, b: int, generator: torch.Generator) -> Float[Tensor, "b n"]:
    """Return every sample's weight in the mean of every resample: how often it is drawn, over n."""
    with untransformed():  # vmap would refuse to draw
        drawn = torch.randint(n, (b, n), generator=generator, device=generator.device)
        ones = torch.ones_like(drawn, dtype=torch.float64)
        return torch.zeros_like(ones).scatter_add_(1, drawn, ones) / n


def _gain_quantiles(
    quantile: float,
    steps: Float[Tensor, "g k"],
    gammas_b: Float[Tensor, "b k"],
    lambdas_b: Float[Tensor, "b k"],
) -> Float[Tensor, "g k"]:
    """Return a quantile of each step's gain over the resamples; −∞ where it is not finite."""
    tau = steps[:, None]
    ordered = (-tau * (gammas_b + lambdas_b * tau / 2)).sort(1).values
    # Between two of the ordered gains the quantile is interpolated linearly.
    position = quantile * (len(gammas_b) - 1)
    low, high = ordered[:, math.floor(position)], ordered[:, math.ceil(position)]
    quantiles = low.lerp(high, position % 1)
    return torch.where(quantiles.isfinite(), quantiles, -torch.inf)
