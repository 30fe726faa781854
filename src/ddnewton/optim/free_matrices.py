"""The Gauss-Newton matrices of the blocks, known by products: their gradients and traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ddnewton.quadratic.matrix_free.free_model import FreeModel, operator_of
from ddnewton.quadratic.matrix_free.operator import Operator
from ddnewton.trees import along_block

FEW_PARAMETERS, PROBES = 128, 2
"""Up to how many parameters the trace is exact, and of how many random vectors else the mean: it is
then known to a factor of three or so if one eigenvalue is most of it, and better where none is;
the vectors are the same in every update, so that the mean does not jump between batches."""


class FreeMatrix(NamedTuple):
    """The Gauss-Newton matrix of a block, known by products; its diagonal is not."""

    operator: Operator
    gradient: Float[Tensor, " d"]
    estimated_trace: Float[Tensor, ""]

    @property
    def side(self) -> int:
        """How many eigenvalues can be positive."""
        return min(self.operator.i, self.operator.d)

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace, by a few random vectors."""
        return self.estimated_trace


def free_matrices(model: FreeModel) -> list[FreeMatrix]:
    """Return the matrices of the blocks by products, with their gradients and traces."""
    operators = [operator_of(model, block.leaves) for block in model.blocks]
    return [FreeMatrix(operator, operator.gradient(), _trace(operator)) for operator in operators]


def of_free_parameters(
    model: FreeModel, matrices: Sequence[FreeMatrix], free: Bool[Tensor, " d"]
) -> list[FreeMatrix]:
    """Return matrices in which parameters that are not free have no slopes and no curvature."""
    masked = []
    for (operator, gradient, _), block in zip(matrices, model.blocks, strict=True):
        mask = along_block(free, block.leaves, model.sizes).double()
        scale = mask if operator.scale is None else mask * operator.scale
        operator_of_free = operator.in_units(scale)
        masked.append(FreeMatrix(operator_of_free, mask * gradient, _trace(operator_of_free)))
    return masked


def _trace(operator: Operator) -> Float[Tensor, ""]:
    """Return the trace of G: the mean of vᵀG v over vectors of random signs (Hutchinson, 1990)."""
    if operator.d <= FEW_PARAMETERS:
        unit = torch.eye(operator.d, dtype=torch.float64, device=operator.device)
        return operator.curvatures(unit).sum()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2, (PROBES, operator.d), generator=generator, device="cpu")
    return operator.curvatures(drawn.double().to(operator.device) * 2 - 1).mean()
