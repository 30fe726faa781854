"""From the arguments of a call to the Gauss-Newton matrices of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import Columns, columns_of, is_gram, matmat, small_matrices
from ddnewton.criteria import (
    AnyCriterion,
    Expansion,
    Loss,
    as_loss,
    expand_batch,
    losses,
    slopes_of,
    weight,
)
from ddnewton.inputs.checks import check_batch, check_functions, check_options, check_params
from ddnewton.inputs.groups import Block, Group, blocks_of
from ddnewton.inputs.samples import Indices, Samples, indices, rows_among
from ddnewton.linearize.linearization import Linearization, linearized
from ddnewton.transforms import any_known
from ddnewton.trees import chunks, take, tree_leaves
from ddnewton.types import DampingRule, ModelFn, PyTree, Select

FLOAT32_RESOLUTION = 1e4
"""From the largest curvature down to which ratio float32 is enough."""


class Options(NamedTuple):
    """What a call says besides the model, the batch and the criterion."""

    damping: float | Tensor | DampingRule = 0.0  # where there is none, every curvature counts
    select: Select | None = None
    complement: float | None = None
    groups: Sequence[Group] | None = None
    subsampling_grad: Indices | None = None
    subsampling_ggn: Indices | None = None
    subsampling_curvature: Indices | None = None
    gram: str = "auto"
    chunk_size: int | None = None


class Unseen(NamedTuple):
    """Samples whose curvature is asked for along directions of others."""

    samples: Int[Tensor, " n"]
    basis: Float[Tensor, "n c m"]
    h: Float[Tensor, "m n"]


class QuadraticModel(NamedTuple):
    """The loss to second order on a batch: its values and factors per sample, and the columns.

    Columns are counted as those of the curvature, i, or together with the gradient's own, a.
    ``losses_at`` has the values of some samples, None for all, at parameters next to these. Where
    the model could be known to more digits, at twice the cost, ``in_float64`` has them.
    """

    dtype: torch.dtype
    losses: Float[Tensor, " n"]
    z: Float[Tensor, "m n2"]  # of the samples that give the directions
    h: Float[Tensor, "m n2"]
    curvature_weights: Float[Tensor, " i"]  # h / N: a matrix is A diag(h / N) Aᵀ
    gradient_weights: Float[Tensor, " a"]  # z / N: the gradient is A z / N
    gradient_samples: Int[Tensor, " _"] | None  # those of the gradient, None for all
    gamma_rows: Int[Tensor, " _"] | None  # of the samples asked for among γ, None for all
    lambda_rows: Int[Tensor, " _"] | None  # and among λ, None for those of the directions
    unseen: Unseen | None
    columns: Sequence[Jacobian]
    blocks: Sequence[Block]
    model: Linearization
    losses_at: Callable[[Sequence[Tensor], Int[Tensor, " _"] | None], Float[Tensor, " _"]]
    in_float64: Callable[[], QuadraticModel] | None


class GaussNewton(NamedTuple):
    """The Gauss-Newton matrix A diag(w) Aᵀ of a block: the products of A, w, the smaller side."""

    columns: Columns
    weights: Float[Tensor, " i"]
    matrix: Float[Tensor, "side side2"]


@contextmanager
def quadratic_model(
    model_fn: ModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: AnyCriterion,
    options: Options,
    *,
    gradient: bool = True,
) -> Iterator[QuadraticModel]:
    """Check the arguments, and go down from the batch to the columns.

    Columns of the gradient's own are left out where nobody asks for the gradient.
    """
    check_functions(model_fn, options.select)
    check_options(options.damping, options.complement, options.gram, options.chunk_size)
    check_params(params)
    check_batch(X=X, y=y)
    blocks = blocks_of(options.groups, params, options.select, options.damping)
    first = tree_leaves(X)[0]
    n, device = first.shape[0], first.device
    samples = Samples(
        slopes=indices("subsampling_grad", options.subsampling_grad, n, device),
        directions=indices("subsampling_ggn", options.subsampling_ggn, n, device),
        curvatures=indices("subsampling_curvature", options.subsampling_curvature, n, device),
    )
    loss = as_loss(criterion)
    with linearized(model_fn, params, X, options.gram, options.chunk_size) as model:
        yield _expanded(model, loss, y, blocks, samples, gradient)


def gauss_newton_matrices(problem: QuadraticModel) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return the Gauss-Newton matrices of the blocks, on more digits where dampings need them."""
    systems = _systems(problem)
    if problem.in_float64 is not None and any(map(_unresolved, problem.blocks, systems)):
        problem = problem.in_float64()
        systems = _systems(problem)
    return problem, systems


def to_parameters(
    problem: QuadraticModel,
    systems: Sequence[GaussNewton],
    coordinates: Sequence[Float[Tensor, "... _"]],
) -> list[Float[Tensor, "... _"]]:
    """Turn the coordinates of every block into parameters, all in one visit."""
    vectors = list(coordinates)
    chosen = [b for b, system in enumerate(systems) if is_gram(system.matrix, system.weights)]
    if chosen:
        blocks = [problem.blocks[b].leaves for b in chosen]
        weights = [coordinates[b].reshape(-1, len(problem.gradient_weights)) for b in chosen]
        for b, found in zip(chosen, matmat(problem.columns, blocks, weights), strict=True):
            vectors[b] = found.reshape((*coordinates[b].shape[:-1], found.shape[-1]))
    return vectors


