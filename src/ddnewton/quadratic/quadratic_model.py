"""The loss of a batch to second order: from the arguments of a call to columns and weights.

    X → outputs f → ∇ℓ_n = L z + R 1, ∇²ℓ_n = L diag(h) Lᵀ → columns A = JᵀL
    gradient A z / N,        Gauss-Newton matrix A₁ diag(h / N) A₁ᵀ

The columns of the curvature, A₁ [d, i], come first. Where the gradient is of samples that give no
directions, or L does not span it, gradients of single samples follow as columns of their own: all
of them make A [d, a].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import matmat
from ddnewton.criteria.expand import as_loss, expand_batch, on_complex
from ddnewton.criteria.loss import Expansion, Loss, name_of, slopes_of
from ddnewton.criteria.monte_carlo import AnyCriterion
from ddnewton.criteria.trained import without_params
from ddnewton.inputs.checks import check_batch, check_functions, check_options, check_params
from ddnewton.inputs.groups import Block, Group, blocks_of
from ddnewton.inputs.samples import Indices, Samples, indices, rows_among
from ddnewton.linearize.linearization import Linearization, linearized
from ddnewton.linearize.precision import resolved_in_float32
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.quadratic.gauss_newton import (
    GaussNewton,
    block_matrices,
    block_vectors,
    check_matrices_fit,
)
from ddnewton.trees import as_real, on_pairs, tree_leaves
from ddnewton.types import DampingRule, ModelFn, PyTree, Select


class Objective(NamedTuple):
    """The loss of a batch, and which samples its derivatives are of."""

    name: str  # of the criterion, for messages
    loss: Loss
    y: PyTree
    samples: Samples
    gradient: bool  # whether anybody asks for it


class SampleRows(NamedTuple):
    """In which rows of γ and λ the samples asked for stand; None for all rows in their order."""

    gammas: Int[Tensor, " _"] | None
    lambdas: Int[Tensor, " _"] | None


class Unseen(NamedTuple):
    """Samples whose curvature is asked for along directions that other samples give."""

    samples: Int[Tensor, " n"]
    basis: Float[Tensor, "n c m"]  # L
    h: Float[Tensor, "m n"]


class QuadraticModel(NamedTuple):
    """The loss of a batch to second order: values per sample, columns A, and their weights."""

    objective: Objective
    linearization: Linearization
    blocks: Sequence[Block]
    losses: Float[Tensor, " n"]
    z: Float[Tensor, "m n2"]  # of the samples that give the directions
    h: Float[Tensor, "m n2"]
    curvature_weights: Float[Tensor, " i"]  # h / N
    gradient_weights: Float[Tensor, " a"]  # z / N
    jacobians: Sequence[Jacobian]  # the columns: those of the curvature, the gradient's own
    rows: SampleRows
    unseen: Unseen | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: that of the outputs, or float32 if that is narrower."""
        return torch.promote_types(self.linearization.outputs.dtype, torch.float32)

    @property
    def leaves(self) -> list[Sequence[int]]:
        """The numbers of the parameters in every block."""
        return [block.leaves for block in self.blocks]


@contextmanager
def quadratic_model(
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: AnyCriterion,
    *,
    damping: float | Tensor | DampingRule = 0.0,  # without one, every curvature counts
    select: Select | None = None,
    complement: float | None = None,
    groups: Sequence[Group] | None = None,
    subsampling_grad: Indices | None = None,
    subsampling_ggn: Indices | None = None,
    subsampling_curvature: Indices | None = None,
    gram: str = "auto",
    chunk_size: int | None = None,
    gradient: bool = True,
) -> Iterator[QuadraticModel]:
    """Check the arguments of a call, and expand the loss of its batch to second order.

    Columns of the gradient gradient_samples are left out where nobody asks for the ``gradient``.
    """
    # Refuse what breaks a rule before any work.
    check_functions(model_fn, select)
    check_options(damping, complement, gram, chunk_size)
    check_params(params)
    check_batch(X=X, y=y)
    blocks = blocks_of(groups, params, select, damping)
    first = tree_leaves(X)[0]
    n, device = first.shape[0], first.device
    samples = Samples(
        slopes=indices("subsampling_grad", subsampling_grad, n, device),
        directions=indices("subsampling_ggn", subsampling_ggn, n, device),
        curvatures=indices("subsampling_curvature", subsampling_curvature, n, device),
    )
    loss = without_params(as_loss(criterion), params)
    objective = Objective(name_of(criterion), loss, y, samples, gradient)
    # Run the model, and keep it as it is for as long as its columns are asked for.
    if not isinstance(model_fn, Prepared):
        model_fn = on_pairs(model_fn, params)
    with linearized(model_fn, as_real(params), X, gram, chunk_size) as linearization:
        if linearization.complex_outputs:
            loss = without_params(as_loss(on_complex(criterion)), params)
            objective = objective._replace(loss=loss)
        yield _expanded(linearization, objective, blocks)


