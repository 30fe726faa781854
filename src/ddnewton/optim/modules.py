"""A module as a pure function of its trained parameters, traced anew when the module changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddnewton.linearize.buffers import equal, writes
from ddnewton.linearize.structured.prepare import Untraceable, prepare
from ddnewton.trees import TreeSpec, tree_flatten
from ddnewton.types import ModelFn, PyTree

logger = logging.getLogger(__name__)

Forward = Callable[[Any, Any], Tensor]
"""``forward(module, X) -> outputs``."""


class Called(nn.Module):
    """A module that is called by a function of the user, ``forward(module, X)``."""

    def __init__(self, module: nn.Module, way: Forward) -> None:
        super().__init__()
        self.module = module
        self.way = way

    def forward(self, X: PyTree) -> Tensor:
        """Return the outputs."""
        return self.way(self.module, X)


def as_function(module: nn.Module, forward: Forward | None) -> ModelFn:
    """Return a module as a function of named parameters and a batch."""
    if forward is None:
        return lambda params, X: functional_call(module, params, (X,))
    called = Called(module, forward)

    def model_fn(params: PyTree, X: PyTree) -> Tensor:
        prefixed = {f"module.{name}": p for name, p in params.items()}
        outputs: Tensor = functional_call(called, prefixed, (X,))
        return outputs

    return model_fn


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


def traced_module(
    before: TracedModule | None, model_fn: ModelFn, module: nn.Module, params: PyTree, X: PyTree
) -> TracedModule:
    """Return a module as a function with known layers: the one before, while it is still right.

    It is not where samples have another shape, or where the module has changed: other buffers,
    untrained parameters, submodules, attributes, hooks or modes. For a module that cannot be traced
    the function is ``model_fn``, without layers.
    """
    # The trace before holds as long as nothing has changed but the trained parameters.
    trained = {id(p) for p in params.values()}
    tensors = (*module.parameters(), *module.buffers())
    untrained = [tensor for tensor in tensors if id(tensor) not in trained]
    if (
        before is not None
        and _all_alike(equal, before.untrained, untrained)
        and _all_alike(_is_same, before.fingerprint, list(_fingerprint(module, trained, params, X)))
    ):
        return before
    # Trace the module, or call it as it is where that fails.
    try:
        traced: ModelFn = prepare(model_fn, params, X)
    except Untraceable as reason:
        logger.info("the layers of the module are not found: %s", reason)
        traced = model_fn
    # The fingerprint is taken after the calls of the trace: the module may count them, or store
    # something.
    fingerprint = list(_fingerprint(module, trained, params, X))
    return TracedModule(traced, fingerprint, [tensor.detach().clone() for tensor in untrained])


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
            yield from _comparable_parts([*value] if of_tensors else value, trained)


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
