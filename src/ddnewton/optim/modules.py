"""A module as a pure function of its trained parameters, traced anew when the module changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddnewton.inputs.checks import check_batch
from ddnewton.inputs.module_function import ModuleFunction
from ddnewton.linearize.independence import evaluate
from ddnewton.linearize.linearization import is_tiny
from ddnewton.linearize.module_state import equal, writes
from ddnewton.linearize.structured.prepare import Untraceable, no_layers, prepare
from ddnewton.process import ONE_THREAD
from ddnewton.trees import TreeSpec, parameter_count, sample_count, take, tree_flatten
from ddnewton.types import ModelFn, PyTree

COMPARED_BY_VALUE = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.Size,
    TreeSpec,
)
"""Types compared by value; everything else in a module is compared by identity."""


class TracedModule(NamedTuple):
    """A module as a function with known layers, and what the module was when it was traced."""

    model_fn: ModelFn
    fingerprint: list[object]
    untrained: list[Tensor]  # copies: writing through .data leaves no other trace
    slow: str | None  # why it has no layers; empty where that costs nothing, None where it has


def traced_module(
    before: TracedModule | None, model_fn: ModuleFunction, params: PyTree, X: PyTree
) -> TracedModule:
    """Return a module as a function with known layers: the one before, while it is still right.

    It is not where samples have another shape, or where the module has changed: other buffers,
    untrained parameters, submodules, attributes, hooks or modes. For a module that cannot be traced
    the function is ``model_fn``, without layers.
    """
    check_batch(X=X)
    module = model_fn.module
    with ONE_THREAD:
        # The trace before holds as long as nothing has changed but the trained parameters.
        trained = {id(p) for p in params.values()}
        tensors = (*module.parameters(), *module.buffers())
        untrained = [tensor for tensor in tensors if id(tensor) not in trained]
        fingerprint = list(_fingerprint(module, trained, params, X))
        if (
            before is not None
            and _all_alike(equal, before.untrained, untrained)
            and _all_alike(_is_same, before.fingerprint, fingerprint)
        ):
            return before
        # Trace the module, or call it as it is where that fails.
        traced, slow = _with_layers(model_fn, params, X)
        return TracedModule(traced, fingerprint, [t.detach().clone() for t in untrained], slow)


def _with_layers(model_fn: ModelFn, params: PyTree, X: PyTree) -> tuple[ModelFn, str | None]:
    """Return a module as a function with layers, or as it is and why it has none."""
    try:
        return prepare(model_fn, params, X), None
    except Untraceable as reason:
        outputs = evaluate(model_fn, params, take(X, slice(0, 1)), None).outputs
        count = outputs.numel() * sample_count(X)
        tiny = is_tiny(count, parameter_count(params))
        return model_fn, "" if tiny else no_layers(reason)


def _fingerprint(
    module: nn.Module, trained: set[int], params: PyTree, X: PyTree
) -> Iterator[object]:
    """Yield all that a trace depends on, except the values of the module's tensors."""
    # One sample of the batch: structure, shapes, dtypes and devices.
    leaves, structure = tree_flatten(X)
    yield structure
    for leaf in leaves:
        yield from (leaf.shape[1:], leaf.dtype, leaf.device)
    # The trained parameters, without their values.
    for name, p in params.items():
        yield from (name, p.shape, p.dtype, p.device)
    # Whether torch rounds on purpose.
    device = leaves[0].device.type
    yield from (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    # The attributes of all submodules.
    for submodule in module.modules():
        for name, value in vars(submodule).items():
            if name.startswith("_flat_weight"):  # a recurrent layer's parameters once more
                continue
            yield name
            # Of parameters and buffers the names alone: their values are passed to the trace, or
            # compared by `traced_module`.
            of_tensors = name in {"_parameters", "_buffers"}
            yield from _comparable_parts(list(value.keys()) if of_tensors else value, trained)


def _comparable_parts(value: object, trained: set[int]) -> Iterator[object]:
    """Yield the objects in an attribute, with the containers taken apart."""
    if isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from _comparable_parts(item, trained)
    elif isinstance(value, dict):
        yield from value
        yield from _comparable_parts(list(value.values()), trained)
    else:
        yield value
        # A tensor that is written to in place stays the same object, but counts the writes.
        if isinstance(value, Tensor) and id(value) not in trained:
            yield writes(value)


def _all_alike(
    alike: Callable[[Any, Any], bool], before: Sequence[object], now: Sequence[object]
) -> bool:
    """Return whether two sequences are equally long, and alike item by item."""
    return len(before) == len(now) and all(map(alike, before, now))


def _is_same(before: object, now: object) -> bool:
    """Return whether two objects are one, or equal where values are compared."""
    return before is now or (
        type(before) is type(now) and isinstance(before, COMPARED_BY_VALUE) and before == now
    )
