"""Products A Bᵀ of which half is enough where A is B: strips of rows, and what mirrors them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.exact_products import matrix_product
from ddnewton.transforms import is_batched
from ddnewton.trees import chunks

SYMMETRIC_STRIPS, STRIP_ROWS, LONG_ROWS = 8, 128, 1024
"""The number of strips of rows into which a symmetric product is cut, to leave out what lies below
the diagonal, how many rows these have at least, and the length of rows from which on that pays."""


def product(left: Float[Tensor, "i d"], right: Float[Tensor, "j d"]) -> Float[Tensor, "i j"]:
    """Return left rightᵀ; of one tensor with itself perhaps the upper triangle: see `completed`."""
    count, length = left.shape
    if left is not right or length < LONG_ROWS or count <= STRIP_ROWS:
        return matrix_product(left, right)
    strips = [
        F.pad(matrix_product(left[rows], left[rows.start :]), (rows.start, 0))
        for rows in chunks(count, max(-(-count // SYMMETRIC_STRIPS), STRIP_ROWS))
    ]
    return torch.cat(strips)


def completed(products: Float[Tensor, "i j"], symmetric: bool) -> Float[Tensor, "i j"]:
    """Return all products, given the upper triangle of those that are symmetric.

    They are written below it, some rows at a time, where possible: `mirrored`.
    """
    if not symmetric:
        return products
    if is_batched(products) or len(products) <= LONG_ROWS // 2:
        return products.triu() + products.triu(1).T
    mirrored(products)
    return products


def mirrored(matrix: Float[Tensor, "i i"]) -> None:
    """Write what is above the diagonal below it."""
    for rows in chunks(len(matrix), LONG_ROWS // 4):
        corner = matrix[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].mT
