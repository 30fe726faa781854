"""The errors of the public functions; a message says where, the rule, what was got, what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class BadValue(ValueError):
    """An argument of the right kind that breaks a rule."""


class BadType(TypeError):
    """An argument of the wrong kind."""


SHOWN_CHARACTERS = 300
"""A message shows the value that was got up to this length."""


def sentence(rule: str, got: object, remedy: str) -> str:
    """Return the message of an error: the rule, what was got, what to do."""
    shown = str(got)
    if len(shown) > SHOWN_CHARACTERS:
        shown = f"{shown[:SHOWN_CHARACTERS]}…"
    return f"{rule}; got {shown}. {remedy}"


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Put the name of a public function in front of the errors raised on its behalf."""

    @wraps(function)
    def edge(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (BadValue, BadType) as error:
            error.args = (f"{function.__name__}: {error}",)
            raise

    return edge
