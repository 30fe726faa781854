"""A data set as a loader of batches: one loss of all of them, a batch in memory at a time.

What needs the data set more than once goes through the loader again: a fingerprint of every batch
tells whether it is the same as in the first pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.hashes import hashed
from ddnewton.trees import named_leaves
from ddnewton.types import PyTree

SAME_REMEDY = (
    "Everything that needs the data more than once goes through the loader again: pass "
    "shuffle=False, or a sampler that returns the same order every time, and transforms that draw "
    "no random numbers."
)

BATCHES_REMEDY = (
    "newton_step, newton_step_and_info, ggn_eigvalsh, ggn_eigh and directional_derivatives take "
    "batches; to any other function pass one batch after the other, or tensors."
)


class Pair(NamedTuple):
    """A batch: inputs and targets."""

    X: PyTree
    y: PyTree


@dataclass(frozen=True, eq=False)
class Batches:
    r"""All batches of a loader as one data set, to be passed as X, with ``y=None``.

    The loss is that of the whole data set, as if all batches were one: with ``reduction="mean"``

    .. math:: L = \frac{\sum_b \sum_{n \in b} \ell_n}{\sum_b d_b},

    where d_b is what the mean over batch b alone divides by: samples, valid labels, or weights.
    Never more than a batch is in memory, besides a Gauss-Newton matrix of the parameters [D, D],
    and the loss, slopes and curvatures of every sample. A step with a number as damping takes one
    pass, of which G and g are sums; directions take a second, along which the slopes of all samples
    are computed. Where [D, D] does not fit, or with ``gram="free"``, every product is a pass. There
    is no matrix [NM, NM] of the samples, which would need all of them: few samples of a model with
    many parameters are better passed as one batch.

    Parameters
    ----------
    loader
        What yields the same pairs (X, y) every time it is iterated over: a
        `torch.utils.data.DataLoader` with ``shuffle=False``, a list of pairs. Batches may be of
        different sizes, and on another device than the parameters.

    Raises
    ------
    TypeError
        Where the loader can be iterated over only once, as a generator can.
    ValueError
        By the functions that take it, where the loader is empty, or yields other batches when it is
        iterated over again.

    Examples
    --------
    >>> import torch
    >>> from ddnewton import newton_step
    >>> line = lambda p, x: p["slope"] * x + p["offset"]
    >>> zero = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> pairs = torch.utils.data.TensorDataset(x, 3 * x + 1)
    >>> loader = torch.utils.data.DataLoader(pairs, batch_size=2)
    >>> step = newton_step(line, zero, Batches(loader), None, torch.nn.MSELoss(), damping=0.0)
    >>> {name: round(value.item(), 5) for name, value in step.items()}
    {'slope': 3.0, 'offset': 1.0}
    """

    loader: Iterable[Any]

    def __post_init__(self) -> None:
        _check_loader(self.loader)


def _check_loader(loader: object) -> None:
    """Require what can be iterated over again and again."""
    rule = "Batches: loader must be something that can be iterated over again and again"
    if isinstance(loader, Iterator):
        remedy = "An iterator ends once: pass the DataLoader itself, or a list of pairs (X, y)."
        raise BadType(sentence(rule, type(loader).__name__, remedy))
    if isinstance(loader, (Tensor, str, dict)) or not isinstance(loader, Iterable):
        remedy = "Pass a DataLoader, or a list of pairs (X, y)."
        raise BadType(sentence(rule, type(loader).__name__, remedy))


def check_without_targets(y: PyTree) -> None:
    """Require y to be None where the batches have the targets."""
    if y is not None:
        rule, got = "y must be None where X is Batches", type(y).__name__
        raise BadType(sentence(rule, got, "The loader yields the targets, in pairs (X, y)."))


class Passes:
    """The batches of a loader, in their order, pass after pass; of them the last one is held."""

    def __init__(self, batches: Batches) -> None:
        self._loader = batches.loader
        self._iterator: Iterator[Any] | None = None
        self._number = -1
        self._fingerprints: list[tuple[Any, ...]] = []

    def each(self) -> Iterator[Pair]:
        """Yield all batches, for the first time or again."""
        if not self._fingerprints:
            yield from self._first()
            return
        for number in range(len(self._fingerprints)):
            yield self.at(number)

    def at(self, number: int) -> Pair:
        """Return a batch in a later pass: of the current one, or of a new one if it is past."""
        if self._iterator is None or number <= self._number:
            self._restart()
        pair: Pair | None = None
        while self._number < number:
            pair = None  # so that two batches are never held
            pair = self._following()
            if pair is None:
                got = f"{self._number + 1} batches where there were {len(self._fingerprints)}"
                raise _changed(got)
            if _fingerprint(pair) != self._fingerprints[self._number]:
                raise _changed(f"another batch {self._number}")
        assert pair is not None
        # After the last one nothing may follow.
        if number == len(self._fingerprints) - 1:
            assert self._iterator is not None
            if next(self._iterator, None) is not None:
                raise _changed(f"more than {len(self._fingerprints)} batches")
            self.close()
        return pair

    def close(self) -> None:
        """Leave the pass: the workers of a loader end with its iterator."""
        iterator, self._iterator = self._iterator, None
        close = getattr(iterator, "close", None)
        if close is not None:
            close()

    def _first(self) -> Iterator[Pair]:
        """Yield all batches for the first time."""
        self._restart()
        while (pair := self._following()) is not None:
            self._fingerprints.append(_fingerprint(pair))
            yield pair
            del pair
        if not self._fingerprints:
            rule, got = "the loader of Batches must yield at least one pair (X, y)", "none"
            raise BadValue(sentence(rule, got, "Is its data set empty, or has it been used up?"))
        self.close()

    def _restart(self) -> None:
        """Begin a pass."""
        self.close()
        self._iterator, self._number = iter(self._loader), -1

    def _following(self) -> Pair | None:
        """Return the next batch, None after the last."""
        assert self._iterator is not None
        try:
            pair = next(self._iterator)
        except StopIteration:
            return None
        self._number += 1
        return _as_pair(pair, self._number)


def _as_pair(pair: Any, number: int) -> Pair:
    """Require a batch to be a pair of inputs and targets."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        rule = "the loader of Batches must yield pairs (X, y)"
        got = type(pair).__name__
        got += f" of {len(pair)}" * isinstance(pair, (tuple, list))
        remedy = "Several inputs, or targets, are one pytree: ((X1, X2), y)."
        raise BadType(sentence(rule, f"{got} as batch {number}", remedy))
    return Pair(*pair)


def _fingerprint(pair: Pair) -> tuple[Any, ...]:
    """Return numbers that tell a batch from any other, the order of its samples included."""
    parts = [(path, leaf) for path, leaf in named_leaves(pair) if isinstance(leaf, Tensor)]
    return tuple((path, leaf.shape, leaf.dtype, hashed(leaf)) for path, leaf in parts)


def _changed(got: str) -> BadValue:
    """Return the error of a loader whose later pass is not its first."""
    rule = "the loader of Batches must yield the same batches every time"
    return BadValue(sentence(rule, f"{got} in a later pass", SAME_REMEDY))


@contextmanager
def about_batch(number: int) -> Iterator[None]:
    """Put the number of a batch in front of the errors raised inside, but for the first."""
    try:
        yield
    except (BadValue, BadType) as error:
        if number:
            error.args = (f"batch {number}: {error}",)
        raise
