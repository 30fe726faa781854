r"""The loss of a data set in batches to second order, with its matrices summed over the batches.

    G = Σ_b A_b diag(h_b / d) A_bᵀ,        g = Σ_b A_b z_b / d,        d: the denominator of all

The matrix is on the side of the parameters, in one pass. Of every batch are kept the weights of its
columns; whoever asks for the columns themselves, for slopes along directions, makes a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ddnewton.columns.factors import Factor
from ddnewton.columns.gram import columns_of
from ddnewton.columns.normal_equations import NormalEquations
from ddnewton.criteria.denominators import Share, denominator_of, divided_by, share_of
from ddnewton.inputs.batches import Pair, about_batch
from ddnewton.inputs.checks import check_derivatives
from ddnewton.inputs.term_names import about_term
from ddnewton.linearize.independence import evaluate
from ddnewton.linearize.linearization import linearized
from ddnewton.linearize.structured.costs import is_tiny
from ddnewton.linearize.structured.prepare import layers_of
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.quadratic.arguments import Arguments, function_of
from ddnewton.quadratic.gauss_newton import GaussNewton, check_sums_fit, equations_of
from ddnewton.quadratic.matrices import (
    gauss_newton_matrices,
    in_float64,
    is_resolved,
    matrices_of,
    scaled_by_columns,
)
from ddnewton.quadratic.quadratic_model import QuadraticModel, expanded, model_of, quadratic_model
from ddnewton.quadratic.streams import Source, Stream, sources_of
from ddnewton.quadratic.term import Term, without_samples
from ddnewton.trees import as_real, parameter_count, tree_leaves
from ddnewton.types import ModelFn, PyTree


class Way(NamedTuple):
    """How a model is linearized at every batch: with the layers found at the first, if by these."""

    function: ModelFn
    gram: str
    shapes: PyTree  # of the samples that the layers are for, None for any


class Batch(NamedTuple):
    """A batch of which the samples are forgotten: its term, its share, and its sums."""

    term: Term
    share: Share
    sums: list[NormalEquations]


@contextmanager
def model_and_matrices(
    arguments: Arguments, *, resolved: bool = True
) -> Iterator[tuple[QuadraticModel, list[GaussNewton]]]:
    """Expand a loss to second order, and return it with its matrices, in batches or not.

    They are in float64 where dampings ask for more than float32 has, unless nobody asks for these
    to be ``resolved``.
    """
    if not arguments.in_batches:
        with quadratic_model(arguments) as model:
            yield gauss_newton_matrices(model) if resolved else (model, matrices_of(model))
        return
    # The sums of the blocks have to fit, whatever the number of columns.
    lengths = [leaf.numel() for leaf in tree_leaves(as_real(arguments.params))]
    device = tree_leaves(arguments.params)[0].device
    check_sums_fit([sum(lengths[leaf] for leaf in b.leaves) for b in arguments.blocks], device)
    # As the model is, and once more in float64 where that does not resolve what counts.
    with ExitStack() as stack:
        sources = sources_of(arguments, stack)
        model, matrices = _summed(arguments, sources, stack, wide=False)
        if resolved and not is_resolved(model, matrices):
            model, matrices = _summed(arguments, sources, stack, wide=True)
        yield scaled_by_columns(model, matrices, None)


def _summed(
    arguments: Arguments, sources: Sequence[Source], stack: ExitStack, *, wide: bool
) -> tuple[QuadraticModel, list[GaussNewton]]:
    """Return model and matrices from a pass over the batches of all terms."""
    # G and g of the terms, and all their batches as terms.
    terms: list[Term] = []
    totals: list[NormalEquations] = []
    for source in sources:
        with about_term(source.term.name):
            source_terms, sums = _of_source(arguments, source, stack, wide=wide)
        terms += source_terms
        totals = _added(totals, sums)
    model = model_of(terms, arguments.blocks, arguments.scaling)
    for total in totals:
        check_derivatives(total.matrix.diagonal())
    # On the side of the parameters, with columns that are made anew.
    return model, [
        GaussNewton(
            on_columns=False,
            columns=columns_of(model.jacobians, block),
            weights=model.curvature_weights,
            gradient_weights=model.gradient_weights,
            entries=total.matrix,
            gradient=total.gradient,
        )
        for block, total in zip(model.leaves, totals, strict=True)
    ]


def _of_source(
    arguments: Arguments, source: Source, stack: ExitStack, *, wide: bool
) -> tuple[list[Term], list[NormalEquations]]:
    """Return the batches of a term, as terms, and their sums."""
    ways: list[Way] = []
    batches: list[Batch] = []
    totals: list[NormalEquations] = []
    for pair in source.passes.each():
        number = len(batches)
        with about_batch(number):
            shares = [batch.share for batch in batches]
            batch = _summed_batch(arguments, source, ways, shares, pair, wide=wide)
        totals = _added(totals, batch.sums)
        batches.append(batch._replace(sums=[]))
        del pair, batch  # before the next one is made
    # Divided by the denominator of all of them, which is known only now.
    total = denominator_of([batch.share for batch in batches])
    for sums in totals:
        sums.matrix.div_(total)
        sums.gradient.div_(total)
    sizes = [batch.term.samples_at_once for batch in batches]

    def again(number: int, pair: Pair) -> Any:
        return _batch_model(
            arguments, source, ways, number, pair, total=total, size=sizes[number], wide=wide
        )

    stream = Stream(source, again)
    stack.callback(stream.close)
    return [_term(batch.term, total, stream, k) for k, batch in enumerate(batches)], totals


def _summed_batch(
    arguments: Arguments,
    source: Source,
    ways: list[Way],
    before: Sequence[Share],
    pair: Pair,
    *,
    wide: bool,
) -> Batch:
    """Return a batch with its sums, the losses of its samples divided by nothing."""
    size, number = arguments.chunk_size, len(before)
    with _batch_model(
        arguments, source, ways, number, pair, total=1.0, size=size, wide=wide
    ) as model:
        (term,) = model.terms
        outputs, precise = term.linearization.outputs, term.linearization.precise
        of_complex = term.linearization.complex_outputs
        loss = source.loss_of(arguments, number, complex_outputs=of_complex)
        share = share_of(loss, outputs, precise, term.objective.y, before)
        weights = model.curvature_weights, model.gradient_weights
        sums = equations_of(model.jacobians, 1, model.leaves, *weights)
        return Batch(without_samples(term), share, sums)


@contextmanager
def _batch_model(
    arguments: Arguments,
    source: Source,
    ways: list[Way],
    number: int,
    pair: Pair,
    *,
    total: float,
    size: int | None,
    wide: bool,
) -> Iterator[QuadraticModel]:
    """Expand the loss of a batch to second order, as a part that is divided by a total."""
    term, params = source.at_batch(arguments, pair), arguments.params
    # By the layers that were found at the first batch, if this one has the same shapes.
    if not ways:
        ways.append(_way(arguments, term.X, function_of(term, params), term.gram))
    way = ways[0]
    if way.shapes is not None and way.shapes != _shapes(term.X):
        way = Way(function_of(term, params), term.gram, None)
    # The loss there, and its columns.
    parts = way.function, as_real(params), term.X, way.gram, size
    with linearized(*parts, precision=arguments.precision) as linearization:
        of_complex = linearization.complex_outputs
        loss = source.loss_of(arguments, number, complex_outputs=of_complex)
        objective = source.objective._replace(loss=divided_by(loss, total), y=term.y)
        model = expanded([linearization], [objective], arguments.blocks, arguments.scaling)
        yield in_float64(model) if wide else model


def _way(arguments: Arguments, X: PyTree, function: ModelFn, gram: str) -> Way:
    """Find the layers of a model at the first batch, once for all of them."""
    if isinstance(function, Prepared) or gram == "dense":
        return Way(function, gram, None)
    model = evaluate(function, as_real(arguments.params), X, arguments.chunk_size)
    tiny = is_tiny(model.outputs.numel(), parameter_count(model.params))
    layers = layers_of(model, gram, tiny=tiny)
    return Way(function, "dense", None) if layers is None else Way(layers, gram, _shapes(X))


def _shapes(X: PyTree) -> PyTree:
    """Return the shapes of the samples, leaf by leaf."""
    return [leaf.shape[1:] for leaf in tree_leaves(X)]


def _added(totals: list[NormalEquations], sums: list[NormalEquations]) -> list[NormalEquations]:
    """Return the sums of the blocks, in the memory of the totals where there are some."""
    if not totals:
        return sums
    for total, part in zip(totals, sums, strict=True):
        total.matrix.add_(part.matrix)
        total.gradient.add_(part.gradient)
    return totals


def _term(term: Term, total: float, stream: Stream[QuadraticModel], number: int) -> Term:
    """Return a batch as a term divided by a total, whose columns are those of a stream."""

    def visited(part: int, chunk: slice) -> Sequence[Factor]:
        jacobian = stream.at(number).jacobians[part]
        assert chunk in jacobian.chunks
        return jacobian.visit(chunk)

    def outputs(leaves: Sequence[Tensor], samples: Any) -> Tensor:
        return stream.at(number).terms[0].linearization.function(leaves, samples)

    further = term.gradient_columns
    return term._replace(
        linearization=term.linearization._replace(function=outputs),
        losses=term.losses / total,
        z=term.z / total,
        h=term.h / total,
        gradient_weights=term.gradient_weights / total,
        rounding=term.rounding / total,
        curvature_columns=term.curvature_columns._replace(visit=partial(visited, 0)),
        gradient_columns=further and further._replace(visit=partial(visited, 1)),
    )
