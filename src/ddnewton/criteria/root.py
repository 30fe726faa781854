r"""Losses around their outputs by products alone: the Hessian's root S, and never its basis L.

An `Expansion` holds L [n, c, m], which has a sample's outputs twice over: 20 GB for one softmax of
50,000 classes. A solver that multiplies with the Gauss-Newton matrix needs no entry of it, but

    u → S u,        v → Sᵀ v,        v → ∇²ℓ v = S Sᵀ v,        S = L √h.

In closed form these cost as much as the outputs are large. What such a product reads, its parts,
has a row for every sample, so that a root of some samples of a batch is the same one of these rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.linearize.basis import Basis, combined, projected, stored, with_stored
from ddnewton.types import PyTree

Rows: TypeAlias = slice | Tensor
"""Which samples of a batch, each of them once: a slice, or their indices."""

Product: TypeAlias = Callable[[Tensor], Tensor]


class Root(NamedTuple):
    """Losses around their outputs, ∇ℓ_n = r_n and ∇²ℓ_n = S_n S_nᵀ, by products in float64.

    A sample's outputs are flat, in the order in which they are rows of an expansion's basis.
    ``times`` and ``transposed`` are None where there are products with the Hessian and no root that
    is cheaper than an eigendecomposition. ``at(samples)`` is the same of some samples of the batch,
    whose products cost as much as these are many.
    """

    value: Float[Tensor, " n"]
    gradient: Float[Tensor, "n c"]  # r, every sample's
    columns: int  # m
    times: Product | None  # S u, [n, m] to [n, c]
    transposed: Product | None  # Sᵀ v, [n, c] to [n, m]
    product: Product  # S Sᵀ v, [n, c] to [n, c]
    spans: bool  # whether r lies in the span of L, as it does where no R is left
    at: Callable[[Rows], Root]
    squares: Float[Tensor, " n"] | None = None  # rᵀ(∇²ℓ)⁺r or more, None where it is not known


RootOf: TypeAlias = Callable[[Tensor, PyTree], Root | None]
"""``root(outputs, y)``: None where a batch has no root that is cheaper than its expansion."""


class PositionScores(NamedTuple):
    """Scores of the positions of every sample at drawn targets, [n, c] for [n, t, s], by products.

    The functions take, behind their argument, the parts of the samples that it is of.
    """

    parts: tuple[Tensor, ...]  # a row a sample
    positions: int
    times: Callable[..., Tensor]  # [n, t, s] to [n, c]
    transposed: Callable[..., Tensor]  # [n, c] to [n, t, s]
    summed: Callable[..., Tensor]  # of parts alone: [n, c, s], the sum over a sample's positions


def root_of_parts(
    value: Float[Tensor, " n"],
    gradient: Float[Tensor, "n c"],
    parts: tuple[Tensor, ...],
    columns: int,
    times: Callable[..., Tensor],
    transposed: Callable[..., Tensor],
    *,
    product: Callable[..., Tensor] | None = None,
    spans: bool = True,
    squares: Float[Tensor, " n"] | None = None,
) -> Root:
    """Return a root by functions of u, or v, and of parts that have a row a sample.

    ``product`` is of v ↦ S Sᵀv where that is had for less than by both factors.
    """

    def at(samples: Rows) -> Root:
        return root_of_parts(
            value[samples],
            gradient[samples],
            tuple(part[samples] for part in parts),
            columns,
            times,
            transposed,
            product=product,
            spans=spans,
            squares=None if squares is None else squares[samples],
        )

    def by_factors(v: Tensor, *parts: Tensor) -> Tensor:
        products: Tensor = times(transposed(v, *parts), *parts)
        return products

    of_hessian = by_factors if product is None else product
    return Root(
        value=value,
        gradient=gradient,
        columns=columns,
        times=lambda u: times(u, *parts),
        transposed=lambda v: transposed(v, *parts),
        product=lambda v: of_hessian(v, *parts),
        spans=spans,
        at=at,
        squares=squares,
    )


def diagonal_root(
    value: Float[Tensor, " n"], gradient: Float[Tensor, "n c"], h: Float[Tensor, "n c"]
) -> Root:
    """Return the root of losses [n] with a diagonal curvature h ≥ 0: S = diag √h."""
    h, r = h.double(), gradient.double()
    return root_of_parts(
        value.double(),
        r,
        (h.sqrt(),),
        h.shape[1],
        times=lambda u, s: s * u,
        transposed=lambda v, s: s * v,
        squares=squares_over(r, h),
    )


def squares_over(r: Float[Tensor, "n c"], h: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Return Σ_c r_c² / h_c of every sample, infinite for a slope without curvature."""
    return torch.where(r == 0, 0, r.square() / h).sum(1)


