"""The loss of a batch to second order by products: its terms, and their visits.

Of every term are known the gradients r_n = ∇ℓ_n along the outputs, products with the roots S_n of
∇²ℓ_n = S_n S_nᵀ, and, a chunk of samples at a time, products with the Jacobians J_n. That gives

    g = 1/N Σ_n J_nᵀ r_n,        G v = 1/N Σ_n J_nᵀ S_n S_nᵀ J_n v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.dtensors import mixing
from ddnewton.inputs.checks import check_dependence
from ddnewton.inputs.groups import Block
from ddnewton.inputs.term_names import about_term
from ddnewton.linearize.adjoint import check_adjoint
from ddnewton.linearize.free_linearization import linearized_freely
from ddnewton.linearize.use_of_parameters import depends_on_parameters
from ddnewton.quadratic.arguments import Arguments, Scaling, function_of, of_complex_outputs
from ddnewton.quadratic.flat import LEAST_SLOPE, without_curvature
from ddnewton.quadratic.matrix_free.free_term import FreeTerm, free_term
from ddnewton.quadratic.matrix_free.operator import Operator
from ddnewton.quadratic.matrix_free.rank_operator import rank_operator
from ddnewton.quadratic.matrix_free.rank_terms import rank_term
from ddnewton.quadratic.matrix_free.sample_operator import sample_operator
from ddnewton.quadratic.matrix_free.streamed_terms import streamed_terms
from ddnewton.quadratic.term import TermLosses, loss_of, losses_of, names_of
from ddnewton.trees import along_block, as_real


class FreeModel(NamedTuple):
    """The loss of a batch to second order by products."""

    terms: Sequence[FreeTerm]
    blocks: Sequence[Block]
    arguments: Arguments

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: that of the outputs, or float32 if that is narrower."""
        dtypes = (term.linearization.outputs.dtype for term in self.terms)
        return reduce(torch.promote_types, dtypes, torch.float32)

    @property
    def losses(self) -> TermLosses:
        """The losses of its terms by name, or the loss where it is one term."""
        return losses_of(self.terms)

    @property
    def leaves(self) -> list[Sequence[int]]:
        """The numbers of the parameters in every block."""
        return [block.leaves for block in self.blocks]

    @property
    def sizes(self) -> Sequence[int]:
        """The number of entries of every parameter."""
        return [leaf.numel() for leaf in self.terms[0].linearization.leaves]

    @property
    def scaling(self) -> Scaling:
        """The units of the parameters."""
        return self.arguments.scaling

    @property
    def has_curvature_samples(self) -> bool:
        """Whether curvatures are asked for of samples other than those of the directions."""
        return any(term.objective.samples.curvatures is not None for term in self.terms)

    @property
    def names(self) -> str:
        """The criteria, for messages."""
        return names_of(self.terms)

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The loss of the batch."""
        return loss_of(self.terms)

    @property
    def spans(self) -> bool:
        """Whether the gradient is known to lie in the range of G."""
        return all(term.spans for term in self.terms)

    @property
    def square(self) -> float:
        """A number that gᵀG⁺g does not exceed, for a gradient in the range of G, else infinity."""
        return sum(term.square for term in self.terms)

    @property
    def rounding(self) -> float:
        """The rounding of a product with a Jacobian."""
        return max(term.linearization.eps for term in self.terms)

    def in_float64(self) -> FreeModel | None:
        """Return the same model in float64, None where it is so already or cannot be."""
        if all(term.linearization.in_float64 is None for term in self.terms):
            return None
        return self._replace(terms=[term.in_float64() for term in self.terms])


@contextmanager
def free_model(arguments: Arguments) -> Iterator[FreeModel]:
    """Expand the loss of a batch to second order, by products."""
    params, terms = arguments.params, []
    with ExitStack() as stack:
        if arguments.has_dtensors:
            stack.enter_context(mixing())
        # Batches are terms of their own.
        if arguments.in_batches:
            yield FreeModel(streamed_terms(arguments, stack), arguments.blocks, arguments)
            return
        # Run the models, and keep them as they are for as long as products are asked for.
        for number, term in enumerate(arguments.terms):
            with about_term(term.name):
                if arguments.leader is not None:
                    terms.append(rank_term(arguments.leader, arguments, number))
                    continue
                function, objective = function_of(term, params), arguments.objectives[number]
                parts = function, as_real(params), term.X, arguments.chunk_size
                linearization = stack.enter_context(
                    linearized_freely(*parts, precision=arguments.precision)
                )
                if arguments.has_dtensors:
                    check_adjoint(linearization)
                if linearization.complex_outputs:
                    objective = of_complex_outputs(objective, term, params)
                terms.append(free_term(objective, linearization))
        yield FreeModel(terms, arguments.blocks, arguments)


def operator_of(model: FreeModel, leaves: Sequence[int]) -> Operator:
    """Return the operator along some leaves; the graphs of its samples are kept if they are few."""
    terms, scale, leader = model.terms, model.scaling.scale, model.arguments.leader
    scale = None if scale is None else along_block(scale, leaves, model.sizes)
    if leader is None:
        return sample_operator(terms, leaves, scale)
    here = [term for term in terms if term.on_ranks is None]
    return rank_operator(
        leader, terms, leaves, scale, sample_operator(here, leaves, None) if here else None
    )


def check_free_slopes(
    model: FreeModel, gradients: Sequence[Float[Tensor, " _"]], *, curved: bool
) -> None:
    """Require outputs that depend on parameters; unless ``curved``, no slopes beyond rounding."""
    gradient = torch.cat(list(gradients))
    if not bool((gradient != 0).any()):
        check_dependence(any(depends_on_parameters(term.linearization) for term in model.terms))
    if curved:
        return
    slopes = torch.stack([term.steepness.amax() for term in model.terms])
    size = float(gradient.norm())
    if bool((slopes > LEAST_SLOPE).any()) and size > 0:
        raise without_curvature(model.names, size)
