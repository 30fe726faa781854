"""Columns of samples that give no directions: their slopes along the directions of others.

Few directions are pushed forward, K products J_n e_k for all columns of a sample. For many, or
where several processes hold the samples, the columns are pulled back, and multiplied with those
that the directions are made of.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import columns_of, matmat
from ddnewton.columns.tiles import side_by_side
from ddnewton.linearize.basis import projected
from ddnewton.linearize.precision import ramp
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.kept import Directions
from ddnewton.quadratic.quadratic_model import (
    QuadraticModel,
    in_params_units,
    to_parameters,
)
from ddnewton.quadratic.term import Term, Unseen
from ddnewton.transforms import unwrapped, vmap
from ddnewton.trees import unflatten

logger = logging.getLogger(__name__)

PULLBACKS_PER_DIRECTION = 4
"""How many pullbacks of a column, without the weights' part, a direction costs: it is turned into
parameters, and pushed through two products a layer (measured on an MLP, a convolutional net and a
transformer)."""

PUSHED_AT_ONCE = 2**20
"""How many numbers a direction, or the outputs along it, may have to be pushed with others."""


def unseen_column_slopes(
    model: QuadraticModel,
    term: Term,
    unseen: Unseen,
    matrices: Sequence[GaussNewton],
    kept: Sequence[Directions],
) -> list[Float[Tensor, "i _"]]:
    """Return a_iᵀ e_k of the unseen samples' columns, for every block along its directions."""
    count = sum(directions.vectors.shape[1] for directions in kept)
    here = term.curvature_columns.of_ranks is None
    if here and 0 < PULLBACKS_PER_DIRECTION * count <= unseen.basis.shape[2]:
        try:
            return _pushed(model, term, unseen, matrices, kept)
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # noqa: BLE001 - a model need not have a forward mode
            logger.info("directions are not pushed forward: %s", reason)
    return _multiplied(model, term, unseen, matrices, kept)


def _pushed(
    model: QuadraticModel,
    term: Term,
    unseen: Unseen,
    matrices: Sequence[GaussNewton],
    kept: Sequence[Directions],
) -> list[Float[Tensor, "i _"]]:
    """Return the slopes from J_n e_k, with the directions of all blocks pushed forward."""
    linearization, leaves = term.linearization, tuple(term.linearization.leaves)
    # The directions of all blocks as parameters, one after the other: zero outside their block.
    vectors = to_parameters(model, matrices, [directions.vectors.mT for directions in kept])
    vectors = in_params_units(model, vectors)
    trees = [
        unflatten([flat], [block.leaves], list(leaves))
        for block, flat in zip(model.blocks, vectors, strict=True)
    ]
    directions = [torch.cat(parts) for parts in zip(*trees, strict=True)]

    def push(samples: Int[Tensor, " n"], *direction: Tensor) -> Tensor:
        tangent: Tensor
        _, tangent, *_ = jvp(lambda *p: linearization.function(p, samples), leaves, direction)
        return tangent

    # Push as many of them at once as fit together, through a chunk of samples at a time.
    n, c, _ = unseen.basis.shape
    cotangent = ramp(unseen.h.new_empty(n, c, 1))
    columns = linearization.jacobian(cotangent, unseen.samples)
    size = max(sum(leaf.numel() for leaf in leaves), n * c)
    at_once = max(1, PUSHED_AT_ONCE // size)
    parts = []
    for chunk in columns.chunks:
        part = vmap(partial(push, unseen.samples[chunk]), chunk_size=at_once)(*directions)
        parts.append(part.reshape((*part.shape[:2], -1)))
    tangents = torch.cat(parts, 1)
    _check_adjoint(columns, cotangent, directions, tangents)
    # a_iᵀe_k = L_nmᵀ J_n e_k.
    by_sample = projected(unseen.basis, tangents.to(unseen.h).movedim(0, 2))
    slopes = by_sample.transpose(0, 1).flatten(0, 1)
    return list(slopes.split([directions.vectors.shape[1] for directions in kept], 1))


def _check_adjoint(
    columns: Jacobian,
    cotangent: Float[Tensor, "n c 1"],
    directions: Sequence[Float[Tensor, "k ..."]],
    tangents: Float[Tensor, "k n c"],
) -> None:
    """Require of a pushforward to be the transpose of the pullback: ⟨v, J e⟩ = ⟨Jᵀv, e⟩."""
    ones = cotangent.new_ones(1, len(cotangent))
    (pulled,) = matmat([columns], [range(len(directions))], [ones])
    flat = torch.cat([leaf.reshape(len(leaf), -1) for leaf in directions], 1).to(pulled)
    forward, backward = tangents.to(pulled).flatten(1) @ cotangent.flatten(), flat @ pulled[0]
    scale = pulled.norm() + tangents.norm() * cotangent.norm()
    tolerance = torch.finfo(tangents.dtype).eps ** 0.5
    if not (unwrapped((forward - backward).abs().amax()) <= unwrapped(tolerance * scale)).all():
        raise ArithmeticError("forward mode and reverse mode differ")


def _multiplied(
    model: QuadraticModel,
    term: Term,
    unseen: Unseen,
    matrices: Sequence[GaussNewton],
    kept: Sequence[Directions],
) -> list[Float[Tensor, "i _"]]:
    """Return the slopes from inner products of the columns, pulled back, with the directions."""
    columns = term.linearization.jacobian(unseen.basis, unseen.samples)
    columns = columns._replace(scale=model.scaling.scale)
    pairs = zip(model.leaves, matrices, strict=True)
    blocks = [block for block, matrix in pairs if matrix.on_columns]
    curved = model.curvature_jacobians
    inner = iter(side_by_side([columns], curved, blocks) if blocks else [])
    return [
        next(inner) @ directions.vectors[: len(model.curvature_weights)]
        if matrix.on_columns
        else columns_of([columns], block).rmatmat(directions.vectors)
        for block, matrix, directions in zip(model.leaves, matrices, kept, strict=True)
    ]
