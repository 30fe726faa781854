"""The quadratic model of some of the parameters, while others are held where they are.

Everything keeps its size: a parameter that is held has a scale of zero, and so a row of zeros in
the columns A.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.matrices import rescaled
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.transforms import any_known


def of_free(
    model: QuadraticModel, matrices: Sequence[GaussNewton], free: Bool[Tensor, " d"]
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return model and matrices of the free parameters."""
    if not any_known(~free):
        return model, list(matrices)
    return rescaled(model, matrices, free.to(model.curvature_weights))
