"""Short texts by which ranks compare what they were given, without sending it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from ddnewton.hashes import hashed
from ddnewton.trees import named_leaves
from ddnewton.types import PyTree

SHOWN_NUMBERS = 16
"""Up to how many numbers a sequence is described by them."""


def params_told(params: PyTree) -> dict[str, str]:
    """Describe every leaf of the parameters, by its name in messages."""
    return {f"params{path}": described(leaf) for path, leaf in named_leaves(params)}


def options_told(options: Mapping[str, Any]) -> dict[str, str]:
    """Describe options and everything in them, by their names in messages."""
    parts = (part for name, value in options.items() for part in _named(name, value))
    return {name: described(part) for name, part in parts}


def generators_in(options: object) -> list[torch.Generator]:
    """Return the sources of random numbers among options, each of them once."""
    parts = (part for _, part in _named("", options))
    generators = (part for part in parts if isinstance(part, torch.Generator))
    return list({id(generator): generator for generator in generators}.values())


def described(value: object) -> str:
    """Describe a value: numbers by themselves, tensors by a hash, functions by their names."""
    if _are_numbers(value):
        return _of_numbers(value)
    for kinds, describe in DESCRIPTIONS:
        if isinstance(value, kinds):
            return describe(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _are_numbers(value: object) -> bool:
    """Return whether a value is a sequence of numbers, which is one thing."""
    return isinstance(value, (list, tuple)) and all(isinstance(part, Number) for part in value)


def _of_numbers(numbers: Any) -> str:
    """Describe a sequence of numbers: a long one by a hash."""
    if len(numbers) <= SHOWN_NUMBERS:
        return repr(numbers)
    return f"{type(numbers).__name__} {_of_tensor(torch.as_tensor(numbers, device='cpu'))}"


def _of_tensor(tensor: Tensor) -> str:
    """Describe a tensor: a single number by its value."""
    form = f"{tensor.dtype} {list(tensor.shape)}"
    return f"{tensor.item()!r} {form}" if tensor.numel() == 1 else f"{form} {hashed(tensor):x}"


DESCRIPTIONS: Sequence[tuple[Any, Callable[[Any], str]]] = (
    (Tensor, _of_tensor),
    (torch.Generator, lambda generator: f"a generator at {hashed(generator.get_state()):x}"),
    ((type(None), Number, str, slice, range), repr),
    ((list, tuple, Mapping), lambda parts: f"{type(parts).__name__} of {len(parts)}"),
)
"""Which kinds of values are described by which functions."""


def _named(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield a value and everything in it, by names as of Python."""
    yield name, value
    for suffix, part in _parts(value).items():
        yield from _named(name + suffix, part)


def _parts(value: Any) -> Mapping[str, object]:
    """Take a value apart: into items, fields, arguments, or the attributes of a module."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": part for key, part in value.items()}
    if isinstance(value, partial):
        return {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if isinstance(value, nn.Module):
        return _attributes(value)
    # Records by their fields, sequences by numbers.
    if is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in fields(value)}
    if isinstance(value, (list, tuple)) and not _are_numbers(value):
        names = [f".{name}" for name in getattr(value, "_fields", ())]
        keys = names or [f"[{number}]" for number in range(len(value))]
        return dict(zip(keys, value, strict=True))
    return {}


def _attributes(module: nn.Module) -> Mapping[str, object]:
    """Return the settings of a module, and of those inside, and its tensors."""
    settings = {
        f"{path}.{name}".strip("."): part
        for path, inner in module.named_modules()
        for name, part in vars(inner).items()
        if not name.startswith("_")
    }
    return {f".{name}": part for name, part in {**settings, **module.state_dict()}.items()}
