"""Buffers of the modules that a model refers to: a step must leave them unchanged."""

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
"""The number of functions, objects and containers inside each other in which modules are found."""


class Snapshot(NamedTuple):
    """The buffers of one module, and copies of those that can be copied."""

    module: nn.Module
    buffers: dict[str, Tensor | None]
    copies: dict[str, tuple[int, Tensor]]  # with the number of writes to the buffer so far


@contextmanager
def kept_buffers(function: Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """Put back, at the end, the buffers of the modules that a function refers to.

    Yields a check that raises if their values have changed so far. A buffer that a model makes
    anew, from nothing or to the same values, is only put back.
    """
    modules = {
        id(module): module for root in _modules(function, SEARCH_DEPTH) for module in root.modules()
    }
    snapshots = [_snapshot(module) for module in modules.values() if module._buffers]
    try:
        yield partial(_check_unchanged, snapshots)
    finally:
        for module, buffers, copies in snapshots:
            for name, (version, copy) in copies.items():
                buffer = buffers[name]
                if buffer is not None and writes(buffer) != version:
                    buffer.copy_(copy)
            module._buffers.update(buffers)


def _snapshot(module: nn.Module) -> Snapshot:
    """Copy the buffers of a module, except those that have no values yet."""
    buffers = dict(module._buffers)
    copies = {
        name: (writes(buffer), buffer.clone())
        for name, buffer in buffers.items()
        if buffer is not None and not buffer.is_meta and not is_lazy(buffer)
    }
    return Snapshot(module, buffers, copies)


def _check_unchanged(snapshots: list[Snapshot]) -> None:
    """Require every buffer to have the values that it had."""
    for module, buffers, copies in snapshots:
        for name, (version, copy) in copies.items():
            buffer = module._buffers.get(name)
            # The same tensor, not written to, needs no look at its values.
            if buffer is not None and buffer is buffers[name] and writes(buffer) == version:
                continue
            if buffer is None or not equal(buffer, copy):
                rule = "model_fn must not change what it refers to"
                got = f"a change of the buffer {name!r} of {type(module).__name__}"
                remedy = "Put the module in eval mode, or return what is counted as an output."
                raise BadValue(sentence(rule, got, remedy))


def writes(buffer: Tensor) -> int:
    """Return the number of writes to a tensor, −1 if it was made in inference mode."""
    return -1 if buffer.is_inference() else buffer._version


def _modules(value: Any, depth: int) -> list[nn.Module]:
    """Return the modules that a function refers to, through closures, partials and containers."""
    if isinstance(value, nn.Module):
        return [value]
    if depth == 0 or isinstance(value, Tensor):
        return []
    # The values that this one refers to: of a callable, what it may use when it is called.
    parts: list[Any] = []
    if isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        parts = [value.__self__]
    elif inspect.isfunction(value):
        parts = _captured(value)
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):
        parts = list(vars(value).values())
    return [module for part in parts for module in _modules(part, depth - 1)]


def _captured(function: Any) -> list[Any]:
    """Return the values that a function takes from its closure, its module and its defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            continue
    names = function.__code__.co_names
    module_globals = [function.__globals__[name] for name in names if name in function.__globals__]
    return [*cells, *module_globals, *(function.__defaults__ or ())]


def equal(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype, device and values; nan equals nan."""
    if (left.shape, left.dtype, left.device) != (right.shape, right.dtype, right.device):
        return False
    left, right = left.to_dense(), right.to_dense()
    if torch.equal(left, right):  # the quickest, if there is no nan
        return True
    return bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())
