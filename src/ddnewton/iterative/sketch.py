r"""A sketch of G from few products, and the preconditioner that it makes.

The Nyström approximation of G from orthonormal random columns Ω is

    Ĝ = Y (ΩᵀY)⁻¹ Yᵀ = U Λ Uᵀ,        Y = G Ω,

and 0 ≤ Ĝ ≤ G. It is made of G + νI, with a ν a little above the rounding of Y, and then Λ − ν
(Frangella, Tropp, Udell, "Randomized Nyström preconditioning", 2021, algorithm 2.1). With its
smallest eigenvalue λ_r the preconditioner (section 5.1) is

    P = U (Λ + δ) Uᵀ / (λ_r + δ) + I − UUᵀ,    P⁻¹ = (λ_r + δ) U (Λ + δ)⁻¹ Uᵀ + I − UUᵀ.

**A ≥ δP for A = G + δI**: from Ĝ + νUUᵀ ≤ G + νI it follows that G ≥ Ĝ − ν (I − UUᵀ), so

    A − δP ≥ U (Λ + δ) Uᵀ (1 − δ / (λ_r + δ)) − ν (I − UUᵀ),

of which the first part is not negative, as λ_r ≥ 0. For the second one, A ≥ tG + δI with any share
t ≤ 1: the same holds with tΛ for Λ and tν for ν. With the t for which tν ≤ ε δ the P of tΛ needs no
more than the factor 1 − tν / δ, as P ≥ I − UUᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.products import FLOAT64_ROUNDING, BlockProduct, finite

COLUMNS_AT_ONCE = 16
"""Of the random matrix, in one product."""

SKETCH_COPIES = 4
"""How many matrices of the size of a sketch there are while it is made."""

UNCERTAIN_SHARE = 0.01
"""ε: which part of δ the rounding of a sketch may take up."""


class Sketch(NamedTuple):
    """Approximate leading eigenpairs, descending, and the shift ν that covers their rounding."""

    vectors: Float[Tensor, "side r"]
    evals: Float[Tensor, " r"]
    shift: float
    products: int  # that it took


def sketch(
    product: BlockProduct,
    side: int,
    rank: int,
    generator: torch.Generator,
    *,
    device: torch.device | str = "cpu",
    rounding: float = 0.0,
    memory: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Sketch:
    """Return a Nyström approximation of G from as many products as its rank.

    The rank is smaller where ``memory``, in bytes, or the side is. ``dtype`` is that in which the
    vectors are stored; ``rounding`` is that of a product relative to ‖G‖ ‖v‖.

    Source: Frangella, Tropp, Udell, 2021, algorithm 2.1.

    Raises
    ------
    NotFinite
        A product has nan or inf.

    >>> G = torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=torch.float64).diag()
    >>> sketch(lambda V: G @ V, 4, 3, torch.Generator().manual_seed(0)).evals
    tensor([3., 2., 0.], dtype=torch.float64)
    """
    if memory is not None:
        rank = min(rank, largest_rank(memory, side))
    rank = max(min(rank, side), 1)
    # Y = G Ω, some columns at a time.
    shape, source = (side, rank), generator.device
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator, device=source)
    omega, drawn = torch.linalg.qr(drawn.to(device))
    Y = torch.cat([finite(product(block)) for block in omega.split(COLUMNS_AT_ONCE, 1)], 1)
    # A root of Ĝ + νUUᵀ, B = (Y + νΩ) C⁻¹ with CᵀC = Ωᵀ(Y + νΩ). It need not exist by rounding.
    rounding = max(rounding, FLOAT64_ROUNDING, torch.finfo(dtype).eps)
    shift = rounding * float(Y.norm()) + torch.finfo(torch.float64).tiny
    core = omega.mT @ Y
    core, identity = (core + core.mT) / 2, torch.eye(rank, dtype=Y.dtype, device=Y.device)
    factor, failed = torch.linalg.cholesky_ex(core + shift * identity, upper=True)
    while failed:
        shift *= 4
        factor, failed = torch.linalg.cholesky_ex(core + shift * identity, upper=True)
    root = torch.linalg.solve_triangular(factor, Y.add_(omega, alpha=shift), upper=True, left=False)
    del omega, Y
    # Its left singular vectors and squared singular values, by way of a triangular matrix.
    frame, triangle = torch.linalg.qr(root)
    squares, rotation = torch.linalg.eigh(triangle @ triangle.mT)
    evals = (squares.flip(0) - shift).clamp(min=0)
    return Sketch((frame @ rotation.flip(1)).to(dtype), evals, shift, rank)


def largest_rank(memory: float, side: int) -> int:
    """Return the rank of the largest sketch that can be made in some bytes."""
    return int(memory / (8 * SKETCH_COPIES * max(side, 1)))


def preconditioner(
    approximation: Sketch, delta: float
) -> Callable[[Float[Tensor, " side"]], Float[Tensor, " side"]]:
    """Return v ↦ P⁻¹v with G + δI ≥ δP, for any δ > 0: one sketch serves all of them.

    Source: Frangella, Tropp, Udell, 2021, section 5.1.
    """
    vectors, evals, shift, _ = approximation
    # The share of G that is counted, and what its rounding then takes of δ.
    share = min(1.0, UNCERTAIN_SHARE * delta / shift)
    enlarged = 1 / (1 - share * shift / delta)
    counted = share * evals
    weights = (counted[-1] + delta) / (counted + delta) - 1

    def inverse(v: Float[Tensor, " side"]) -> Float[Tensor, " side"]:
        coordinates = (vectors.mT @ v.to(vectors.dtype)).to(v.dtype)
        return enlarged * (v + (vectors @ (weights * coordinates).to(vectors.dtype)).to(v.dtype))

    return inverse
