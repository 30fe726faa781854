"""The same function in float64: how a function, or a graph, is made to compute in it.

Buffers, constants and casts inside a model are in the way of float64. In a function a
`TorchFunctionMode` widens every tensor that an operation takes or gives; in a graph the dtypes that
operations name and the constants that they refer to are replaced. A cast to fewer digits than the
model's own, by hand or by autocast, rounds no longer, and is reported. Whether the result is used
is decided in precision.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from ddnewton.types import PyTree

CASTS = {"to", "type", "type_as", "float", "half", "bfloat16"}


class Widen(TorchFunctionMode):
    """Give every operation float64 tensors in place of narrower ones, and pass on no others.

    Results are widened as well, so that what is written into a new tensor is not lost in a copy
    of it; a cast to a narrower dtype returns what it was given, or a copy of it, as the cast would
    have in the model's own dtype. ``rounded`` tells whether there were casts below that, by hand
    or by autocast.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.rounded = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args = tuple(map(widen_leaf, args))
        result = func(*args, **{k: widen_leaf(v) for k, v in (kwargs or {}).items()})
        self.rounded |= any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        if getattr(func, "__name__", "") in CASTS and _narrower(result, args[0]):
            self.rounded |= result.dtype.itemsize < self.dtype.itemsize
            source = args[0].to(result.device)
            return source if result.dtype == self.dtype else source.clone()
        return widen_leaf(result)


def in_float64(function: Callable[..., Tensor], mode: Widen | None = None) -> Callable[..., Tensor]:
    """Return a function that computes in float64, whatever its arguments are."""
    mode = mode or Widen()

    def wide(*args: PyTree) -> Tensor:
        with mode:
            return function(*args)

    return wide


def widen_leaf(leaf: Any) -> Any:
    """Return a narrow floating-point tensor in float64, anything else as it is."""
    # A second .double() would be a view, and inside functorch not the tensor that was written to.
    if isinstance(leaf, Tensor):
        narrow = leaf.is_floating_point() and leaf.dtype != torch.float64
        return leaf.double() if narrow else leaf
    if type(leaf) in (list, tuple):
        return type(leaf)(map(widen_leaf, leaf))
    return leaf


def cast_rounding(result: Any, sources: Iterable[Any]) -> float:
    """Return the eps of a result that has fewer digits than what it was made of, 0 otherwise."""
    if not (isinstance(result, Tensor) and result.is_floating_point()):
        return 0.0
    eps = torch.finfo(result.dtype).eps
    floats = (x.dtype for x in sources if isinstance(x, Tensor) and x.is_floating_point())
    return eps if any(torch.finfo(dtype).eps < eps for dtype in floats) else 0.0


def _narrower(result: Any, source: Any) -> bool:
    """Return whether a cast lost digits."""
    floats = all(isinstance(x, Tensor) and x.is_floating_point() for x in (result, source))
    return floats and result.dtype.itemsize < source.dtype.itemsize


def widened_graph(graph: GraphModule, dtype: torch.dtype) -> tuple[GraphModule, bool]:
    """Return a copy that computes in float64, and whether the graph rounds below ``dtype``."""
    rounded = False

    def widened_dtype(argument: Any) -> Any:
        nonlocal rounded
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            rounded |= argument.itemsize < dtype.itemsize
            return torch.float64
        return torch.complex128 if argument == torch.complex64 else argument

    # Copy the graph, for its operations are changed in place.
    copy = plain_copy(graph)
    # Widen every dtype among the arguments of an operation, and every constant.
    for node in copy.graph.nodes:
        if node.target == torch.ops.aten._softmax.default:  # which may go from half to float32
            node.args = (*node.args[:2], False)
        node.args = map_aggregate(node.args, widened_dtype)
        node.kwargs = map_aggregate(node.kwargs, widened_dtype)
    map_constants(copy, widen_leaf)
    copy.recompile()
    return copy, rounded


def plain_copy(graph: GraphModule) -> GraphModule:
    """Return a copy of a graph that does not know how it was traced."""
    nodes = Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    return GraphModule(graph, nodes)


def map_constants(graph: GraphModule, function: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensors that a graph refers to, be they parameters, buffers or others."""
    for name in {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
        constant = getattr(graph, name)
        if isinstance(constant, Tensor):
            delattr(graph, name)
            with torch.inference_mode(False):  # or autograd would refuse it
                graph.register_buffer(name, function(constant))
