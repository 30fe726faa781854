"""Columns of samples that the directions have not seen: their slopes along them.

For few directions these are pushed forward, K products J_n e_k for all columns of a sample; for
many, the columns are pulled back, and multiplied with those that the directions are made of.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import jvp, vmap

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import columns_of, is_gram, matmat, products
from ddnewton.linearize.precision import ramp
from ddnewton.quadratic.kept import Directions
from ddnewton.quadratic.quadratic_model import GaussNewton, QuadraticModel, Unseen, to_parameters
from ddnewton.transforms import unwrapped
from ddnewton.trees import unflatten

logger = logging.getLogger(__name__)

PULLBACKS_PER_DIRECTION = 4
"""How many pullbacks of a column, without the weights' part, a direction costs: it is lifted, and
pushed through two products a layer (measured on an MLP, a convolutional net and a transformer)."""

PUSHED_AT_ONCE = 2**20
"""How many numbers a direction, or the outputs along it, may have to be pushed with others."""


def unseen_slopes(
    problem: QuadraticModel,
    unseen: Unseen,
    systems: Sequence[GaussNewton],
    kept: Sequence[Directions],
) -> list[Float[Tensor, "i _"]]:
    """Return a_iᵀ e_k of the unseen samples' columns, for every block along its directions."""
    count = sum(each.vectors.shape[1] for each in kept)
    if 0 < PULLBACKS_PER_DIRECTION * count <= unseen.basis.shape[2]:
        try:
            return _pushed(problem, unseen, systems, kept)
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # noqa: BLE001 - a model need not have a forward mode
            logger.info("directions are not pushed forward: %s", reason)
    return _multiplied(problem, unseen, systems, kept)


def _pushed(
    problem: QuadraticModel,
    unseen: Unseen,
    systems: Sequence[GaussNewton],
    kept: Sequence[Directions],
) -> list[Float[Tensor, "i _"]]:
    """Push the directions of all blocks forward, some at once."""
    model, leaves = problem.model, tuple(problem.model.leaves)
    vectors = to_parameters(problem, systems, [each.vectors.mT for each in kept])
    trees = [
        unflatten([flat], [block.leaves], list(leaves))
        for block, flat in zip(problem.blocks, vectors, strict=True)
    ]
    directions = [torch.cat(parts) for parts in zip(*trees, strict=True)]

    cotangent = ramp(unseen.basis[:, :, :1])
    columns = model.jacobian(cotangent, unseen.samples)

    def push(samples: Int[Tensor, " n"], *direction: Tensor) -> Tensor:
        _, moved, *_ = jvp(lambda *p: model.function(p, samples), leaves, direction)
        return torch.as_tensor(moved)

    size = max(sum(leaf.numel() for leaf in leaves), unseen.basis[:, :, 0].numel())
    few = max(1, PUSHED_AT_ONCE // size)
    parts = []
    for chunk in columns.chunks:
        part = vmap(partial(push, unseen.samples[chunk]), chunk_size=few)(*directions)
        parts.append(part.reshape((*part.shape[:2], -1)))
    moved = torch.cat(parts, 1)
    _check_adjoint(columns, cotangent, directions, moved)
    slopes = torch.einsum("ncm,knc->mnk", unseen.basis, moved.to(unseen.basis)).flatten(0, 1)
    return list(slopes.split([each.vectors.shape[1] for each in kept], 1))


def _check_adjoint(
    columns: Jacobian,
    cotangent: Float[Tensor, "n c 1"],
    directions: Sequence[Float[Tensor, "k ..."]],
    moved: Float[Tensor, "k n c"],
) -> None:
    """Require of a pushforward to be the transpose of the pullback: ⟨v, J e⟩ = ⟨Jᵀv, e⟩."""
    ones = cotangent.new_ones(1, len(cotangent))
    (pulled,) = matmat([columns], [range(len(directions))], [ones])
    flat = torch.cat([leaf.reshape(len(leaf), -1) for leaf in directions], 1).to(pulled)
    forward, backward = moved.to(pulled).flatten(1) @ cotangent.flatten(), flat @ pulled[0]
    scale = pulled.norm() + moved.norm() * cotangent.norm()
    tolerance = torch.finfo(moved.dtype).eps ** 0.5
    if not (unwrapped((forward - backward).abs().amax()) <= unwrapped(tolerance * scale)).all():
        raise ArithmeticError("forward mode and reverse mode differ")


def _multiplied(
    problem: QuadraticModel,
    unseen: Unseen,
    systems: Sequence[GaussNewton],
    kept: Sequence[Directions],
) -> list[Float[Tensor, "i _"]]:
    """Pull the columns back, and multiply them with the directions' own."""
    columns = problem.model.jacobian(unseen.basis, unseen.samples)
    by_columns = [is_gram(system.matrix, system.weights) for system in systems]
    leaves = [block.leaves for block in problem.blocks]
    chosen = [block for block, yes in zip(leaves, by_columns, strict=True) if yes]
    inner = iter(products(columns, problem.columns[0], chosen) if chosen else [])
    return [
        next(inner) @ each.vectors[: len(problem.curvature_weights)]
        if yes
        else columns_of([columns], block).rmatmat(each.vectors)
        for block, yes, each in zip(leaves, by_columns, kept, strict=True)
    ]
