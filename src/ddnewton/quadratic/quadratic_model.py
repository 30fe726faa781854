"""The loss of a batch to second order: from the arguments of a call to columns and weights.

    gradient A z / N,        Gauss-Newton matrix A₁ diag(h / N) A₁ᵀ

A loss of several terms is their sum, and their columns stand side by side. Those of the curvature
of all terms, A₁ [d, i], come first; the gradient's own of all terms follow. All of them make
A [d, a], with weights that hold every term's 1 / N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.gram import side_by_side
from ddnewton.criteria.expand import as_loss, on_complex
from ddnewton.criteria.loss import name_of
from ddnewton.criteria.monte_carlo import Criteria
from ddnewton.criteria.trained import without_params
from ddnewton.inputs.checks import check_derivatives, check_functions, check_options, check_params
from ddnewton.inputs.groups import Block, Group, blocks_of
from ddnewton.inputs.terms import TermArguments, TermIndices, about_term, terms_of
from ddnewton.linearize.linearization import Linearization, linearized
from ddnewton.linearize.precision import resolved_in_float32
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.quadratic.gauss_newton import (
    GaussNewton,
    block_matrices,
    block_vectors,
    check_matrices_fit,
)
from ddnewton.quadratic.term import Objective, Term, TermLosses, expansion_of, of_samples, term_of
from ddnewton.trees import as_real, on_pairs
from ddnewton.types import AnyModelFn, DampingRule, GramWays, PyTree, Select


class QuadraticModel(NamedTuple):
    """The loss of a batch to second order: its terms, the columns A of all, and their weights.

    The columns of the terms stand side by side: those of the curvature of all terms first.
    """

    terms: Sequence[Term]
    blocks: Sequence[Block]
    curvature_weights: Float[Tensor, " i"]  # h / N
    gradient_weights: Float[Tensor, " a"]  # z / N
    jacobians: Sequence[Jacobian]  # the columns: those of the curvature, the gradient's own

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: that of the outputs, or float32 if that is narrower."""
        dtypes = (term.linearization.outputs.dtype for term in self.terms)
        return reduce(torch.promote_types, dtypes, torch.float32)

    @property
    def leaves(self) -> list[Sequence[int]]:
        """The numbers of the parameters in every block."""
        return [block.leaves for block in self.blocks]

    @property
    def sizes(self) -> Sequence[int]:
        """The number of entries of every parameter."""
        return self.jacobians[0].sizes

    @property
    def curvature_jacobians(self) -> Sequence[Jacobian]:
        """The columns of the curvature."""
        return self.jacobians[: len(self.terms)]

    @property
    def z(self) -> Float[Tensor, " i"]:
        """The slopes z of the columns of the curvature."""
        return torch.cat([term.z.reshape(-1) for term in self.terms])

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The loss of the batch."""
        return torch.as_tensor(sum(term.losses.mean() for term in self.terms))

    @property
    def losses(self) -> TermLosses:
        """The losses of its terms by name, or the loss where it is one term."""
        losses = {term.objective.term: term.losses.mean() for term in self.terms}
        return losses.get(None, losses)

    @property
    def has_curvature_samples(self) -> bool:
        """Whether curvatures are asked for of samples other than those of the directions."""
        return any(term.rows.lambdas is not None for term in self.terms)

    @property
    def names(self) -> str:
        """The criteria, for messages."""
        return ", ".join(dict.fromkeys(term.objective.criterion_name for term in self.terms))


@contextmanager
def quadratic_model(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    *,
    damping: float | Tensor | DampingRule = 0.0,  # without one, every curvature counts
    select: Select | None = None,
    complement: float | None = None,
    groups: Sequence[Group] | None = None,
    subsampling_grad: TermIndices | None = None,
    subsampling_ggn: TermIndices | None = None,
    subsampling_curvature: TermIndices | None = None,
    gram: GramWays = "auto",
    chunk_size: int | None = None,
    gradient: bool = True,
) -> Iterator[QuadraticModel]:
    """Check the arguments of a call, and expand the loss of its batch to second order.

    Columns of the gradient alone are left out where nobody asks for the ``gradient``.
    """
    # Refuse what breaks a rule before any work.
    check_functions(model_fn, select)
    check_options(damping, complement, gram, chunk_size)
    check_params(params)
    subsampling = {
        "subsampling_grad": subsampling_grad,
        "subsampling_ggn": subsampling_ggn,
        "subsampling_curvature": subsampling_curvature,
    }
    terms = terms_of(model_fn, X, y, criterion, gram, subsampling)
    blocks = blocks_of(groups, params, select, damping)
    objectives = [_objective(term, params, gradient) for term in terms]
    # Run the models, and keep them as they are for as long as their columns are asked for.
    with ExitStack() as stack:
        linearizations = []
        for number, term in enumerate(terms):
            with about_term(term.name):
                function = term.model_fn
                if not isinstance(function, Prepared):
                    function = on_pairs(function, params)
                linearization = stack.enter_context(
                    linearized(function, as_real(params), term.X, term.gram, chunk_size)
                )
                linearizations.append(linearization)
                if linearization.complex_outputs:
                    loss = without_params(as_loss(on_complex(term.criterion)), params)
                    objectives[number] = objectives[number]._replace(loss=loss)
        yield _expanded(linearizations, objectives, blocks)


def _objective(term: TermArguments, params: PyTree, gradient: bool) -> Objective:
    """Return the loss of a term, which reads no parameters."""
    with about_term(term.name):
        loss = without_params(as_loss(term.criterion), params)
    name = name_of(term.criterion)
    return Objective(term.name, name, loss, term.y, term.samples, gradient)


def gauss_newton_matrices(
    model: QuadraticModel, least_damping: float | Tensor = 0.0
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return the matrices of the blocks, in float64 where dampings ask for more than float32 has.

    All directions are damped by ``least_damping`` more than the blocks say.
    """
    matrices = matrices_of(model)
    linearizations = [term.linearization for term in model.terms]
    if all(linearization.in_float64 is None for linearization in linearizations):
        return model, matrices
    pairs = zip(model.blocks, matrices, strict=True)
    if not all(_resolved(block, matrix, least_damping) for block, matrix in pairs):
        precise = [
            linearization if linearization.in_float64 is None else linearization.in_float64()
            for linearization in linearizations
        ]
        model = _expanded(precise, [term.objective for term in model.terms], model.blocks)
        matrices = matrices_of(model)
    return model, matrices