def column_root(value: Float[Tensor, " n"], gradient: Float[Tensor, "n c"]) -> Root:
    """Return the root of losses whose curvature is r rᵀ: S = r."""
    return root_of_parts(
        value.double(),
        gradient.double(),
        (gradient.double(),),
        1,
        times=lambda u, r: u * r,
        transposed=lambda v, r: (v * r).sum(1, keepdim=True),
    )


def dense_root(
    value: Float[Tensor, " n"],
    gradient: Float[Tensor, "n c"],
    basis: Basis,
    h: Float[Tensor, "n m"],
    *,
    spans: bool = True,
    squares: Float[Tensor, " n"] | None = None,
) -> Root:
    """Return the root of losses whose basis is made already: S = L √h."""
    return root_of_parts(
        value,
        gradient,
        (stored(basis), h.sqrt()),
        h.shape[1],
        times=lambda u, L, s: combined(with_stored(basis, L), s * u),
        transposed=lambda v, L, s: s * projected(with_stored(basis, L), v[..., None])[..., 0],
        spans=spans,
        squares=squares,
    )


def drawn_root(
    value: Float[Tensor, " n"],
    gradient: Float[Tensor, "n c"],
    scores: PositionScores,
    samples: int,
    *,
    by_position: bool,
) -> Root:
    """Return the root of losses whose curvature is the mean square of scores.

    S has a column for every draw at every position, or, where the scores of a sample's positions
    are summed, for every draw.
    """
    factor, t = samples**-0.5, scores.positions

    def times(u: Float[Tensor, "n m"], *parts: Tensor) -> Float[Tensor, "n c"]:
        of_draws = u.reshape(u.shape[0], -1, samples).expand(-1, t, -1)
        products: Tensor = factor * scores.times(of_draws, *parts)
        return products

    def transposed(v: Float[Tensor, "n c"], *parts: Tensor) -> Float[Tensor, "n m"]:
        along_scores: Tensor = factor * scores.transposed(v, *parts)
        return along_scores.flatten(1) if by_position else along_scores.sum(1)

    columns = samples * (t if by_position else 1)
    return root_of_parts(
        value.double(), gradient.double(), scores.parts, columns, times, transposed, spans=False
    )


def scaled_scores(scores: PositionScores, factor: Tensor) -> PositionScores:
    """Return scores times a number."""
    return scores._replace(
        times=lambda u, *parts: factor * scores.times(u, *parts),
        transposed=lambda v, *parts: factor * scores.transposed(v, *parts),
        summed=lambda *parts: factor * scores.summed(*parts),
    )


def scaled_root(root: Root, factor: float | Tensor) -> Root:
    """Return the root of losses times a number: value, gradient and Hessian scale, S by its √."""
    scaled = _scaled_curvature(root, factor)
    return scaled._replace(
        value=factor * root.value,
        gradient=factor * root.gradient,
        at=lambda samples: scaled_root(root.at(samples), factor),
        squares=None if root.squares is None else factor * root.squares,
    )


def with_gradient(
    root: Root, value: Float[Tensor, " n"], gradient: Float[Tensor, "n c"], factor: Tensor
) -> Root:
    """Return a root with the value and gradient of other losses, and a Hessian times a factor."""
    return _scaled_curvature(root, factor)._replace(
        value=value,
        gradient=gradient,
        spans=False,
        squares=None,
        at=lambda samples: with_gradient(
            root.at(samples), value[samples], gradient[samples], factor
        ),
    )


def _scaled_curvature(root: Root, factor: float | Tensor) -> Root:
    """Return a root with S times √factor, for values and gradients that are yet to be replaced."""
    times, transposed = root.times, root.transposed
    size = torch.as_tensor(factor, dtype=torch.float64, device=root.value.device).sqrt()
    return root._replace(
        times=None if times is None else lambda u: size * times(u),
        transposed=None if transposed is None else lambda v: size * transposed(v),
        product=lambda v: factor * root.product(v),
    )


def changed_root(
    root_of: RootOf | None, change: Callable[[Root, Tensor, PyTree], Root | None]
) -> RootOf | None:
    """Return the function of a changed root, of a record of a loss that may have none."""
    if root_of is None:
        return None

    def changed(outputs: Tensor, y: PyTree) -> Root | None:
        root = root_of(outputs, y)
        return None if root is None else change(root, outputs, y)

    return changed
