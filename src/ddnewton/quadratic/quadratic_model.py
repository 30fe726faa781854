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
from ddnewton.columns.gram import scale_along
from ddnewton.inputs.groups import Block
from ddnewton.inputs.term_names import about_term
from ddnewton.linearize.linearization import linearized
from ddnewton.linearize.model import Linearization
from ddnewton.quadratic.arguments import Arguments, Scaling, function_of, of_complex_outputs
from ddnewton.quadratic.gauss_newton import (
    GaussNewton,
    block_vectors,
    check_matrices_fit,
)
from ddnewton.quadratic.ranks.gathered import gathered, gathered_targets
from ddnewton.quadratic.term import (
    Objective,
    Term,
    TermLosses,
    expansion_of,
    loss_of,
    losses_of,
    names_of,
    of_samples,
    term_of,
)
from ddnewton.trees import as_real, tree_leaves


class QuadraticModel(NamedTuple):
    """The loss of a batch to second order: its terms, the columns A of all, and their weights.

    The columns of the terms stand side by side: those of the curvature of all terms first. They are
    those of the scaled parameters, S A.
    """

    terms: Sequence[Term]
    blocks: Sequence[Block]
    curvature_weights: Float[Tensor, " i"]  # h / N
    gradient_weights: Float[Tensor, " a"]  # z / N
    jacobians: Sequence[Jacobian]  # the columns: those of the curvature, the gradient's own
    scaling: Scaling

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
        return loss_of(self.terms)

    @property
    def losses(self) -> TermLosses:
        """The losses of its terms by name, or the loss where it is one term."""
        return losses_of(self.terms)

    @property
    def has_curvature_samples(self) -> bool:
        """Whether curvatures are asked for of samples other than those of the directions."""
        return any(term.rows.lambdas is not None for term in self.terms)

    @property
    def names(self) -> str:
        """The criteria, for messages."""
        return names_of(self.terms)


@contextmanager
def quadratic_model(arguments: Arguments) -> Iterator[QuadraticModel]:
    """Expand the loss of a batch to second order, by the columns of its curvature."""
    objectives = list(arguments.objectives)
    # Run the models, and keep them as they are for as long as their columns are asked for.
    with ExitStack() as stack:
        linearizations = []
        for number, term in enumerate(arguments.terms):
            with about_term(term.name):
                linearization = stack.enter_context(_linearized(arguments, number))
                linearizations.append(linearization)
                if arguments.leader is not None:
                    y = gathered_targets(arguments.leader, number, term)
                    objectives[number] = objectives[number]._replace(y=y)
                if linearization.complex_outputs:
                    objectives[number] = of_complex_outputs(
                        objectives[number], term, arguments.params
                    )
        yield expanded(linearizations, objectives, arguments.blocks, arguments.scaling)


@contextmanager
def _linearized(arguments: Arguments, number: int) -> Iterator[Linearization]:
    """Linearize the model of a term, where its samples are."""
    term, params = arguments.terms[number], as_real(arguments.params)
    if arguments.leader is not None:
        yield gathered(arguments.leader, number, term, tree_leaves(params))
        return
    function = function_of(term, arguments.params)
    parts = function, params, term.X, term.gram, arguments.chunk_size
    with linearized(*parts, precision=arguments.precision) as linearization:
        yield linearization


def to_parameters(
    model: QuadraticModel,
    matrices: Sequence[GaussNewton],
    coordinates: Sequence[Float[Tensor, "... _"]],
) -> list[Float[Tensor, "... _"]]:
    """Return the vectors of parameters that the blocks' coordinates stand for."""
    return block_vectors(model.jacobians, model.leaves, matrices, coordinates)


def in_params_units(
    model: QuadraticModel, vectors: Sequence[Float[Tensor, "... _"]]
) -> list[Float[Tensor, "... _"]]:
    """Return the blocks' vectors of scaled parameters as those of the parameters, S v."""
    scales = [scale_along(model.jacobians[0], block) for block in model.leaves]
    pairs = zip(vectors, scales, strict=True)
    return [vector if scale is None else scale * vector for vector, scale in pairs]


def gradients(model: QuadraticModel, matrices: Sequence[GaussNewton]) -> list[Float[Tensor, " _"]]:
    """Return every block's gradient, A z / N."""
    return to_parameters(model, matrices, [matrix.gradient for matrix in matrices])


def expanded(
    linearizations: Sequence[Linearization],
    objectives: Sequence[Objective],
    blocks: Sequence[Block],
    scaling: Scaling,
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
    if not torch.compiler.is_compiling():  # which knows nothing of the system
        check_matrices_fit(linearizations[0].leaves, blocks, curvatures)
    # The columns, those of the curvature of all terms before the gradient's own.
    terms = []
    for parts in zip(linearizations, objectives, expansions, strict=True):
        with about_term(parts[1].term):
            terms.append(term_of(*parts))
    return model_of(terms, blocks, scaling)


def model_of(terms: Sequence[Term], blocks: Sequence[Block], scaling: Scaling) -> QuadraticModel:
    """Return the sum of some terms, with their columns side by side."""
    further = [term.gradient_columns for term in terms if term.gradient_columns is not None]
    jacobians = [*(term.curvature_columns for term in terms), *further]
    weights = [term.gradient_weights.reshape(-1) for term in terms]
    return QuadraticModel(
        terms=terms,
        blocks=blocks,
        curvature_weights=torch.cat([term.curvature_weights.reshape(-1) for term in terms]),
        gradient_weights=torch.cat([*weights, *(term.further_weights for term in terms)]),
        jacobians=[jacobian._replace(scale=scaling.scale) for jacobian in jacobians],
        scaling=scaling,
    )
