"""The terms of a loss whose samples come in batches, visited one after the other.

A batch is a term of its own: its samples' losses are divided by what those of the whole data set
are divided by, so that the loss is the sum over batches of n_b times the mean over batch b.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Generic, NamedTuple, TypeVar

from ddnewton.criteria.denominators import for_batch
from ddnewton.criteria.loss import Loss
from ddnewton.inputs.batches import Batches, Pair, Passes
from ddnewton.inputs.checks import check_batch
from ddnewton.inputs.dtensor_arguments import whole_tree
from ddnewton.inputs.terms import TermArguments
from ddnewton.quadratic.arguments import Arguments, of_complex_outputs
from ddnewton.quadratic.term import Objective
from ddnewton.transforms import check_not_transformed
from ddnewton.trees import device_to_go_to, moved_to

T = TypeVar("T")


class Source(NamedTuple):
    """The batches of a term, and the loss of each."""

    term: TermArguments
    objective: Objective
    passes: Passes

    def at_batch(self, arguments: Arguments, pair: Pair) -> TermArguments:
        """Return the term at a batch, where the parameters are."""
        check_batch(X=pair.X, y=pair.y)
        parts = map(whole_tree, pair)
        X, y = (moved_to(part, device_to_go_to(part, arguments.params)) for part in parts)
        return self.term._replace(X=X, y=y)

    def loss_of(self, arguments: Arguments, number: int, *, complex_outputs: bool) -> Loss:
        """Return the loss of the term at a batch by itself."""
        objective = self.objective
        if complex_outputs:
            objective = of_complex_outputs(objective, self.term, arguments.params)
        return for_batch(objective.loss, number)


def sources_of(arguments: Arguments, stack: ExitStack) -> list[Source]:
    """Return the batches of every term, of which a term without has one."""
    check_not_transformed("Batches")
    sources = []
    for term, objective in zip(arguments.terms, arguments.objectives, strict=True):
        batches = term.X if isinstance(term.X, Batches) else Batches([(term.X, term.y)])
        passes = Passes(batches)
        stack.callback(passes.close)
        sources.append(Source(term, objective, passes))
    return sources


class Stream(Generic[T]):
    """What is made of every batch of a source, of one batch at a time."""

    def __init__(
        self, source: Source, make: Callable[[int, Pair], AbstractContextManager[T]]
    ) -> None:
        self._source, self._make = source, make
        self._stack = ExitStack()
        self._current: tuple[int, T] | None = None

    def at(self, number: int) -> T:
        """Return the one that is made of a batch; that of the batch before is forgotten."""
        if self._current is None or self._current[0] != number:
            self.close()
            made = self._stack.enter_context(self._make(number, self._source.passes.at(number)))
            self._current = number, made
        return self._current[1]

    def close(self) -> None:
        """Forget the batch."""
        self._current = None
        self._stack.close()
