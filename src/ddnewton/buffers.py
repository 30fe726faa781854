"""Buffers that a model refers to: they must come out of a step as they went in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddnewton.errors import BadValue, sentence

DEPTH = 4
"""How many functions, objects and containers deep a module is looked for."""


@contextmanager
def unchanged_buffers(function: Callable[..., Any]) -> Iterator[None]:
    """Undo what a function does to the buffers of the modules it refers to, and refuse it."""
    before = [
        (module, name, buffer, buffer.clone())
        for root in _modules(function, DEPTH)
        for module in root.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    changed = ""
    try:
        yield
    finally:
        for module, name, buffer, copy in before:
            if getattr(module, name) is not buffer or not _equal(buffer, copy):
                changed = f"{name!r} of {type(module).__name__}"
                buffer.copy_(copy)
                setattr(module, name, buffer)
    if changed:
        rule = "model_fn must not change what it refers to"
        remedy = "Put the module in eval mode, or return what is counted as an output."
        raise BadValue(sentence(rule, f"a change of the buffer {changed}", remedy))


def _modules(thing: Any, depth: int) -> list[nn.Module]:
    """Return the modules that a function refers to, through closures, partials and containers."""
    if isinstance(thing, nn.Module):
        return [thing]
    if depth == 0 or isinstance(thing, Tensor):
        return []
    parts: list[Any] = []
    if isinstance(thing, partial):
        parts = [thing.func, *thing.args, *thing.keywords.values()]
    elif inspect.ismethod(thing):
        parts = [thing.__self__]
    elif inspect.isfunction(thing):
        variables = inspect.getclosurevars(thing)
        parts = [*variables.nonlocals.values(), *variables.globals.values()]
        parts += thing.__defaults__ or ()
    elif isinstance(thing, (list, tuple)):
        parts = list(thing)
    elif isinstance(thing, dict):
        parts = list(thing.values())
    elif callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__"):
        parts = list(vars(thing).values())
    return [module for part in parts for module in _modules(part, depth - 1)]


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