def gradients(problem: QuadraticModel) -> list[Float[Tensor, " _"]]:
    """Return every block's gradient, A z / N."""
    blocks = [block.leaves for block in problem.blocks]
    sums = matmat(problem.columns, blocks, [problem.gradient_weights[None] for _ in blocks])
    return [each[0] for each in sums]


def _expanded(
    model: Linearization,
    loss: Loss,
    y: PyTree,
    blocks: Sequence[Block],
    samples: Samples,
    gradient: bool,
) -> QuadraticModel:
    """Expand the loss around the outputs, and pull it back to the parameters."""
    every = expand_batch(loss, model.outputs, model.precise, y)
    mine = _of(every, samples.directions)
    n, count = len(every.value), len(mine.value)
    columns = [model.jacobian(mine.basis, samples.directions)]
    gradient_weights, rows, lambda_rows, unseen = mine.z.T.reshape(-1) / n, None, None, None
    if gradient:
        gradient_weights, rows, others = _gradient(every, mine, samples)
        if others is not None:
            slopes = slopes_of(every)[others, :, None]
            everyone = samples.slopes is None and len(others) == n
            columns.append(model.jacobian(slopes, None if everyone else others))
    if samples.curvatures is not None:
        lambda_rows, new = rows_among(samples.curvatures, samples.directions, n)
        if new is not None:
            held = _of(every, new)
            unseen = Unseen(new, held.basis, held.h.T)
    again = partial(_expanded, loss=loss, y=y, blocks=blocks, samples=samples, gradient=gradient)
    in_float64 = model.in_float64
    return QuadraticModel(
        dtype=torch.promote_types(model.outputs.dtype, torch.float32),
        losses=every.value,
        z=mine.z.T,
        h=mine.h.T,
        curvature_weights=mine.h.T.reshape(-1) / count,  # the mean's 1/N
        gradient_weights=gradient_weights,
        gradient_samples=samples.slopes,
        gamma_rows=rows,
        lambda_rows=lambda_rows,
        unseen=unseen,
        columns=columns,
        blocks=blocks,
        model=model,
        losses_at=partial(_losses_at, model, loss, y, columns[0].chunks[0].stop),
        in_float64=None if in_float64 is None else lambda: again(in_float64()),
    )


def _of(expansion: Expansion, samples: Int[Tensor, " _"] | None) -> Expansion:
    """Return the expansions of some samples."""
    return expansion if samples is None else Expansion(*(part[samples] for part in expansion))


def _gradient(
    every: Expansion, mine: Expansion, samples: Samples
) -> tuple[Float[Tensor, " a"], Int[Tensor, " _"] | None, Int[Tensor, " _"] | None]:
    """Return the columns' shares in the gradient, rows of samples, and which have own columns."""
    n, count = len(every.value), len(mine.value)
    chosen, device = samples.slopes, mine.value.device
    if every.R.shape[2] == 0:
        rows, others = rows_among(chosen, samples.directions, n)
    else:  # the curvature's columns say nothing of the gradient
        others = torch.arange(n, device=device) if chosen is None else chosen
        rows = torch.arange(count, count + len(others), device=device)
    z = mine.z.T
    if rows is not None:
        z = z * z.new_zeros(count).index_fill(0, rows[rows < count], 1)
    gradient_weights = z.reshape(-1)
    if others is not None:
        ones = gradient_weights.new_ones(len(others))
        gradient_weights = torch.cat([gradient_weights, ones])
    return gradient_weights / (n if chosen is None else len(chosen)), rows, others


def _losses_at(
    model: Linearization,
    loss: Loss,
    y: PyTree,
    size: int,
    leaves: Sequence[Tensor],
    samples: Int[Tensor, " n"] | None,
) -> Float[Tensor, " n"]:
    """Return the losses of some samples at other parameters, so many samples at a time."""
    n, device = model.outputs.shape[0], model.outputs.device
    everyone = torch.arange(n, device=device) if samples is None else samples
    parts = [everyone[chunk] for chunk in chunks(len(everyone), size)]
    values = [losses(loss, model.function(leaves, part), take(y, part)) for part in parts]
    found: Tensor = weight(loss, model.outputs, model.precise, y) * torch.cat(values)
    return found


def _systems(problem: QuadraticModel) -> list[GaussNewton]:
    leaves = [block.leaves for block in problem.blocks]
    matrices = small_matrices(problem.columns, leaves, problem.curvature_weights)
    return [
        GaussNewton(columns_of(problem.columns, block), problem.curvature_weights, matrix)
        for block, matrix in zip(leaves, matrices, strict=True)
    ]


def _unresolved(block: Block, system: GaussNewton) -> bool:
    """Return whether the curvatures that count are lost in the rounding of float32.

    With one δ for all directions they count down to δ, with a rule all of them; a ``select`` is
    taken to ask for large ones.
    """
    if block.select is not None:
        return False
    smallest = 0.0 if callable(block.damping) else block.damping
    diagonal = system.matrix.diagonal()
    if is_gram(system.matrix, system.weights):
        diagonal = system.weights * diagonal
    return any_known(~torch.as_tensor(smallest * FLOAT32_RESOLUTION >= diagonal.sum()))
