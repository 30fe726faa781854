"""What losses share whose outputs do not interact: ∇²ℓ is diagonal, and L = I."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.loss import Expansion, Loss, Uniform, spanned
from ddnewton.types import PyTree


class Terms(NamedTuple):
    """What every output adds to the loss, with its two derivatives."""

    values: Float[Tensor, "n ..."]
    slopes: Float[Tensor, "n ..."]
    curvatures: Float[Tensor, "n ..."]


Score: TypeAlias = Callable[[Tensor, PyTree, Tensor], Tensor]
"""``score(f, y, u)``: slopes of the terms at targets drawn by u, which has one more axis."""


def elementwise(
    terms: Callable[[Tensor, PyTree], Terms],
    denominator: Callable[[Tensor, PyTree], float | Tensor],
    check: Callable[[Tensor, PyTree], None],
    score: Score | None = None,
) -> Loss:
    """Return the record of a loss that is a sum of terms, one for each output."""

    def expand(f: Float[Tensor, "n ..."], y: PyTree) -> Expansion:
        return separable(*(part.reshape(f.shape[0], -1) for part in terms(f.double(), y)))

    def gradient(f: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor]:
        values, slopes, _ = (part.reshape(f.shape[0], -1) for part in terms(f.double(), y))
        return values.sum(1), slopes

    if score is None:
        return Loss(expand, denominator, check, None, gradient)

    def scores(
        f: Float[Tensor, "n ..."], y: PyTree, count: int, uniform: Uniform
    ) -> Float[Tensor, "n c m"]:
        return score(f.double(), y, uniform((*f.shape, count))).reshape(f.shape[0], -1, count)

    return Loss(expand, denominator, check, scores, gradient)


def separable(
    values: Float[Tensor, "n c"], slopes: Float[Tensor, "n c"], curvatures: Float[Tensor, "n c"]
) -> Expansion:
    """Return the expansion of a loss whose outputs do not interact: L = I."""
    n, c = slopes.shape
    identity = torch.eye(c, dtype=slopes.dtype, device=slopes.device)
    return spanned(values.sum(1), identity.expand(n, c, c), slopes, curvatures)


def spread(weight: Tensor | None, f: Float[Tensor, "*c"]) -> Float[Tensor, "*c"]:
    """Return the weight of every output: 1 where none is given."""
    if weight is None:
        return torch.ones_like(f)
    return weight.to(device=f.device, dtype=f.dtype).expand(f.shape)


def normal(u: Float[Tensor, "*c"], scale: Float[Tensor, "..."]) -> Float[Tensor, "*c"]:
    """Return normal numbers, of which u are the probabilities to lie below."""
    quantiles: Tensor = torch.special.ndtri(u)
    return scale[..., None] * quantiles
