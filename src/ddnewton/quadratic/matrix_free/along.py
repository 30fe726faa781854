"""The leading directions of a block with what steps along them ask for, by products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.damping import as_rule, check_dampings
from ddnewton.inputs.groups import Block
from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.matrix_free.free_model import FreeModel
from ddnewton.quadratic.matrix_free.leading_directions import (
    FreeDirections,
    coordinates_of,
    free_directions,
)
from ddnewton.quadratic.matrix_free.operator import Operator


class Along(NamedTuple):
    """The directions of a block with the derivatives along them, and what rules ask for."""

    kept: FreeDirections
    derivatives: Derivatives
    evecs: Float[Tensor, "i k"]
    dtype: torch.dtype  # that of what rules get


def along_of(model: FreeModel, operator: Operator, block: Block) -> Along:
    """Return the directions of a block, with the derivatives along them."""
    kept = free_directions(operator, block.select, model.arguments.tol, model.dtype)
    evecs = coordinates_of(operator, kept) if callable(block.damping) else kept.evals[:0, None]
    return Along(kept, operator.derivatives(kept.vectors), evecs, model.dtype)


def dampings_along(along: Along, block: Block) -> Float[Tensor, " k"]:
    """Return the dampings that a block says of its directions, by a rule that gets copies."""
    parts = [along.kept.evals, along.evecs, *along.derivatives]
    dampings = as_rule(block.damping)(*(part.to(along.dtype, copy=True) for part in parts))
    check_dampings(dampings, len(along.kept.evals))
    return dampings.to(along.kept.evals.device)


def left_out(along: Along, gradient: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return the part of the gradient outside of the directions, g − Pg."""
    vectors = along.kept.vectors
    return gradient - (vectors @ gradient) @ vectors
