"""Where torch.func's transforms show: looking inside ``vmap``, and mapping what it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import vjp, vmap

from ddnewton.trees import sample_count, tree_map
from ddnewton.types import PyTree

logger = logging.getLogger(__name__)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor below every ``vmap`` and ``grad``: an ensemble's members at once."""
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach()


def is_batched(tensor: Tensor) -> bool:
    """Return whether values cannot steer: a ``vmap`` around maps over them, or all is compiled."""
    if torch.compiler.is_compiling():
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def first_member(tensor: Tensor) -> Tensor:
    """Return the plain tensor of an ensemble's first member."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        batched = _functorch.is_batchedtensor(tensor)
        axis = _functorch.maybe_get_bdim(tensor) if batched else None
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor.select(axis, 0) if axis is not None else tensor
    return tensor.detach()


def any_possible(mask: Tensor) -> bool:
    """Return whether an entry is true, or may be: under ``vmap`` nobody can tell."""
    return is_batched(mask) or bool(mask.any())


def scaled(own: Tensor, factor: Tensor) -> Tensor:
    """Return a product in the place of its first factor, one's own, where that may be written to.

    What large matrices cost is new memory; ``vmap`` refuses to write what it maps over elsewhere.
    """
    return own * factor if is_batched(factor) else own.mul_(factor)


def summed(own: Tensor, other: Tensor) -> Tensor:
    """Return a sum in the place of its first term, one's own, where that may be written to."""
    return own + other if is_batched(other) else own.add_(other)


def any_known(mask: Tensor) -> bool:
    """Return whether an entry is known to be true, of any member; what is compiled is not known."""
    return not torch.compiler.is_compiling() and bool(unwrapped(mask).any())


def untransformed() -> AbstractContextManager[object]:
    """Return a context outside of every transform, where random numbers are drawn once for all."""
    if torch.compiler.is_compiling():
        return nullcontext()
    cleared: AbstractContextManager[object] = temporarily_clear_interpreter_stack()
    return cleared


def linear_map(
    function: Callable[..., tuple[Tensor, PyTree]], *primals: Tensor
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]], PyTree]:
    """Return a function's value, its pullback of several cotangents at once, and what it adds.

    This is `torch.func.vjp` under ``vmap``, which autograd alone does in half the time where it
    may: with no transform around, and no inference mode.
    """
    if not _is_plain():
        value, pull, added = vjp(function, *primals, has_aux=True)  # type: ignore[misc]
        return value, lambda cotangents: list(vmap(pull)(cotangents)), added
    with torch.enable_grad():
        inputs = [primal.detach().requires_grad_() for primal in primals]
        value, added = function(*inputs)

    def pullback(cotangents: Tensor) -> list[Tensor]:
        def zeros(primal: Tensor) -> Tensor:
            return primal.new_zeros(cotangents.shape[0], *primal.shape)

        if not value.requires_grad:
            return list(map(zeros, primals))
        alone = cotangents.shape[0] == 1  # cheaper without a batch of one
        pulled = torch.autograd.grad(
            value,
            inputs,
            cotangents[0] if alone else cotangents,
            retain_graph=True,
            is_grads_batched=not alone,
            allow_unused=True,
        )
        found = (p[None] if alone and p is not None else p for p in pulled)
        return [zeros(x) if p is None else p for x, p in zip(primals, found, strict=True)]

    return value.detach(), pullback, tree_map(torch.detach, added)


def _is_plain() -> bool:
    """Return whether autograd records what is computed, and nothing else is around."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return _functorch.peek_interpreter_stack() is None


def over_samples(function: Callable[..., PyTree], *batches: PyTree) -> PyTree:
    """Map a function of one sample over axis 0: by ``vmap``, or in a loop where ``vmap`` cannot.

    ``vmap`` refuses data-dependent branches, ``.item()`` and a few layers, such as recurrent
    cells; a loop takes them, more slowly.
    """
    try:
        return vmap(function)(*batches)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as reason:
        logger.info("vmap over samples failed, going sample by sample: %s", reason)
        return one_by_one(function, *batches)


def one_by_one(function: Callable[..., PyTree], *batches: PyTree) -> PyTree:
    """Map a function of one sample over axis 0, in a loop."""
    results = [
        function(*(tree_map(lambda x, n=n: x[n], batch) for batch in batches))
        for n in range(sample_count(batches))
    ]
    return tree_map(lambda *parts: torch.stack(parts), *results)
