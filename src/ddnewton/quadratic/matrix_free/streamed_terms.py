"""Terms whose samples come in batches, by products: every product goes through the loader.

A batch is a term of its own. What is kept of it are the losses of its samples; its outputs, and the
roots of its losses, are made anew in every pass, and so are the graphs of its products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from ddnewton.criteria.denominators import Share, denominator_of, divided_by, share_of
from ddnewton.inputs.batches import Pair, about_batch
from ddnewton.inputs.term_names import about_term
from ddnewton.linearize.adjoint import check_adjoint
from ddnewton.linearize.free_linearization import FreeLinearization, linearized_freely
from ddnewton.linearize.model import forgotten
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.quadratic.arguments import Arguments, function_of
from ddnewton.quadratic.matrix_free.distant_root import DistantRoot
from ddnewton.quadratic.matrix_free.free_term import FreeTerm, free_term, known_of
from ddnewton.quadratic.streams import Source, Stream, sources_of
from ddnewton.transforms import without_autocast
from ddnewton.trees import as_real


class Batch(NamedTuple):
    """A batch of which the samples are forgotten, and its share of the denominator."""

    term: FreeTerm
    share: Share


def streamed_terms(arguments: Arguments, stack: ExitStack) -> list[FreeTerm]:
    """Return a term for every batch of every term, after a pass over all of them."""
    terms: list[FreeTerm] = []
    for source in sources_of(arguments, stack):
        with about_term(source.term.name):
            terms += _of_source(arguments, source, stack)
    return terms


def _of_source(arguments: Arguments, source: Source, stack: ExitStack) -> list[FreeTerm]:
    """Return a term for every batch of a source."""
    at: list[Callable[[Any], FreeLinearization]] = []
    batches: list[Batch] = []
    for pair in source.passes.each():
        number = len(batches)
        with about_batch(number), _at_batch(arguments, source, at, number, pair, 1.0) as term:
            loss = source.loss_of(
                arguments, number, complex_outputs=term.linearization.complex_outputs
            )
            outputs, precise = term.linearization.outputs, term.linearization.precise
            before = [batch.share for batch in batches]
            share = share_of(loss, outputs, precise, term.objective.y, before)
            batches.append(Batch(_without_samples(term), share))
        del pair, term, outputs, precise  # before the next one is made
    total = denominator_of([batch.share for batch in batches])

    def again(number: int, pair: Pair) -> Any:
        return _at_batch(arguments, source, at, number, pair, total)

    stream = Stream(source, again)
    stack.callback(stream.close)
    return [_streamed(batch.term, total, stream, k) for k, batch in enumerate(batches)]


@contextmanager
def _at_batch(
    arguments: Arguments,
    source: Source,
    at: list[Callable[[Any], FreeLinearization]],
    number: int,
    pair: Pair,
    total: float,
) -> Iterator[FreeTerm]:
    """Linearize the term at a batch, as a part that is divided by a total."""
    term, params = source.at_batch(arguments, pair), arguments.params
    # At the first batch with all checks, and at any other in the same way.
    function = function_of(term, params)
    with ExitStack() as contexts:
        if at:
            if isinstance(function, Prepared):
                contexts.enter_context(without_autocast(params))
            linearization = at[0](term.X)
        else:
            parts = function, as_real(params), term.X, arguments.chunk_size
            first = linearized_freely(*parts, precision=arguments.precision)
            linearization = contexts.enter_context(first)
            if arguments.has_dtensors:
                check_adjoint(linearization)
            at.append(linearization.at_batch)
        loss = source.loss_of(arguments, number, complex_outputs=linearization.complex_outputs)
        objective = source.objective._replace(loss=divided_by(loss, total), y=term.y)
        yield free_term(objective, linearization)


def _without_samples(term: FreeTerm) -> FreeTerm:
    """Return a term that holds nothing as large as its samples or its outputs."""
    linearization, kept = term.linearization, known_of(term)
    return FreeTerm(
        objective=term.objective._replace(y=None),
        linearization=linearization._replace(
            outputs=linearization.outputs[:1].clone(),
            precise=linearization.precise[:1].clone(),
            function=forgotten,
            at_batch=forgotten,
            in_float64=None,
            keeps_graphs=False,
        ),
        root=DistantRoot(kept, forgotten),
        known=kept,
    )


def _streamed(term: FreeTerm, total: float, stream: Stream[FreeTerm], number: int) -> FreeTerm:
    """Return a batch as a term divided by a total, made of the samples anew where need be."""

    def outputs(leaves: Sequence[Tensor], samples: Any) -> Tensor:
        return stream.at(number).linearization.function(leaves, samples)

    assert term.known is not None
    divided = term.known.divided(total)
    return term._replace(
        linearization=term.linearization._replace(function=outputs),
        root=DistantRoot(divided, lambda: stream.at(number).root),
        known=divided,
    )
