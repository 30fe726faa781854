"""A model as a graph of operations on one sample, whatever its code looks like.

The graph is taken below every transform and module (`make_fx` after dispatch), from real tensors
where that works, and for a single sample: ``vmap`` maps it over a batch of any size. A trace of the
batch would have its number of samples baked in, and a trace above dispatch loses what an inner
``vmap`` maps over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ddnewton.inputs.checks import check_sample_axis
from ddnewton.linearize.structured.rules import DECOMPOSITIONS, aten
from ddnewton.linearize.widening import map_constants
from ddnewton.process import ONE_THREAD
from ddnewton.transforms import first_member
from ddnewton.trees import as_batch, tree_flatten, tree_unflatten
from ddnewton.types import ModelFn, PyTree

DETACHING = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
"""The functions by which a model makes a constant of what it has computed."""


def trace(function: ModelFn, params: PyTree, x: PyTree) -> GraphModule:
    """Return ``graph(*leaves of params, *leaves of x) -> outputs`` of one sample.

    What cannot be traced raises an error of torch's: a branch on data, say, or ``.item()``.
    """
    leaves, spec = tree_flatten((params, x))
    # One tensor under two names would come out as one input.
    leaves = [first_member(leaf).clone() for leaf in leaves]

    def of_sample(*leaves: Tensor) -> Tensor:
        params, x = tree_unflatten(leaves, spec)
        with MarkDetached():
            outputs = function(params, as_batch(x))
        check_sample_axis(outputs, 1)
        return outputs[0]

    with ONE_THREAD, _plain_kernels(), torch.no_grad():
        graph = _tidy(_detached_where_marked(_graph(of_sample, leaves)))
        if any(map(_writes, graph.graph.nodes)):
            # Writing into a tensor that is the same for all samples does not survive vmap.
            graph = make_fx(functionalize(graph))(*leaves)
            ShapeProp(graph).propagate(*leaves)
        graph = _tidy(_differentiable(graph))
    map_constants(graph, lambda constant: constant.detach().clone())
    return graph


class MarkDetached(TorchFunctionMode):
    """Mark, by a copy, what a model detaches.

    A derivative inside a model, by `torch.autograd.grad`, detaches what it has saved, and the trace
    would take that for a constant.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return aten.detach_copy.default(result) if func in DETACHING else result


def _detached_where_marked(graph: GraphModule) -> GraphModule:
    """Detach what a model detaches, and nothing else."""
    for node in graph.graph.nodes:
        if node.target == aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target == aten.detach_copy.default:
            node.target = aten.detach.default
    return graph


def _graph(of_sample: Callable[..., Tensor], leaves: Sequence[Tensor]) -> GraphModule:
    """Return the operations of a function on tensors with values or, where these fail, without.

    A function may look at values only to choose a shortcut, and ask whether it is being traced:
    tensors without values, on which it cannot look, tell it so. Whether what it does then is the
    same is for the caller to see.
    """
    try:
        return make_fx(of_sample, DECOMPOSITIONS)(*leaves)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        with suppress(Exception):  # the first error is about the function, this about our attempt
            fake = make_fx(of_sample, DECOMPOSITIONS, "fake", _allow_non_fake_inputs=True)
            return fake(*leaves)
        raise


def _tidy(graph: GraphModule) -> GraphModule:
    """Drop the operations whose results are not used, and compile the graph anew."""
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _writes(node: Node) -> bool:
    """Return whether an operation writes to its arguments."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def _differentiable(graph: GraphModule) -> GraphModule:
    """Replace the operations from functionalized writes that ``vmap`` or autograd get wrong."""
    nodes, call = graph.graph.nodes, graph.graph.call_function
    for node in nodes:
        with graph.graph.inserting_before(node):
            if node.target in (aten.copy.default, aten.fill.Tensor):
                # As a sum with zeros, which broadcasts as a copy does.
                to, source = node.args[:2]
                new = call(aten.add.Tensor, (call(aten.zeros_like.default, (to,)), source))
            elif node.target == aten.select_scatter.default:
                # Under vmap, torch 2.13 pulls back twice what is written to an unmapped tensor.
                to, source, axis, place = node.args
                place %= to.meta["tensor_meta"].shape[axis]
                source = call(aten.unsqueeze.default, (source, axis))
                new = call(aten.slice_scatter.default, (to, source, axis, place, place + 1))
            elif node.target == aten.slice_scatter.default:
                # Nor does it know, under vmap, a slice without a start or an end.
                to, source, axis, *ends = (*node.args, 0)[: max(3, len(node.args))]
                start, stop, step = slice(*ends).indices(to.meta["tensor_meta"].shape[axis])
                new = call(aten.slice_scatter.default, (to, source, axis, start, stop, step))
            elif node.target == aten.fill.Scalar:
                new = call(aten.full_like.default, node.args)
            else:
                continue
        new.meta = node.meta
        node.replace_all_uses_with(new)
    return graph


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Compute attention and recurrent layers by operations that have all derivatives."""
    fast, kernels = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = kernels
