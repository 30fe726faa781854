"""Buffers that a model refers to: they must come out of a step as they went in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ddnewton.errors import BadValue, sentence

SEARCH_DEPTH = 4
"""How many functions, objects and containers deep a module is looked for."""


class Snapshot(NamedTuple):
    """The buffers of one module, and copies of those that can be copied, with their versions."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    copies: dict[str, tuple[int, Tensor]]


@contextmanager
def kept_buffers(function: Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """Put back, at the end, the buffers of the modules that a function refers to.

    Yields a check that refuses, so far, a change of their values. A buffer that a model makes
    anew, from nothing or to the same values, is only put back.
    """
    modules = {
        id(module): module for root in _modules(function, SEARCH_DEPTH) for module in root.modules()
    }
    before = [_snapshot(module) for module in modules.values() if module._buffers]
    try:
        yield partial(_check, before)
    finally:
        for module, buffers, copies in before:
            for name, (version, copy) in copies.items():
                buffer = buffers[name]
                if buffer is not None and writes(buffer) != version:
                    buffer.copy_(copy)
            module._buffers.update(buffers)


def _snapshot(module: nn.Module) -> Snapshot:
    buffers = dict(module._buffers)
    copies = {
        name: (writes(buffer), buffer.clone())
        for name, buffer in buffers.items()
        if buffer is not None and not buffer.is_meta and not is_lazy(buffer)
    }
    return Snapshot(module, buffers, copies)


def _check(before: list[Snapshot]) -> None:
    """Refuse a buffer whose values have changed."""
    for module, buffers, copies in before:
        for name, (version, copy) in copies.items():
            buffer = module._buffers.get(name)
            if buffer is not None and buffer is buffers[name] and writes(buffer) == version:
                continue
            if buffer is None or not equal(buffer, copy):
                rule = "model_fn must not change what it refers to"
                got = f"a change of the buffer {name!r} of {type(module).__name__}"
                remedy = "Put the module in eval mode, or return what is counted as an output."
                raise BadValue(sentence(rule, got, remedy))


def writes(buffer: Tensor) -> int:
    """Return how often a tensor was written to; inference tensors do not count."""
    return -1 if buffer.is_inference() else buffer._version


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
        parts = _captured(thing)
    elif isinstance(thing, (list, tuple)):
        parts = list(thing)
    elif isinstance(thing, dict):
        parts = list(thing.values())
    elif callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__"):
        parts = list(vars(thing).values())
    return [module for part in parts for module in _modules(part, depth - 1)]


def _captured(function: Any) -> list[Any]:
    """Return what a function finds in its closure, its defaults and its module."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            continue
    names = function.__code__.co_names
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    return [*cells, *found, *(function.__defaults__ or ())]


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are alike in everything, nan and nan too."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    one, other = one.to_dense(), other.to_dense()
    alike = torch.equal(one, other)  # the quickest, if there is no nan
    return alike or bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
