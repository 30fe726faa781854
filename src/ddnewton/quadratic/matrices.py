"""The matrices of a quadratic model: in which units, and on how many digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.gram import columns_of
from ddnewton.columns.tiles import side_by_side
from ddnewton.inputs.checks import check_derivatives
from ddnewton.inputs.groups import Block
from ddnewton.linearize.precision import resolved_in_float32
from ddnewton.quadratic.arguments import Arguments, Scaling
from ddnewton.quadratic.column_sizes import column_sizes, scale_by_sizes, scaled_matrices
from ddnewton.quadratic.flat import check_outputs_depend
from ddnewton.quadratic.gauss_newton import GaussNewton, block_matrices
from ddnewton.quadratic.quadratic_model import QuadraticModel, expanded, quadratic_model
from ddnewton.trees import along_block

LeastDamping: TypeAlias = float | Tensor | Callable[[Sequence[GaussNewton]], Tensor]
"""By what all directions are damped besides what their blocks say: a number, or of the matrices."""


def gauss_newton_matrices(
    model: QuadraticModel,
    least_damping: LeastDamping = 0.0,
    sizes: Float[Tensor, " d"] | None = None,
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return the matrices of the blocks, in float64 where dampings ask for more than float32 has.

    All directions are damped by ``least_damping`` more than the blocks say. ``sizes`` are the
    largest of the columns so far, for a scale by them.
    """
    # As the model is, and once more in float64 where that does not resolve what counts.
    scaled, matrices = scaled_by_columns(model, matrices_of(model), sizes)
    if is_resolved(model, matrices, least_damping):
        return scaled, matrices
    model = in_float64(model)
    return scaled_by_columns(model, matrices_of(model), sizes)


def is_resolved(
    model: QuadraticModel, matrices: Sequence[GaussNewton], least_damping: LeastDamping = 0.0
) -> bool:
    """Return whether the precision that a model is in is enough, or the highest that it has."""
    if all(term.linearization.in_float64 is None for term in model.terms):
        return True
    least = least_damping(matrices) if callable(least_damping) else least_damping
    pairs = zip(model.blocks, matrices, strict=True)
    return all(_resolved(block, matrix, least) for block, matrix in pairs)


def in_float64(model: QuadraticModel) -> QuadraticModel:
    """Return the same model expanded in float64, where it is not so already and can be."""
    if all(term.linearization.in_float64 is None for term in model.terms):
        return model
    parts = [term.linearization for term in model.terms]
    linearizations = [part if part.in_float64 is None else part.in_float64() for part in parts]
    objectives = [term.objective for term in model.terms]
    return expanded(linearizations, objectives, model.blocks, model.scaling)


def scaled_by_columns(
    model: QuadraticModel, matrices: list[GaussNewton], sizes: Float[Tensor, " d"] | None
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return model and matrices in units of the sizes of the columns, where these are asked for."""
    if not model.scaling.by_columns:
        return model, matrices
    current = column_sizes(matrices, model.leaves, model.sizes)
    largest = current if sizes is None else torch.maximum(current, sizes.to(current))
    scale = scale_by_sizes(largest, matrices, model.leaves, model.sizes)
    model = model._replace(
        jacobians=[jacobian._replace(scale=scale) for jacobian in model.jacobians],
        scaling=Scaling(by_columns=True, scale=scale, sizes=largest),
    )
    return model, scaled_matrices(matrices, model.leaves, model.jacobians)


def rescaled(
    model: QuadraticModel, matrices: Sequence[GaussNewton], factor: Float[Tensor, " d"]
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return model and matrices in units that are multiplied by a factor, one a parameter."""
    before = model.jacobians[0].scale
    scale = factor if before is None else factor * before
    jacobians = [jacobian._replace(scale=scale) for jacobian in model.jacobians]
    # A contraction of columns on their side, in one visit; O(d²) on that of the parameters.
    leaves = [
        block for block, matrix in zip(model.leaves, matrices, strict=True) if matrix.on_columns
    ]
    weights = model.curvature_weights, model.gradient_weights
    contracted = iter(block_matrices(jacobians, len(model.terms), leaves, *weights))
    scaled = [
        next(contracted)
        if matrix.on_columns
        else matrix.scaled(columns_of(jacobians, block), along_block(factor, block, model.sizes))
        for matrix, block in zip(matrices, model.leaves, strict=True)
    ]
    return model._replace(jacobians=jacobians), scaled


def matrices_of(model: QuadraticModel) -> list[GaussNewton]:
    """Return the matrices of the blocks, in the precision that the model is in."""
    weights = model.curvature_weights, model.gradient_weights
    return block_matrices(model.jacobians, len(model.terms), model.leaves, *weights)


def whole_gram_matrices(arguments: Arguments) -> list[Float[Tensor, "i i"]]:
    """Return K of every block, on the side of the columns however long that is."""
    with quadratic_model(arguments) as model:
        root, curved = model.curvature_weights.sqrt(), model.curvature_jacobians
        inner = side_by_side(curved, curved, model.leaves)
        for matrix in inner:
            check_derivatives(matrix)
        matrices = [root[:, None] * matrix * root for matrix in inner]
        check_outputs_depend(model, matrices)
        return [matrix.to(model.dtype) for matrix in matrices]


def _resolved(block: Block, matrix: GaussNewton, least_damping: float | Tensor) -> bool:
    """Return whether float32 resolves the curvatures that count.

    With one δ for all directions they count down to δ, with a rule all of them; a ``select`` is
    taken to ask for large ones.
    """
    if block.select is not None:
        return True
    smallest = 0.0 if callable(block.damping) else block.damping + least_damping
    return resolved_in_float32(smallest, matrix.trace())
