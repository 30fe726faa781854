"""Work with the transforms of torch.func: look inside ``vmap``, replace it where it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import vjp

from ddnewton.errors import BadValue, sentence
from ddnewton.host_reads import answer, answered_later
from ddnewton.trees import sample_count, tree_leaves, tree_map
from ddnewton.types import PyTree

logger = logging.getLogger(__name__)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the plain tensor below every ``vmap`` and ``grad``.

    Under ``vmap`` over an ensemble, it has all members along one axis.
    """
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach() if tensor.requires_grad else tensor


def is_batched(tensor: Tensor) -> bool:
    """Return whether no branch may depend on the values: under ``vmap``, or while compiling."""
    if torch.compiler.is_compiling():
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def first_member(tensor: Tensor) -> Tensor:
    """Return the plain tensor, of the first member where ``vmap`` maps over an ensemble."""
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(tensor):
        batched = _functorch.is_batchedtensor(tensor)
        axis = _functorch.maybe_get_bdim(tensor) if batched else None
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor.select(axis, 0) if axis is not None else tensor
    return tensor.detach()


def any_possible(mask: Tensor) -> bool:
    """Return whether an entry is true, or cannot be known to be false, as under ``vmap``."""
    return is_batched(mask) or answered_later() or bool(mask.any())


def scaled(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return ``matrix * factor``, in the memory of the matrix where possible.

    The caller must not use the matrix again. For large matrices new memory is what costs time.
    ``vmap`` refuses to write a mapped factor into a matrix that may not be mapped.
    """
    return matrix * factor if is_batched(factor) else matrix.mul_(factor)


def summed(matrix: Tensor, addend: Tensor) -> Tensor:
    """Return ``matrix + addend``, in the memory of the matrix where possible, as `scaled`."""
    return matrix + addend if is_batched(addend) else matrix.add_(addend)


def concatenated(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Return the parts as one tensor; a single part without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def any_known(mask: Tensor | bool) -> bool:
    """Return whether an entry is true, of any member under ``vmap``; False while compiling."""
    if not isinstance(mask, Tensor):
        return bool(mask)
    return not torch.compiler.is_compiling() and answer(unwrapped(mask))


def any_not_finite(*tensors: Tensor) -> bool:
    """Return whether an entry of some tensors is known to be nan or infinite.

    A sum that is finite is one of finite numbers, and takes a single pass.
    """
    total = reduce(torch.add, (tensor.sum() for tensor in tensors))
    return any_known(total * 0 != 0) and any(any_known(~x.isfinite()) for x in tensors)


def untransformed() -> AbstractContextManager[object]:
    """Return a context outside every transform, to draw the same random numbers for all members."""
    if torch.compiler.is_compiling():
        return nullcontext()
    cleared: AbstractContextManager[object] = temporarily_clear_interpreter_stack()
    return cleared


def without_autocast(params: PyTree) -> AbstractContextManager[object]:
    """Return a context in which nothing is cast to fewer digits where the parameters are."""
    device = tree_leaves(params)[0].device.type
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def linear_map(
    function: Callable[..., tuple[Tensor, PyTree]], *primals: Tensor
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]], PyTree]:
    """Return a function's value, its pullback, and its auxiliary outputs.

    The pullback takes several cotangents, stacked on axis 0. Plain autograd takes half the time of
    `torch.func.vjp`, and functions that this refuses. Under ``vmap``, and with constants that were
    made in inference mode, it is `torch.func.vjp`.
    """
    if is_transformed():
        return _by_vjp(function, *primals)
    try:
        return _by_autograd(function, *primals)
    except RuntimeError:
        if not torch.is_inference_mode_enabled():
            raise
        return _by_vjp(function, *primals)


def _by_vjp(
    function: Callable[..., tuple[Tensor, PyTree]], *primals: Tensor
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]], PyTree]:
    """Return a linear map by `torch.func.vjp`."""
    value, pull, auxiliary = vjp(function, *primals, has_aux=True)  # type: ignore[misc]

    def pullback(cotangents: Tensor) -> list[Tensor]:
        if cotangents.shape[0] > 1:
            return list(vmap(pull)(cotangents))
        return [pulled[None] for pulled in pull(cotangents[0])]  # vmap knows not every operation

    return value, pullback, auxiliary


def _by_autograd(
    function: Callable[..., tuple[Tensor, PyTree]], *primals: Tensor
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]], PyTree]:
    """Return a linear map by plain autograd."""
    # The forward pass, with the primals as leaves of a graph of their own.
    with torch.inference_mode(False), torch.enable_grad(), without_saving_hooks():
        inputs = [plain_tensor(primal).detach().requires_grad_() for primal in primals]
        value, auxiliary = function(*inputs)
        # A sum whose slope at the value is replaced by the cotangent: passed to autograd.grad it
        # would cost the first step of a process seconds, for the import of sympy.
        replaced = value.view_as(value)
        total = replaced.sum()
    cotangent: list[Tensor] = []
    if total.requires_grad:
        replaced.register_hook(lambda _: cotangent[0])

    def pulled(u: Tensor) -> list[Tensor]:
        """Return Jᵀu; zeros where the value does not depend on a primal."""
        cotangent[:] = [u]
        if not total.requires_grad:
            return list(map(torch.zeros_like, primals))
        with torch.inference_mode(False):
            parts = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
        cotangent.clear()
        # The gradient of an embedding may be sparse.
        dense = (p.to_dense() if p is not None and p.layout != torch.strided else p for p in parts)
        pairs = zip(primals, dense, strict=True)
        return [torch.zeros_like(x) if p is None else p for x, p in pairs]

    def pullback(cotangents: Tensor) -> list[Tensor]:
        """Return Jᵀu for every cotangent u; of a single one without ``vmap``, which is cheaper."""
        cotangents = plain_tensor(cotangents)
        if cotangents.shape[0] == 1:
            return [part[None] for part in pulled(cotangents[0])]
        return list(vmap(pulled)(cotangents))

    return value.detach(), pullback, tree_map(torch.detach, auxiliary)


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may record: a copy, if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def without_saving_hooks() -> Iterator[None]:
    """Save for the backward pass what the forward pass has computed, without hooks.

    A checkpoint computes it anew in the backward pass, when `torch.func.functional_call` has put
    the module's own parameters back: the derivatives would be those at other parameters.
    """
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


def is_transformed() -> bool:
    """Return whether a transform of torch.func, or a compilation, is under way."""
    return torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None


def check_not_transformed(what: str) -> None:
    """Refuse an argument inside of a transform, which passes no values to other places."""
    if is_transformed():
        rule, got = f"{what} must be outside of torch.func and torch.compile", "a call inside"
        raise BadValue(sentence(rule, got, "Loop over the members of an ensemble."))


def vmap(
    function: Callable[..., PyTree],
    in_dims: int | tuple[int | None, ...] = 0,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """Return `torch.func.vmap` of a function, silent where an operation has no batching rule.

    torch loops over the batch there, and warns. Its switch cannot be read; it is on by default, and
    is on again after the outermost call.
    """
    mapped = torch.func.vmap(function, in_dims, chunk_size=chunk_size)

    def silent(*args: PyTree) -> Any:
        if is_transformed():
            return mapped(*args)
        _functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
        try:
            return mapped(*args)
        finally:
            _functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]

    return silent


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
