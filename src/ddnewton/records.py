"""Records that are pickled as the call that made them, for the functions in them are closures.

A factory is marked by `pickled_as_call`. What it was called with is pickled, so it is what the user
passed that has to be picklable; unpickled, the record does the same to the bit. A record that
`_replace` changed afterwards was made by no call, and is pickled field by field.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Call(NamedTuple):
    """The call of a factory, and the fields of the record that it made."""

    factory: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fields: tuple[Any, ...]


def pickled_as_call(factory: Callable[P, R]) -> Callable[P, R]:
    """Let a factory keep its call in the record that it makes, the last field of which is for it.

    The decorator is the outermost one: a factory is pickled by its name.
    """

    @wraps(factory)
    def keeping(*args: P.args, **kwargs: P.kwargs) -> R:
        record: Any = factory(*args, **kwargs)
        kept: R = record._replace(made_by=Call(keeping, args, kwargs, tuple(record)[:-1]))
        return kept

    return keeping


def reduced(record: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function, and its arguments, that make the record: for its ``__reduce__``."""
    *fields, call = record
    if call is not None and all(a is b for a, b in zip(fields, call.fields, strict=True)):
        return _called, (call.factory, call.args, call.kwargs)
    return type(record), tuple(fields)


def _called(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the record that a call makes."""
    return factory(*args, **kwargs)


def stored_draws(generator: torch.Generator) -> tuple[torch.device, Tensor]:
    """Return the device and the state of a generator, which cannot be pickled itself."""
    return generator.device, generator.get_state()


def restored_draws(device: torch.device, state: Tensor) -> torch.Generator:
    """Return a generator in the state that was stored."""
    return torch.Generator(device).set_state(state)
