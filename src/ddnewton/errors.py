"""Errors and warnings of the public functions.

The message of an error says where, the rule, what was got, what to do; that of a warning, what is
lost, why, and what to do. A warning points at the line outside that called the library.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class BadValue(ValueError):
    """An argument of the right kind that breaks a rule."""


class BadType(TypeError):
    """An argument of the wrong kind."""


class NotFinite(BadValue):
    """Outputs, derivatives or a loss with nan or inf among them."""


class TooLarge(BadValue, MemoryError):
    """A step that does not fit into the memory at hand."""


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


def on_behalf(function: Callable[P, R]) -> Callable[P, R]:
    """Return a public function as another one calls it, whose name stands in front of errors."""
    inner: Callable[P, R] = function.__wrapped__  # type: ignore[attr-defined]
    return inner


PASSED_OVER = {"ddnewton", "torch", "contextlib", "functools"}
"""Packages whose lines are not the user's, in what calls the library."""


def warn(message: str) -> None:
    """Warn the user, at the line that called the library."""
    # The innermost line outside, as a number of calls from here.
    frame, calls = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in PASSED_OVER:
        frame, calls = frame.f_back, calls + 1
    warnings.warn(message, UserWarning, stacklevel=calls)
