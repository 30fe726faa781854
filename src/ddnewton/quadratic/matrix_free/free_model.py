"""The loss of a batch to second order by products: its terms, and their visits.

Of every term are known the gradients r_n = ∇ℓ_n along the outputs, products with the roots S_n of
∇²ℓ_n = S_n S_nᵀ, and, a chunk of samples at a time, products with the Jacobians J_n. That gives

    g = 1/N Σ_n J_nᵀ r_n,        G v = 1/N Σ_n J_nᵀ S_n S_nᵀ J_n v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.criteria.batch_root import root_of_batch
from ddnewton.criteria.root import Root
from ddnewton.inputs.checks import check_dependence
from ddnewton.inputs.groups import Block
from ddnewton.inputs.terms import about_term
from ddnewton.linearize.free_linearization import FreeLinearization, linearized_freely
from ddnewton.linearize.jacobian_products import Products
from ddnewton.quadratic.arguments import Arguments, Scaling, function_of, of_complex_outputs
from ddnewton.quadratic.flat import LEAST_SLOPE, depends_on_parameters, without_curvature
from ddnewton.quadratic.term import Objective, TermLosses, output_rounding
from ddnewton.trees import as_real, chunks


class Visit(NamedTuple):
    """Some samples of a term: products with their Jacobians and with the roots of their losses."""

    products: Products
    root: Root

    def times(self, u: Float[Tensor, "n m"]) -> Float[Tensor, "n c"]:
        """Return S u, of losses that have roots."""
        assert self.root.times is not None
        return self.root.times(u)

    def transposed(self, v: Float[Tensor, "n c"]) -> Float[Tensor, "n m"]:
        """Return Sᵀ v, of losses that have roots."""
        assert self.root.transposed is not None
        return self.root.transposed(v)


class FreeTerm(NamedTuple):
    """A term of the loss: its linearization, and the roots of the losses of all samples."""

    objective: Objective
    linearization: FreeLinearization
    root: Root  # of all samples

    @property
    def losses(self) -> Float[Tensor, " n"]:
        """The losses of all samples."""
        return self.root.value

    @property
    def losses_of_gradient(self) -> Float[Tensor, " _"]:
        """The losses of the samples that the gradient is of."""
        samples = self.objective.samples.slopes
        return self.losses if samples is None else self.losses[samples]

    @property
    def samples_at_once(self) -> int:
        """How many samples are evaluated at a time."""
        return self.linearization.samples_at_once

    @property
    def rounding(self) -> Float[Tensor, ""]:
        """By how much the rounding of the outputs moves the mean loss."""
        return output_rounding(self.linearization.precise, self.root.gradient)

    @property
    def is_flat(self) -> Bool[Tensor, " n"]:
        """Which samples have a slope beyond rounding and no curvature along it."""
        root, steep = self.root, self.root.gradient.abs().amax(1) > LEAST_SLOPE
        if root.squares is not None:
            return steep & root.squares.isinf()
        return steep & ((root.gradient * root.product(root.gradient)).sum(1) <= 0)

    @property
    def spans(self) -> bool:
        """Whether the gradient is known to lie in the range of G."""
        return self.root.spans and self.is_one_sample and not bool(self.is_flat.any())

    @property
    def square(self) -> float:
        """A number that gᵀG⁺g does not exceed, for a gradient in the range of G."""
        squares, samples = self.root.squares, self.objective.samples.directions
        if squares is None or not self.spans:
            return math.inf
        return float((squares if samples is None else squares[samples]).mean())

    @property
    def is_one_sample(self) -> bool:
        """Whether gradient and directions are of the same samples."""
        slopes, directions, _ = self.objective.samples
        if slopes is None or directions is None:
            return slopes is directions
        return torch.equal(slopes, directions)

    def count(self, samples: Int[Tensor, " _"] | None) -> int:
        """Return how many samples there are of some, None for all."""
        return len(self.root.value) if samples is None else len(samples)

    def visits(self, leaves: Sequence[int], samples: Int[Tensor, " _"] | None) -> Iterator[Visit]:
        """Visit some samples, None for all, a chunk at a time, along some leaves."""
        for part in chunks(self.count(samples), self.linearization.samples_at_once):
            indices = part if samples is None else samples[part]
            yield Visit(self.linearization.products(leaves, indices), self.root.at(indices))


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
        losses = {term.objective.term: term.losses.mean() for term in self.terms}
        return losses.get(None, losses)

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
        return ", ".join(dict.fromkeys(term.objective.criterion_name for term in self.terms))

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The loss of the batch."""
        return torch.as_tensor(sum(term.losses.mean() for term in self.terms))

    @property
    def spans(self) -> bool:
        """Whether the gradient is known to lie in the range of G."""
        return all(term.spans for term in self.terms)

    def in_float64(self) -> FreeModel | None:
        """Return the same model in float64, None where it is so already or cannot be."""
        if all(term.linearization.in_float64 is None for term in self.terms):
            return None
        parts = [term.linearization for term in self.terms]
        wide = [part if part.in_float64 is None else part.in_float64() for part in parts]
        objectives = [term.objective for term in self.terms]
        return self._replace(terms=list(map(_term, objectives, wide)))


@contextmanager
def free_model(arguments: Arguments) -> Iterator[FreeModel]:
    """Expand the loss of a batch to second order, by products."""
    params, terms = arguments.params, []
    with ExitStack() as stack:
        for number, term in enumerate(arguments.terms):
            with about_term(term.name):
                function, objective = function_of(term, params), arguments.objectives[number]
                linearization = stack.enter_context(
                    linearized_freely(function, as_real(params), term.X, arguments.chunk_size)
                )
                if linearization.complex_outputs:
                    objective = of_complex_outputs(objective, term, params)
                terms.append(_term(objective, linearization))
        yield FreeModel(terms, arguments.blocks, arguments)


def _term(objective: Objective, linearization: FreeLinearization) -> FreeTerm:
    """Return a term with the roots of its losses at the outputs."""
    outputs, precise = linearization.outputs, linearization.precise
    return FreeTerm(
        objective, linearization, root_of_batch(objective.loss, outputs, precise, objective.y)
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
    slopes = torch.stack([term.root.gradient.abs().amax() for term in model.terms])
    size = float(gradient.norm())
    if bool((slopes > LEAST_SLOPE).any()) and size > 0:
        raise without_curvature(model.names, size)
