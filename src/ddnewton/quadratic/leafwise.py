r"""Weight decay that differs inside a block: the damping is a diagonal matrix D = diag(w) + δI.

In coordinates scaled by its root the damping is 1 along all directions,

    (G + D)⁻¹ = D^{-1/2} (G̃ + I)⁻¹ D^{-1/2},        G̃ = D^{-1/2} G D^{-1/2},

and the columns are D^{-1/2} A. Their inner products are sums over the parameters, so that with K_w
for those along the leaves that decay by w

    K̃ = Σ_w K_w / (w + δ):

K_w is formed once a batch, and K̃ of it for every δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.alignment import Leaves
from ddnewton.columns.gram import side_by_side
from ddnewton.errors import BadValue, sentence
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.proximal import ProximalBlock, different
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.transforms import any_known


class LeafwiseBlock(NamedTuple):
    """The different decays of a block, that of each parameter, and AᵀA₁ along their leaves."""

    decays: Float[Tensor, " g"]
    of_params: Float[Tensor, " d"]
    products: Float[Tensor, "g a i"]  # none on the side of the parameters


def leafwise_blocks(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    pulls: Sequence[ProximalBlock],
    decays: Sequence[float | Tensor],
) -> list[LeafwiseBlock]:
    """Return the blocks with their inner products by decay; none where one holds for each block."""
    if all(len(pull.decays) == 1 for pull in pulls):
        return []
    sizes = model.sizes
    blocks = []
    for leaves, matrix, pull in zip(model.leaves, matrices, pulls, strict=True):
        # Which leaves have which decay, and the inner products along these.
        parts = [[leaf for leaf in leaves if decays[leaf] == decay] for decay in pull.decays]
        empty = matrix.entries.new_zeros(0, *matrix.entries.shape)
        inner = _inner(model, parts) if matrix.on_columns else empty
        by_param = [matrix.weights.new_full((sizes[leaf],), float(decays[leaf])) for leaf in leaves]
        blocks.append(
            LeafwiseBlock(
                decays=matrix.weights.new_tensor([float(decay) for decay in pull.decays]),
                of_params=torch.cat(by_param),
                products=inner,
            )
        )
    return blocks


def check_leafwise(
    model: QuadraticModel, decays: Sequence[float | Tensor], complement: object
) -> None:
    """Require one damping of all directions of a block inside which decays differ."""
    rule = "weight_decay that differs inside a block needs one damping of all its directions"
    remedy = "Leave that out, or make a group of the leaves with one weight_decay each."
    for block in model.blocks:
        if len(different([decays[leaf] for leaf in block.leaves])) < 2:
            continue
        asked = {
            "a damping rule": callable(block.damping),
            "select": block.select is not None,
            "a number as complement": complement not in (None, "damping"),
            "subsampling_curvature": model.has_curvature_samples,
        }
        for name, given in asked.items():
            if given:
                raise BadValue(sentence(rule, name, remedy))


def scaled_matrix(
    matrix: GaussNewton, block: LeafwiseBlock, delta: Float[Tensor, ""]
) -> GaussNewton:
    """Return the Gauss-Newton matrix in the coordinates in which D is 1."""
    if any_known(block.decays + delta <= 0):
        rule = "leaves without weight_decay need a damping above 0 beside others that have one"
        raise BadValue(sentence(rule, "0", "Pass a number above 0 as damping."))
    root, columns = (block.of_params + delta).rsqrt(), matrix.columns
    gradient = matrix.gradient
    if matrix.on_columns:
        entries = torch.einsum("g,gai->ai", 1 / (block.decays + delta), block.products)
    else:
        entries, gradient = root[:, None] * matrix.entries * root, root * gradient
    scaled = columns._replace(
        matmat=lambda weights: root * columns.matmat(weights),
        rmatmat=lambda vectors: columns.rmatmat(root[:, None] * vectors),
    )
    return matrix._replace(columns=scaled, entries=entries, gradient=gradient)


def unscaled(
    vector: Float[Tensor, " d"], matrix: GaussNewton, block: LeafwiseBlock, delta: Float[Tensor, ""]
) -> Float[Tensor, " d"]:
    """Return the step of a sum of columns of A, or else of a vector in scaled coordinates."""
    damping = block.of_params + delta
    return vector / damping if matrix.on_columns else vector * damping.rsqrt()


def _inner(model: QuadraticModel, parts: Sequence[Leaves]) -> Float[Tensor, "g a i"]:
    """Return AᵀA₁ along some sets of leaves."""
    return torch.stack(side_by_side(model.jacobians, model.curvature_jacobians, parts))
