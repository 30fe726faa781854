"""Losses that are sums of one term an output: ∇²ℓ is diagonal, and L = I."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.loss import Expansion, Loss, Uniform, spanned
from ddnewton.criteria.root import Root, diagonal_root
from ddnewton.types import PyTree


class Terms(NamedTuple):
    """The term of every output in a loss, with its first and second derivative there, z and h."""

    values: Float[Tensor, "n ..."]
    z: Float[Tensor, "n ..."]
    h: Float[Tensor, "n ..."]


Score: TypeAlias = Callable[[Tensor, PyTree, Tensor], Tensor]
"""``score(f, y, u)``: derivatives of the terms at drawn targets.

u holds uniform random numbers, one for every draw on an axis behind those of f; the targets are
quantiles at them."""


def elementwise(
    terms: Callable[[Tensor, PyTree], Terms],
    denominator: Callable[[Tensor, PyTree], float | Tensor],
    check: Callable[[Tensor, PyTree], None],
    score: Score | None = None,
    information: Callable[[Tensor, PyTree], Tensor] | None = None,
) -> Loss:
    """Return the record of a loss that is a sum of terms, one for each output.

    The Fisher ``information`` of a term is given where it is not h.
    """

    def expand(f: Float[Tensor, "n ..."], y: PyTree) -> Expansion:
        return separable(*(part.reshape(f.shape[0], -1) for part in terms(f.double(), y)))

    def gradient(f: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor]:
        values, z, _ = (part.reshape(f.shape[0], -1) for part in terms(f.double(), y))
        return values.sum(1), z  # ∇ℓ = L z, and L = I

    def root(f: Float[Tensor, "n ..."], y: PyTree) -> Root:
        values, z, h = (part.reshape(f.shape[0], -1) for part in terms(f.double(), y))
        return diagonal_root(values.sum(1), z, h)

    def of_information(f: Float[Tensor, "n ..."], y: PyTree) -> tuple[Tensor, Tensor, Tensor]:
        assert information is not None
        value, z = gradient(f, y)
        return value, z, information(f.double(), y).reshape(z.shape)

    def scores(
        f: Float[Tensor, "n ..."], y: PyTree, count: int, uniform: Uniform
    ) -> Float[Tensor, "n c m"]:
        assert score is not None
        return score(f.double(), y, uniform((*f.shape, count))).reshape(f.shape[0], -1, count)

    return Loss(
        expand,
        denominator,
        check,
        scores=scores if score else None,
        gradient=gradient,
        fisher=(lambda f, y: diagonal(*of_information(f, y))) if information else None,
        root=root,
        fisher_root=(lambda f, y: diagonal_root(*of_information(f, y))) if information else None,
    )


def separable(
    values: Float[Tensor, "n c"], z: Float[Tensor, "n c"], h: Float[Tensor, "n c"]
) -> Expansion:
    """Return the expansion of a loss whose outputs do not interact: L = I."""
    return diagonal(values.sum(1), z, h)


def diagonal(
    value: Float[Tensor, " n"], z: Float[Tensor, "n c"], h: Float[Tensor, "n c"]
) -> Expansion:
    """Return the expansion of losses [n] with gradient z and a diagonal curvature h: L = I."""
    n, c = z.shape
    identity = torch.eye(c, dtype=z.dtype, device=z.device)
    return spanned(value, identity.expand(n, c, c), z, h)


def broadcast_to_outputs(weight: Tensor | None, f: Float[Tensor, "*c"]) -> Float[Tensor, "*c"]:
    """Return one weight for every output, in the outputs' dtype; 1 where none is given."""
    if weight is None:
        return torch.ones_like(f)
    return weight.to(device=f.device, dtype=f.dtype).expand(f.shape)


def normal_quantile(u: Float[Tensor, "*c"], scale: Float[Tensor, "..."]) -> Float[Tensor, "*c"]:
    """Return the numbers x with P(X ≤ x) = u for X ~ N(0, scale²); u has one axis more."""
    quantiles: Tensor = torch.special.ndtri(u)
    return scale[..., None] * quantiles
