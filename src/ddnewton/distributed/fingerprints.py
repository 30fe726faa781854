"""Short texts by which ranks compare what they were given, without sending it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from ddnewton.hashes import hashed
from ddnewton.trees import named_leaves
from ddnewton.types import PyTree


def params_told(params: PyTree) -> dict[str, str]:
    """Describe every leaf of the parameters, by its name in messages."""
    return {f"params{path}": described(leaf) for path, leaf in named_leaves(params)}


def options_told(options: Mapping[str, Any]) -> dict[str, str]:
    """Describe options, by their names in messages."""
    return {name: described(value) for name, value in options.items()}


def described(value: object) -> str:
    """Describe a value: numbers by themselves, tensors by a hash, functions by their names."""
    for kinds, describe in DESCRIPTIONS:
        if isinstance(value, kinds):
            return describe(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _of_tensor(tensor: Tensor) -> str:
    """Describe a tensor: a single number by its value."""
    if tensor.numel() == 1:
        return repr(tensor.item())
    return f"{tensor.dtype} {list(tensor.shape)} {hashed(tensor):x}"


def _of_module(module: nn.Module) -> str:
    """Describe a module, such as a loss with weights."""
    return f"{module!r} {described(module.state_dict())}"


DESCRIPTIONS: Sequence[tuple[Any, Callable[[Any], str]]] = (
    (Tensor, _of_tensor),
    (torch.Generator, lambda generator: f"a generator at {hashed(generator.get_state()):x}"),
    (nn.Module, _of_module),
    (Mapping, lambda parts: repr({repr(key): described(part) for key, part in parts.items()})),
    ((list, tuple), lambda parts: repr([described(part) for part in parts])),
    (partial, lambda call: described((call.func, call.args, call.keywords))),
    ((type(None), Number, str, slice, range), repr),
)
"""Which kinds of values are described by which functions."""
