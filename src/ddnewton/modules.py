"""A module as a function of its parameters, for as long as the rest of it stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from ddnewton.buffers import writes
from ddnewton.structured.prepare import Untraceable, prepare
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


class Known(NamedTuple):
    """A function with its layers found, and what it holds for."""

    model_fn: ModelFn
    likeness: object
    frozen: tuple[Tensor, ...]  # kept, so that their identities stay theirs


def known(
    before: Known | None, model_fn: ModelFn, module: nn.Module, params: PyTree, X: PyTree
) -> Known:
    """Return the function with its layers found: what was found before, where that still holds.

    It does not where samples have another shape, or where the module has other buffers, frozen
    parameters or modes. A module that cannot be traced is its own function.
    """
    trained = {id(p) for p in params.values()}
    tensors = (*module.parameters(), *module.buffers())
    frozen = tuple(tensor for tensor in tensors if id(tensor) not in trained)
    leaves, structure = tree_flatten(X)
    likeness = (
        structure,
        [(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves],
        [(name, p.shape, p.dtype, p.device) for name, p in params.items()],
        [(id(tensor), writes(tensor)) for tensor in frozen],
        [part.training for part in module.modules()],
    )
    if before is not None and before.likeness == likeness:
        return before
    try:
        found: ModelFn = prepare(model_fn, params, X)
    except Untraceable as reason:
        logger.info("the layers of the module are not found: %s", reason)
        found = model_fn
    return Known(found, likeness, frozen)
