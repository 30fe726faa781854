"""A module as a function of its parameters, for as long as the rest of it stays as it is."""

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
    """A module that is called in another way than by its inputs alone."""

    def __init__(self, module: nn.Module, way: Forward) -> None:
        super().__init__()
        self.module = module
        self.way = way

    def forward(self, X: PyTree) -> Tensor:
        """Return the outputs."""
        return self.way(self.module, X)


def as_function(module: nn.Module, forward: Forward | None) -> ModelFn:
    """Return a module as a function of parameters, by their names, and a batch."""
    if forward is None:
        return lambda params, X: functional_call(module, params, (X,))
    called = Called(module, forward)

    def model_fn(params: PyTree, X: PyTree) -> Tensor:
        inside = {f"module.{name}": p for name, p in params.items()}
        outputs: Tensor = functional_call(called, inside, (X,))
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
"""What is compared by value; everything else a module holds is compared by identity."""


class Known(NamedTuple):
    """A function with its layers found, and what it holds for."""

    model_fn: ModelFn
    likeness: list[object]
    frozen: list[Tensor]  # copies: what is written through .data leaves no other trace


def known(
    before: Known | None, model_fn: ModelFn, module: nn.Module, params: PyTree, X: PyTree
) -> Known:
    """Return the function with its layers found: what was found before, where that still holds.

    It does not where samples have another shape, or where the module is no longer what it was: has
    other buffers, frozen parameters, parts, attributes, hooks or modes. A module that cannot be
    traced is its own function.
    """
    trained = {id(p) for p in params.values()}
    tensors = (*module.parameters(), *module.buffers())
    frozen = [tensor for tensor in tensors if id(tensor) not in trained]
    if (
        before is not None
        and _all(equal, before.frozen, frozen)
        and _all(_same, before.likeness, list(_likeness(module, trained, params, X)))
    ):
        return before
    try:
        found: ModelFn = prepare(model_fn, params, X)
    except Untraceable as reason:
        logger.info("the layers of the module are not found: %s", reason)
        found = model_fn
    # Looked at after its calls, which it may count, or keep something of.
    likeness = list(_likeness(module, trained, params, X))
    return Known(found, likeness, [tensor.detach().clone() for tensor in frozen])


def _likeness(module: nn.Module, trained: set[int], params: PyTree, X: PyTree) -> Iterator[object]:
    """Yield what a trace depends on, besides the values of buffers and frozen parameters."""
    leaves, structure = tree_flatten(X)
    yield structure
    for leaf in leaves:
        yield from (leaf.shape[1:], leaf.dtype, leaf.device)
    for name, p in params.items():
        yield from (name, p.shape, p.dtype, p.device)
    device = leaves[0].device.type
    yield from (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    for part in module.modules():
        for name, value in vars(part).items():
            if name.startswith("_flat_weight"):  # a recurrent layer's parameters once more
                continue
            yield name
            # Names alone of what is compared by value, or is passed.
            of_tensors = name in {"_parameters", "_buffers"}
            yield from _parts([*value] if of_tensors else value, trained)


def _parts(value: object, trained: set[int]) -> Iterator[object]:
    """Yield what an attribute consists of."""
    if isinstance(value, (list, tuple)):
        yield len(value)
        for each in value:
            yield from _parts(each, trained)
    elif isinstance(value, dict):
        yield from value
        yield from _parts(list(value.values()), trained)
    else:
        yield value
        if isinstance(value, Tensor) and id(value) not in trained:
            yield writes(value)


def _all(
    alike: Callable[[Any, Any], bool], some: Sequence[object], others: Sequence[object]
) -> bool:
    return len(some) == len(others) and all(map(alike, some, others))


def _same(one: object, other: object) -> bool:
    return one is other or (
        type(one) is type(other) and isinstance(one, COMPARED_BY_VALUE) and one == other
    )
