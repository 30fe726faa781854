"""A graph without what need not be computed again: constants, and operations that come twice.

The derivatives inside a physics-informed loss repeat the forward pass, and start from constants:
unit vectors, zeros. Under ``vmap`` every operation costs, however small its tensors are.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ddnewton.transforms import untransformed

CONSTANT_ENTRIES = 2**20
"""Up to how many entries a tensor that depends on no input is kept, rather than made anew."""


def simplified(graph: GraphModule) -> GraphModule:
    """Return a copy that computes the same, its constants beforehand and nothing twice."""
    copy = Graph()
    copies: dict[Node, Node] = {}
    constants: dict[Node, Any] = {}  # values that depend on no input
    named: dict[str, Tensor] = {}  # those that the copy refers to
    equal: dict[str, Node] = {}  # operations by what they are and what they are of

    def copied(node: Node) -> Node:
        """Return the copy of a node; of a constant one that refers to its value."""
        if node not in copies:
            name = f"constant_{len(named)}"
            named[name], copies[node] = constants[node], copy.get_attr(name)
        return copies[node]

    for node in graph.graph.nodes:
        # A constant that is small enough is computed now.
        if node.op == "get_attr":
            constants[node] = getattr(graph, str(node.target))
            continue
        pure = node.op == "call_function" and _is_pure(node.target)
        if pure and all(source in constants for source in node.all_input_nodes):
            value = _computed(node, constants)
            if _is_small(value):
                constants[node] = value
                continue
        # Any other operation is copied, unless it has been.
        args, kwargs = map_arg(node.args, copied), map_arg(node.kwargs, copied)
        what = f"{node.target} {args} {kwargs}"
        if not pure or what not in equal:
            equal[what] = copy.create_node(node.op, node.target, args, kwargs)
        copies[node] = equal[what]
    copy.eliminate_dead_code()
    return GraphModule(named, copy)


def _is_pure(target: Any) -> bool:
    """Return whether an operation gives the same for the same, and writes to nothing."""
    if not isinstance(target, OpOverload):
        return target is operator.getitem
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _computed(node: Node, constants: dict[Node, Any]) -> Any:
    """Return the result of an operation on constants."""
    assert callable(node.target)
    args: Any = map_arg(node.args, constants.__getitem__)
    kwargs: Any = map_arg(node.kwargs, constants.__getitem__)
    with untransformed(), torch.inference_mode(False), torch.no_grad():
        return node.target(*args, **kwargs)


def _is_small(value: Any) -> bool:
    """Return whether a result, one tensor or several, is worth keeping."""
    parts = value if isinstance(value, (tuple, list)) else [value]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return len(tensors) == len(parts) and sum(x.numel() for x in tensors) <= CONSTANT_ENTRIES
