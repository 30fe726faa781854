"""The modules that a function refers to: what it may use when it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from types import CodeType, ModuleType
from typing import Any

from torch import Tensor, nn

SEARCH_DEPTH = 4
"""The number of functions, objects and containers inside each other in which modules are found."""

SEARCH_WIDTH = 1000
"""A container with more items than this holds data, and no modules."""


def modules_of(function: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules that a function refers to, through closures, objects and containers."""
    level: list[Any] = [function]
    modules, seen = [], {id(function)}
    for _ in range(SEARCH_DEPTH + 1):
        modules += [value for value in level if isinstance(value, nn.Module)]
        parts = {id(part): part for value in level for part in _parts(value)}
        level = [part for key, part in parts.items() if key not in seen]
        seen |= parts.keys()
    return modules


def _parts(value: Any) -> Sequence[Any]:
    """Return the objects that an object refers to: of a function, all that a call may use."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)):
        return ()
    # Functions of all kinds.
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        return _captured(value)
    # Containers of not too many items, and objects with attributes.
    if isinstance(value, (list, tuple, dict)):
        searched = len(value) <= SEARCH_WIDTH
        return list(value.values() if isinstance(value, dict) else value) if searched else ()
    return list(vars(value).values()) if hasattr(value, "__dict__") else ()


def _captured(function: Any) -> list[Any]:
    """Return the values that a function takes from its closure, its module and its defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            continue
    # Its globals, and of these that are files the names that it looks up in them.
    names = set(_names(function.__code__))
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    files = [vars(value) for value in values if isinstance(value, ModuleType)]
    in_files = [file[name] for file in files for name in names if name in file]
    defaults = chain(function.__defaults__ or (), (function.__kwdefaults__ or {}).values())
    return [*cells, *values, *in_files, *defaults]


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function looks up, and the functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
