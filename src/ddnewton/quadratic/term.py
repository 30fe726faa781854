"""One term of the loss to second order: its values, and the weights of its columns.

    X → outputs f → ∇ℓ_n = L z + R 1, ∇²ℓ_n = L diag(h) Lᵀ → columns A = JᵀL
    gradient A z / N,        Gauss-Newton matrix A₁ diag(h / N) A₁ᵀ

Where the gradient is of samples that give no directions, or L does not span it, it has columns of
its own: `quadratic.gradient_columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.criteria.expand import expand_batch
from ddnewton.criteria.loss import Expansion, Loss, slopes_of
from ddnewton.inputs.samples import Samples, rows_among
from ddnewton.inputs.term_names import Name
from ddnewton.linearize.basis import Basis, stored, with_stored
from ddnewton.linearize.model import Linearization, forgotten
from ddnewton.quadratic.gradient_columns import gradient_columns, no_gradient
from ddnewton.types import PyTree

TermLosses: TypeAlias = Tensor | dict[Any, Tensor]
"""The loss of every term by its name, or that of the only one."""

MeanLoss: TypeAlias = Callable[[Sequence[Tensor], Tensor | None], Tensor]
"""``mean_loss(leaves, samples)``: the mean loss of some samples, None for all."""


class Objective(NamedTuple):
    """The loss of a batch, and which samples its derivatives are of."""

    term: Name
    criterion_name: str  # for messages
    loss: Loss
    y: PyTree
    samples: Samples
    gradient: bool  # whether anybody asks for it
    by_sample: bool  # whether somebody asks for slopes of single samples
    mean_loss: MeanLoss | None = None  # at other parameters, where samples are on several ranks


class SampleRows(NamedTuple):
    """In which rows of γ and λ the samples asked for stand; None for all rows in their order."""

    gammas: Int[Tensor, " _"] | None
    lambdas: Int[Tensor, " _"] | None


class Unseen(NamedTuple):
    """Samples whose curvature is asked for along directions that other samples give."""

    samples: Int[Tensor, " n"]
    basis: Basis  # L
    h: Float[Tensor, "m n"]


class Term(NamedTuple):
    """A term of the loss to second order: values per sample, columns, and their weights."""

    objective: Objective
    linearization: Linearization
    losses: Float[Tensor, " n"]
    basis: Basis  # L, of the samples that give the directions
    z: Float[Tensor, "m n2"]
    h: Float[Tensor, "m n2"]
    gradient_weights: Float[Tensor, "m n2"]  # z / N, 0 for samples not of the gradient
    further_weights: Float[Tensor, " _"]  # of the gradient's own columns: 1 / N, or 1 of their sum
    curvature_columns: Jacobian
    gradient_columns: Jacobian | None  # the gradient's own
    own_gradient: bool  # whether these are all that it is made of
    rows: SampleRows
    unseen: Unseen | None
    rounding: Float[Tensor, ""]  # of the loss, by that of the outputs

    @property
    def curvature_weights(self) -> Float[Tensor, "m n2"]:
        """The weights h / N of the columns of the curvature."""
        return self.h / self.h.shape[1]  # the 1/N

    @property
    def samples_at_once(self) -> int:
        """How many samples are evaluated at a time."""
        return int(self.curvature_columns.chunks[0].stop)

    @property
    def losses_of_gradient(self) -> Float[Tensor, " _"]:
        """The losses of the samples that the gradient is of."""
        samples = self.objective.samples.slopes
        return self.losses if samples is None else self.losses[samples]


class HasLosses(Protocol):
    """What has the losses of some samples of a term, or of one of its batches."""

    @property
    def objective(self) -> Objective:
        """The loss of the batch."""

    @property
    def losses(self) -> Float[Tensor, " n"]:
        """The losses of all samples."""


def losses_of(terms: Sequence[HasLosses]) -> TermLosses:
    """Return the losses of terms by name, or the loss where it is one term.

    Of a term in batches it is the sum of theirs.
    """
    losses: dict[Any, Tensor] = {}
    for term in terms:
        name, loss = term.objective.term, term.losses.mean()
        losses[name] = losses[name] + loss if name in losses else loss
    return losses.get(None, losses)


def without_samples(term: Term) -> Term:
    """Return a term that holds nothing as large as its samples or its basis."""
    linearization, further = term.linearization, term.gradient_columns
    entries = stored(term.basis)
    return term._replace(
        objective=term.objective._replace(y=None),
        linearization=linearization._replace(
            outputs=linearization.outputs[:1].clone(),
            precise=linearization.precise[:1].clone(),
            jacobian=forgotten,
            function=forgotten,
            in_float64=None if linearization.in_float64 is None else forgotten,
        ),
        basis=with_stored(term.basis, entries.new_zeros(()).expand(entries.shape)),
        curvature_columns=term.curvature_columns._replace(visit=forgotten),
        gradient_columns=None if further is None else further._replace(visit=forgotten),
    )


def expansion_of(linearization: Linearization, objective: Objective) -> Expansion:
    """Expand a term around the outputs."""
    loss, y = objective.loss, objective.y
    return expand_batch(loss, linearization.outputs, linearization.precise, y)


def term_of(linearization: Linearization, objective: Objective, expansion: Expansion) -> Term:
    """Return a term whose columns are pulled back to the parameters."""
    samples, n = objective.samples, len(expansion.value)
    # The columns of the curvature: those of L, of the samples that give the directions.
    of_directions = of_samples(expansion, samples.directions)
    curvature_columns = linearization.jacobian(of_directions.basis, samples.directions)
    # The gradient is made of the same columns, and of gradients that these do not span.
    z = of_directions.z.T
    gradient = no_gradient(z)
    if objective.gradient:
        parts = linearization, expansion, of_directions, samples
        gradient = gradient_columns(*parts, by_sample=objective.by_sample)
    # Curvatures may be asked for of samples that give no directions.
    lambda_rows, unseen = None, None
    if samples.curvatures is not None:
        lambda_rows, new = rows_among(samples.curvatures, samples.directions, n)
        if new is not None:
            of_new = of_samples(expansion, new)
            unseen = Unseen(new, of_new.basis, of_new.h.T)
    return Term(
        objective=objective,
        linearization=linearization,
        losses=expansion.value,
        basis=of_directions.basis,
        z=z,
        h=of_directions.h.T,
        gradient_weights=gradient.of_curvature,
        further_weights=gradient.further,
        curvature_columns=curvature_columns,
        gradient_columns=gradient.columns,
        own_gradient=gradient.complete,
        rows=SampleRows(gradient.rows, lambda_rows),
        unseen=unseen,
        rounding=output_rounding(linearization.precise, slopes_of(expansion)),
    )


def output_rounding(
    outputs: Float[Tensor, "n ..."], slopes: Float[Tensor, "n c"]
) -> Float[Tensor, ""]:
    """Return by how much the mean loss moves when every output is rounded, each its own way.

    A small residual of large outputs is known to no more digits than these.
    """
    moved = slopes * outputs.reshape(len(outputs), -1)
    eps = torch.finfo(outputs.dtype).eps
    rounding: Tensor = torch.linalg.vector_norm(moved) * (eps / len(outputs))
    return rounding


def of_samples(expansion: Expansion, samples: Int[Tensor, " _"] | None) -> Expansion:
    """Return the expansions of some samples, None for all."""
    if samples is None:
        return expansion
    value, basis, z, h, R = expansion
    of_basis = with_stored(basis, stored(basis)[samples])
    return Expansion(value[samples], of_basis, z[samples], h[samples], R[samples])


def loss_of(terms: Sequence[HasLosses]) -> Float[Tensor, ""]:
    """Return the loss of all terms."""
    return reduce(torch.add, (term.losses.mean() for term in terms))


def names_of(terms: Sequence[HasLosses]) -> str:
    """Return the criteria of terms, for messages."""
    return ", ".join(dict.fromkeys(term.objective.criterion_name for term in terms))
