"""Errors that pass between ranks: what one raises, all raise, naming the rank and the reason."""

from __future__ import annotations

from typing import NamedTuple

from ddnewton.errors import BadType, BadValue, NotFinite, TooLarge


class RankError(RuntimeError):
    """An error on one rank of several, raised on all of them."""


class Failure(NamedTuple):
    """An error as it passes between ranks: its kind and its message."""

    kind: str
    message: str


KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (BadValue, BadType, NotFinite, TooLarge, RankError)
}
"""Errors that stay what they are on every rank; any other is a `RankError` there."""


def failure_of(error: BaseException) -> Failure:
    """Describe an error for other ranks."""
    for kind in type(error).__mro__:  # what is more than one of them is so everywhere
        if kind in KINDS.values():
            return Failure(kind.__name__, str(error))
    return Failure(RankError.__name__, f"{type(error).__name__}: {error}")


def error_of(failure: Failure) -> Exception:
    """Make the error that a rank describes."""
    return KINDS[failure.kind](failure.message)


def on_rank(rank: int, failure: Failure) -> Failure:
    """Put the rank of a failure in front of its message."""
    return failure._replace(message=f"rank {rank}: {failure.message}")
