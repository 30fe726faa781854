r"""Products of matrices in float64, of float32 products without rounding, where float64 is slow.

Every row is a sum of slices, α = 2^e (α₀ + 2⁻⁹ α₁ + 2⁻¹⁸ α₂ + …), integers of 8 bits and a sign. A
float32 product of two slices over 2⁸ entries is exact, for its sums are integers up to 2²⁴; all of
them are added in float64. What is left of a row behind the last slice is below 2⁻²⁷ of its largest
entry, less than the rounding of a float32, and the same in every product: of columns in float32
the inner products are those of columns that are right to float32, and have no negative eigenvalue.

Source: Ozaki, Ogita, Oishi, Rump, Numerical Algorithms 59, 2012.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.large_products import product_of_rows
from ddnewton.devices import has_fast_float64
from ddnewton.trees import chunks

SLICE_BITS, NEXT_BITS, SLICES = 8, 9, 3
"""How many bits a slice has, how many more the rounded remainder gives, and how many slices."""

EXACT_ENTRIES = 2 ** (24 - 2 * SLICE_BITS)
"""Over how many entries the sums of products of slices are exact in float32."""


def matrix_product(left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]) -> Float[Tensor, "i j"]:
    """Return left rightᵀ, where float64 is slow the exact one of matrices narrower than that."""
    return sliced_product(left, right) if is_sliced(left) else product_of_rows(left, right)


def is_sliced(matrix: Tensor) -> bool:
    """Return whether products of a matrix are those of slices."""
    return matrix.dtype != torch.float64 and not has_fast_float64(matrix.device)


def sliced_product(left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]) -> Float[Tensor, "i j"]:
    """Return left rightᵀ in float64 by exact products of slices, of rows right to float32."""
    left_scale, right_scale = _scale(left), _scale(right)
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    # Over so many entries at a time that no sum of integers is rounded.
    for entries in chunks(left.shape[1], EXACT_ENTRIES):
        rows = _slices(left[:, entries] / left_scale)
        columns = rows if left is right else _slices(right[:, entries] / right_scale)
        for k, of_left in enumerate(rows):
            for m, of_right in enumerate(columns):
                part = of_left @ of_right.mT
                total = total + part.double() * 2.0 ** (-2 * SLICE_BITS - NEXT_BITS * (k + m))
    return left_scale * total * right_scale.mT


def _scale(rows: Float[Tensor, "i d"]) -> Float[Tensor, "i 1"]:
    """Return powers of two above the entries of every row, 1 for a row of zeros."""
    largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    mantissa, exponent = torch.frexp(largest.double())
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def _slices(rows: Float[Tensor, "i d"]) -> list[Float[Tensor, "i d"]]:
    """Return the slices of rows whose entries are at most 1, as integers in float32."""
    slices, remainder = [], rows * 2.0**SLICE_BITS
    for _ in range(SLICES):
        whole = remainder.round()
        slices.append(whole.float())
        remainder = (remainder - whole) * 2.0**NEXT_BITS
    return slices
