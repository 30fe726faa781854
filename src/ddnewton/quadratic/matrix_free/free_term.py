"""A term of the loss by products: its linearization, the roots of its losses, and its visits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.criteria.batch_root import root_of_batch
from ddnewton.criteria.root import Root
from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.jacobian_products import Products
from ddnewton.quadratic.flat import LEAST_SLOPE
from ddnewton.quadratic.matrix_free.distant_root import AnyRoot, Known
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


class Wholes(NamedTuple):
    """How many samples on all ranks give the slopes, and the directions."""

    slopes: int
    directions: int


class OnRanks(NamedTuple):
    """The number of a term on the ranks that have its samples, and which those are."""

    number: int
    shards: Sequence[range]


class FreeTerm(NamedTuple):
    """A term of the loss: its linearization, and the roots of the losses of all samples."""

    objective: Objective
    linearization: FreeLinearization
    root: AnyRoot  # of all samples
    known: Known | None = None  # of samples that are not at hand
    wholes: Wholes | None = None  # where these samples are a part of those of all ranks
    on_ranks: OnRanks | None = None  # which have the samples
    anew: Callable[[], FreeTerm] | None = None  # there, in float64

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
        if self.known is not None:
            return self.known.rounding
        return output_rounding(self.linearization.precise, self.root.gradient)

    @property
    def steepness(self) -> Float[Tensor, " n"]:
        """The largest slope of every sample along an output."""
        return self.root.gradient.abs().amax(1) if self.known is None else self.known.steepness

    @property
    def is_uncurved(self) -> Bool[Tensor, " n"]:
        """Which samples have no curvature along their slope."""
        if self.known is not None:
            return self.known.is_uncurved
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

    @property
    def slopes_count(self) -> int:
        """How many samples the gradient is the mean over, those of other ranks included."""
        return self.wholes.slopes if self.wholes else self.count(self.objective.samples.slopes)

    @property
    def directions_count(self) -> int:
        """How many samples G is the mean over, those of other ranks included."""
        if self.wholes:
            return self.wholes.directions
        return self.count(self.objective.samples.directions)

    def in_float64(self) -> FreeTerm:
        """Return the same term in float64, itself where it is so already or cannot be."""
        if self.linearization.in_float64 is None:
            return self
        if self.anew is not None:
            return self.anew()
        return free_term(self.objective, self.linearization.in_float64())

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


def known_of(term: FreeTerm) -> Known:
    """Return the part of a term that is kept without its samples."""
    root = term.root
    return Known(
        value=root.value,
        steepness=term.steepness,
        is_uncurved=term.is_uncurved,
        squares=root.squares,
        rounding=term.rounding,
        columns=root.columns,
        spans=root.spans,
        has_factors=root.times is not None,
    )