def gauss_newton_matrices(
    model: QuadraticModel, least_damping: float | Tensor = 0.0
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return the matrices of the blocks, in float64 where dampings ask for more than float32 has.

    All directions are damped by ``least_damping`` more than the blocks say.
    """
    matrices = block_matrices(model.jacobians, model.leaves, model.curvature_weights)
    if model.linearization.in_float64 is None:
        return model, matrices
    pairs = zip(model.blocks, matrices, strict=True)
    if not all(_resolved(block, matrix, least_damping) for block, matrix in pairs):
        linearization = model.linearization.in_float64()
        model = _expanded(linearization, model.objective, model.blocks)
        matrices = block_matrices(model.jacobians, model.leaves, model.curvature_weights)
    return model, matrices


def to_parameters(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    coordinates: Sequence[Float[Tensor, "... _"]],
) -> list[Float[Tensor, "... _"]]:
    """Return the vectors of parameters that the blocks' coordinates stand for."""
    return block_vectors(model.jacobians, model.leaves, matrices, coordinates)


def gradients(model: QuadraticModel) -> list[Float[Tensor, " _"]]:
    """Return every block's gradient, A z / N."""
    weights = [model.gradient_weights[None] for _ in model.blocks]
    return [gradient[0] for gradient in matmat(model.jacobians, model.leaves, weights)]


def _expanded(
    linearization: Linearization, objective: Objective, blocks: Sequence[Block]
) -> QuadraticModel:
    """Expand the loss around the outputs, and pull its columns back to the parameters."""
    _, loss, y, samples, gradient = objective
    expansion = expand_batch(loss, linearization.outputs, linearization.precise, y)
    n = len(expansion.value)
    # The columns of the curvature: those of L, of the samples that give the directions.
    of_directions = _of_samples(expansion, samples.directions)
    leaves = [block.leaves for block in blocks]
    check_matrices_fit(linearization.leaves, leaves, of_directions.h)
    jacobians = [linearization.jacobian(of_directions.basis, samples.directions)]
    # The gradient is made of the same columns, and of gradients that these do not span.
    gradient_weights, gamma_rows = of_directions.z.T.reshape(-1) / n, None
    if gradient:
        parts = _gradient_columns(expansion, of_directions, samples)
        gradient_weights, gamma_rows, gradient_samples = parts
        if gradient_samples is not None:
            slopes = slopes_of(expansion)[gradient_samples, :, None]
            if samples.slopes is None and len(gradient_samples) == n:
                gradient_samples = None
            jacobians.append(linearization.jacobian(slopes, gradient_samples))
    # Curvatures may be asked for of samples that give no directions.
    lambda_rows, unseen = None, None
    if samples.curvatures is not None:
        lambda_rows, new = rows_among(samples.curvatures, samples.directions, n)
        if new is not None:
            of_new = _of_samples(expansion, new)
            unseen = Unseen(new, of_new.basis, of_new.h.T)
    return QuadraticModel(
        objective=objective,
        linearization=linearization,
        blocks=blocks,
        losses=expansion.value,
        z=of_directions.z.T,
        h=of_directions.h.T,
        curvature_weights=of_directions.h.T.reshape(-1) / len(of_directions.value),  # the 1/N
        gradient_weights=gradient_weights,
        jacobians=jacobians,
        rows=SampleRows(gamma_rows, lambda_rows),
        unseen=unseen,
    )


def _of_samples(expansion: Expansion, samples: Int[Tensor, " _"] | None) -> Expansion:
    """Return the expansions of some samples, None for all."""
    return expansion if samples is None else Expansion(*(part[samples] for part in expansion))


def _gradient_columns(
    expansion: Expansion, of_directions: Expansion, samples: Samples
) -> tuple[Float[Tensor, " a"], Int[Tensor, " _"] | None, Int[Tensor, " _"] | None]:
    """Return the gradient's weights, its samples' rows, and samples with columns of their own."""
    n, count = len(expansion.value), len(of_directions.value)
    wanted, device = samples.slopes, of_directions.value.device
    if expansion.R.shape[2] == 0:
        rows, gradient_samples = rows_among(wanted, samples.directions, n)
    else:  # the columns of the curvature do not span the gradient
        gradient_samples = torch.arange(n, device=device) if wanted is None else wanted
        rows = torch.arange(count, count + len(gradient_samples), device=device)
    # z of the samples that give directions and belong to the gradient; 1 for a column of its own.
    z = of_directions.z.T
    if rows is not None:
        z = z * z.new_zeros(count).index_fill(0, rows[rows < count], 1)
    weights = z.reshape(-1)
    if gradient_samples is not None:
        weights = torch.cat([weights, weights.new_ones(len(gradient_samples))])
    return weights / (n if wanted is None else len(wanted)), rows, gradient_samples


def _resolved(block: Block, matrix: GaussNewton, least_damping: float | Tensor) -> bool:
    """Return whether float32 resolves the curvatures that count.

    With one δ for all directions they count down to δ, with a rule all of them; a ``select`` is
    taken to ask for large ones.
    """
    if block.select is not None:
        return True
    smallest = 0.0 if callable(block.damping) else block.damping + least_damping
    return resolved_in_float32(smallest, matrix.trace())
