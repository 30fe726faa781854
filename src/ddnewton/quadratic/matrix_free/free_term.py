"""A term of the loss by products: its linearization, the roots of its losses, and its visits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.criteria.batch_root import root_of_batch
from ddnewton.criteria.root import Product, Root, Rows
from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.jacobian_products import Products
from ddnewton.quadratic.flat import LEAST_SLOPE
from ddnewton.quadratic.term import Objective, output_rounding
from ddnewton.trees import chunks


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


class AnyRoot(Protocol):
    """A `Root` of a batch, at hand or made anew where it is asked for."""

    @property
    def value(self) -> Float[Tensor, " n"]:
        """The losses of all samples."""

    @property
    def gradient(self) -> Float[Tensor, "n c"]:
        """Their gradients in the outputs."""

    @property
    def columns(self) -> int:
        """The number of columns of a sample."""

    @property
    def times(self) -> Product | None:
        """Products with the roots, None where there are none."""

    @property
    def spans(self) -> bool:
        """Whether the gradients lie in the span of the columns."""

    @property
    def squares(self) -> Float[Tensor, " n"] | None:
        """Gradients squared over curvatures, None where these are not known."""

    def product(self, v: Float[Tensor, "n c"], /) -> Float[Tensor, "n c"]:
        """Return ∇²ℓ v."""

    def at(self, samples: Rows, /) -> Root:
        """Return the root of some samples."""


class FreeTerm(NamedTuple):
    """A term of the loss: its linearization, and the roots of the losses of all samples."""

    objective: Objective
    linearization: FreeLinearization
    root: AnyRoot  # of all samples
    steepest: Float[Tensor, " n"] | None = None  # what is known of samples that come in batches
    uncurved: Bool[Tensor, " n"] | None = None

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
    def steepness(self) -> Float[Tensor, " n"]:
        """The largest slope of every sample along an output."""
        return self.root.gradient.abs().amax(1) if self.steepest is None else self.steepest

    @property
    def is_uncurved(self) -> Bool[Tensor, " n"]:
        """Which samples have no curvature along their slope."""
        if self.uncurved is not None:
            return self.uncurved
        if self.root.squares is not None:
            return self.root.squares.isinf()
        gradient = self.root.gradient
        return (gradient * self.root.product(gradient)).sum(1) <= 0

    @property
    def is_flat(self) -> Bool[Tensor, " n"]:
        """Which samples have a slope beyond rounding and no curvature along it."""
        steep = self.steepness > LEAST_SLOPE
        return steep & self.is_uncurved if bool(steep.any()) else steep

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


def free_term(objective: Objective, linearization: FreeLinearization) -> FreeTerm:
    """Return a term with the roots of its losses at the outputs."""
    outputs, precise = linearization.outputs, linearization.precise
    return FreeTerm(
        objective, linearization, root_of_batch(objective.loss, outputs, precise, objective.y)
    )