def matrices_of(model: QuadraticModel) -> list[GaussNewton]:
    """Return the matrices of the blocks, in the precision that the model is in."""
    weights = model.curvature_weights, model.gradient_weights
    return block_matrices(model.jacobians, len(model.terms), model.leaves, *weights)


def gram_matrices(model: QuadraticModel) -> list[Float[Tensor, "i i"]]:
    """Return K of every block, on the side of the columns however long that is."""
    root, curved = model.curvature_weights.sqrt(), model.curvature_jacobians
    inner = side_by_side(curved, curved, model.leaves)
    for matrix in inner:
        check_derivatives(matrix)
    return [root[:, None] * matrix * root for matrix in inner]


def to_parameters(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    coordinates: Sequence[Float[Tensor, "... _"]],
) -> list[Float[Tensor, "... _"]]:
    """Return the vectors of parameters that the blocks' coordinates stand for."""
    return block_vectors(model.jacobians, model.leaves, matrices, coordinates)


def gradients(model: QuadraticModel, matrices: Sequence[GaussNewton]) -> list[Float[Tensor, " _"]]:
    """Return every block's gradient, A z / N."""
    return to_parameters(model, matrices, [matrix.gradient for matrix in matrices])


def _expanded(
    linearizations: Sequence[Linearization],
    objectives: Sequence[Objective],
    blocks: Sequence[Block],
) -> QuadraticModel:
    """Expand the loss around the outputs, and pull its columns back to the parameters."""
    # The losses along the outputs, and whether the matrices that follow fit into memory.
    expansions = []
    for linearization, objective in zip(linearizations, objectives, strict=True):
        with about_term(objective.term):
            expansions.append(expansion_of(linearization, objective))
    curvatures = [
        of_samples(expansion, objective.samples.directions).h
        for expansion, objective in zip(expansions, objectives, strict=True)
    ]
    check_matrices_fit(linearizations[0].leaves, [block.leaves for block in blocks], curvatures)
    # The columns, those of the curvature of all terms before the gradient's own.
    terms = []
    for parts in zip(linearizations, objectives, expansions, strict=True):
        with about_term(parts[1].term):
            terms.append(term_of(*parts))
    further = [term.gradient_columns for term in terms if term.gradient_columns is not None]
    weights = [term.gradient_weights.reshape(-1) for term in terms]
    return QuadraticModel(
        terms=terms,
        blocks=blocks,
        curvature_weights=torch.cat([term.curvature_weights.reshape(-1) for term in terms]),
        gradient_weights=torch.cat([*weights, *(term.further_weights for term in terms)]),
        jacobians=[*(term.curvature_columns for term in terms), *further],
    )


def _resolved(block: Block, matrix: GaussNewton, least_damping: float | Tensor) -> bool:
    """Return whether float32 resolves the curvatures that count.

    With one δ for all directions they count down to δ, with a rule all of them; a ``select`` is
    taken to ask for large ones.
    """
    if block.select is not None:
        return True
    smallest = 0.0 if callable(block.damping) else block.damping + least_damping
    return resolved_in_float32(smallest, matrix.trace())
