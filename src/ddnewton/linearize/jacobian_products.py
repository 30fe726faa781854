"""The Jacobian of a model as a linear map that is never formed: J v and Jᵀu, by plain autograd.

The pullback u ↦ Jᵀu is linear in u. So its own pullback is v ↦ J v, whatever u is: one graph of the
model, and one of its pullback at u = 0, give both products for as many vectors as are asked for.
This takes what forward mode refuses, such as derivatives inside of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddnewton.process import ONE_THREAD
from ddnewton.transforms import plain_tensor, unwrapped, without_saving_hooks
from ddnewton.trees import tree_leaves


class Products(NamedTuple):
    """The outputs of some samples, and products with their Jacobian J along some leaves.

    ``push`` returns J v for a vector v given leaf by leaf, and ``pull`` returns Jᵀu leaf by leaf;
    both are in the dtype of the model.
    """

    outputs: Float[Tensor, "n ..."]
    push: Callable[[Sequence[Tensor]], Float[Tensor, "n c"]]
    pull: Callable[[Float[Tensor, "n c"]], list[Tensor]]


def products_of(
    function: Callable[[Sequence[Tensor]], Tensor], leaves: Sequence[Tensor], wanted: Sequence[int]
) -> Products:
    """Return the products of a function of all leaves with its Jacobian along the wanted ones."""
    # The outputs, with a graph along the wanted leaves.
    with _differentiable_kernels(), torch.inference_mode(False), torch.enable_grad():
        # Of all leaves, along which a model may differentiate inside.
        arguments = [plain_tensor(leaf).detach().requires_grad_() for leaf in leaves]
        primals = [arguments[leaf] for leaf in wanted]
        outputs = function(arguments)
    depends, shape = outputs.requires_grad, outputs.shape

    # The pullback of a cotangent, with a graph along that, once it is asked for.
    @cache
    def pullback() -> tuple[Tensor, dict[int, Tensor]]:
        with _differentiable_kernels(), torch.inference_mode(False), torch.enable_grad():
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            if not depends:
                return cotangent, {}
            pulled = _backward([outputs], primals, [cotangent], create_graph=True)
        images = {i: part for i, part in enumerate(pulled) if part is not None}
        return cotangent, {i: part for i, part in images.items() if part.requires_grad}

    def push(vector: Sequence[Tensor]) -> Float[Tensor, "n c"]:
        cotangent, images = pullback()
        if not images:
            return outputs.new_zeros(shape[0], outputs[0].numel())
        parts = [_aligned(vector[i]) for i in images]
        with torch.inference_mode(False):
            (pushed,) = _backward(list(images.values()), [cotangent], parts)
        if pushed is None:
            raise RuntimeError("a derivative of the model has no derivative of its own")
        return pushed.detach().reshape(shape[0], -1)

    def pull(u: Float[Tensor, "n c"]) -> list[Tensor]:
        if not depends:
            return [torch.zeros_like(primal) for primal in primals]
        with torch.inference_mode(False):
            parts = _backward([outputs], primals, [_aligned(u.reshape(shape))])
        pairs = zip(primals, parts, strict=True)
        return [torch.zeros_like(x) if part is None else _dense(part) for x, part in pairs]

    return Products(outputs.detach(), push, pull)


def _backward(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return Σ Jᵀu of some outputs and their cotangents u for every input, None where it is unused.

    It is `torch.autograd.grad` with the graph retained, and without the import of sympy, which
    would cost the first call of a process seconds.
    """
    results: tuple[Tensor | None, ...] = _engine_run_backward(
        tuple(outputs),
        tuple(cotangents),
        True,  # retain_graph
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return results


def graph_bytes(function: Callable[[Sequence[Tensor]], Tensor], leaves: Sequence[Tensor]) -> int:
    """Return how many bytes the graph of a function of some leaves keeps, besides these."""
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # By what autograd keeps, as it keeps it; derivatives inside by torch.func take no hooks, and
    # the graph is looked through afterwards.
    with torch.inference_mode(False), torch.enable_grad(), _attention_by_products():
        arguments = [plain_tensor(leaf).detach().requires_grad_() for leaf in leaves]
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = function(arguments)
        except RuntimeError:
            outputs = function(arguments)
            sizes = _saved_sizes(outputs)
    return outputs.nbytes + sum(size for place, size in sizes.items() if place not in given)


def _saved_sizes(outputs: Tensor) -> dict[int, int]:
    """Return the sizes of all that the graph of some outputs has saved, by where these are."""
    sizes: dict[int, int] = {}
    nodes, visited = [outputs.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        nodes += [further for further, _ in node.next_functions]
        # Tensors are attributes of a node, or lists of them are.
        for name in dir(node):
            if name.startswith("_saved_"):
                saved = tree_leaves(getattr(node, name))
                sizes |= dict(_placed(unwrapped(x)) for x in saved if isinstance(x, Tensor))
    return sizes


def _placed(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor is, and its size; one that is dead for torch.func is by itself."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except RuntimeError:
        return id(tensor), tensor.numel() * tensor.element_size()


def _aligned(part: Tensor) -> Tensor:
    """Return a tensor that may be viewed as pairs, of complex numbers: a copy where it may not."""
    return part.clone() if part.storage_offset() % 2 else part


def _dense(part: Tensor) -> Tensor:
    """Return a gradient as a dense tensor: that of an embedding may be sparse."""
    return part if part.layout == torch.strided else part.to_dense()


@contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """Compute attention by operations that have two derivatives, and no checkpoint anew."""
    with _attention_by_products(), without_saving_hooks():
        yield


@contextmanager
def _attention_by_products() -> Iterator[None]:
    """Compute attention by products of matrices, which have all derivatives."""
    with ONE_THREAD, sdpa_kernel(SDPBackend.MATH):
        yield
