r"""The sizes of the columns of the Jacobian, by which parameters of different units are compared.

The size of parameter j is √G_jj, the length of its column of √h J / √N. Divided by the largest ones
so far, steps and dampings have no units (Marquardt, 1963; Moré, 1978; MINPACK's D and
SciPy's ``x_scale="jac"``). Of a block with as many parameters as columns or more, on whose side the
matrix is then not formed, parameters keep their units: there the scaled step, which is the shortest
that interpolates the batch in the scaled norm, moves parameters by how little the samples depend on
them. That lowers the loss of the samples and raises the error between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import columns_of, scale_along
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.trees import along_block, joined


def column_sizes(
    matrices: Sequence[GaussNewton], blocks: Sequence[Leaves], counts: Sequence[int]
) -> Float[Tensor, " d"]:
    """Return √G_jj of every parameter, 0 where the matrix is on the side of the columns.

    ``counts`` are the numbers of entries of the leaves.
    """
    sizes = [
        matrix.weights.new_zeros(sum(counts[leaf] for leaf in block))
        if matrix.on_columns
        else matrix.diagonal().clamp(min=0).sqrt()
        for matrix, block in zip(matrices, blocks, strict=True)
    ]
    return joined(sizes, blocks, counts)


def scale_by_sizes(
    largest: Float[Tensor, " d"],
    matrices: Sequence[GaussNewton],
    blocks: Sequence[Leaves],
    counts: Sequence[int],
) -> Float[Tensor, " d"]:
    """Return the inverse of the sizes; 1 for columns of zeros and on the side of the columns."""
    scales = []
    for matrix, block in zip(matrices, blocks, strict=True):
        sizes = along_block(largest, block, counts)
        sized = (sizes > 0) & (not matrix.on_columns)
        scales.append(torch.where(sized, 1 / torch.where(sized, sizes, 1), 1))
    scale = joined(scales, blocks, counts)
    return torch.where(scale > 0, scale, 1)  # of leaves in no block


def scaled_matrices(
    matrices: Sequence[GaussNewton], blocks: Sequence[Leaves], jacobians: Sequence[Jacobian]
) -> list[GaussNewton]:
    """Return S G S and S g of the blocks on the side of the parameters, by the Jacobians' scale."""
    scaled = []
    for matrix, block in zip(matrices, blocks, strict=True):
        scale = None if matrix.on_columns else scale_along(jacobians[0], block)
        scaled.append(matrix.scaled(columns_of(jacobians, block), scale))
    return scaled
