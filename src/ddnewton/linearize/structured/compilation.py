"""From the graph of a model to its program: its layers, and the graph that returns their parts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ddnewton.linearize.structured.program import Layer, Part, Path, Program, Site, SummedLeaf
from ddnewton.linearize.structured.rules import DTYPE, SHAPE, aten
from ddnewton.linearize.structured.uses import (
    Survey,
    WeightUses,
    biases_with_weights,
    by_weight,
    has_overlap,
    layout,
    uses_of,
)


def compile_program(
    graph: GraphModule, leaves: Sequence[Tensor], sample: Sequence[Tensor]
) -> Program:
    """Find the layers in ``graph(*leaves, *sample)``; make a graph to read their columns from."""
    # The uses of every leaf: by weights of their own, or by weights that overlap. A leaf with an
    # obstacle is differentiated directly.
    survey = Survey(graph, leaves)
    survey.run(*leaves, *sample)
    weights: list[WeightUses] = []
    overlapping: list[tuple[int, list[WeightUses]]] = []
    paths: list[Path] = []
    for number in range(len(leaves)):
        uses, path = uses_of(survey, number)
        leaf_weights = by_weight(uses) if path.obstacle is None else []
        if has_overlap(leaf_weights):
            overlapping.append((number, leaf_weights))
        else:
            weights += leaf_weights
        paths.append(path)
    direct = [number for number, path in enumerate(paths) if path.obstacle is not None]
    # Number the sites, where cotangents are taken, and the sources, off which a is read.
    uses = [use for weight in weights for use in weight.uses]
    uses += [
        use for _, leaf_weights in overlapping for weight in leaf_weights for use in weight.uses
    ]
    sites = list(dict.fromkeys(use.node for use in uses))
    sources = list(dict.fromkeys(use.source for use in uses if use.source is not None))
    layers = [_layer(pair, sites, sources) for pair in biases_with_weights(weights)]
    sizes = [leaf.numel() for leaf in leaves]
    summed_leaves = [
        SummedLeaf(
            leaf=number,
            start=sum(sizes[:number]),
            size=sizes[number],
            layers=[_layer([weight], sites, sources) for weight in leaf_weights],
        )
        for number, leaf_weights in overlapping
    ]
    # The columns of summed and direct leaves are dense, and come after those of the layers.
    dense = [*(leaf.leaf for leaf in summed_leaves), *direct]
    return Program(
        graph=_probed(graph, sites, sources),
        sites=[Site(site.meta[SHAPE], site.meta[DTYPE]) for site in sites],
        size=sum(site.meta[SHAPE].numel() for site in sites) + sum(sizes[i] for i in direct),
        layers=layers,
        summed_leaves=summed_leaves,
        direct=direct,
        paths=paths,
        pieces=[*(_pieces(layer, sizes) for layer in layers), *([(i, sizes[i])] for i in dense)],
        order=_order(layers, sizes, dense, leaves[0].device),
        rounding=survey.rounding,
    )


def _layer(pair: Sequence[WeightUses], sites: list[Node], sources: list[Node]) -> Layer:
    """Return a weight, perhaps with its bias, as a layer that knows its nodes by number."""
    parts = [
        Part(
            site=sites.index(uses[0].node),
            read_a=[
                (None if use.source is None else sources.index(use.source), use.read_a)
                for use in uses
            ],
            read_b=uses[0].read_b,
        )
        for uses in zip(*(weight.uses for weight in pair), strict=True)
    ]
    positions = sum(layout(use)[1].shape[-1] for use in pair[0].uses)
    return Layer([weight.indices for weight in pair], parts, positions)


def _pieces(layer: Layer, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the leaf that each piece of a layer is from, and the size of the piece."""
    ends = list(accumulate(sizes))
    return [(bisect_right(ends, int(index.min())), index.numel()) for index in layer.indices]


def _order(
    layers: Sequence[Layer], sizes: Sequence[int], dense: Sequence[int], device: torch.device
) -> Int[Tensor, " d"] | None:
    """Return every parameter's place among the entries of all factors, None if all are in order.

    The place of a parameter that is not used is one past the last.
    """
    # Which parameter every entry is, and the inverse of that.
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    parameters = [index.reshape(-1) for layer in layers for index in layer.indices]
    parameters += [torch.arange(starts[i], starts[i + 1], device=device) for i in dense]
    parameter = torch.cat([*parameters, torch.arange(0, device=device)])
    order = parameter.new_full((starts[-1],), parameter.numel())
    order[parameter] = torch.arange(parameter.numel(), device=device)
    in_order = torch.equal(order, torch.arange(starts[-1], device=device))
    return None if in_order else order


def _probed(graph: GraphModule, sites: Sequence[Node], sources: Sequence[Node]) -> GraphModule:
    """Return the graph with a probe added at every site, and with the sources as outputs too."""
    # The inputs of the graph, then the probes.
    probed = Graph()
    inputs = graph.graph.find_nodes(op="placeholder")
    copies: dict[Node, Node] = {node: probed.node_copy(node) for node in inputs}
    probes = {site: probed.placeholder(f"probe_{i}") for i, site in enumerate(sites)}
    # Its operations, and after that of a site the sum with the probe in its place.
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copies[node] = probed.node_copy(node, copies.__getitem__)
        if node in probes:
            copies[node] = probed.call_function(aten.add.Tensor, (copies[node], probes[node]))
    output: Any = graph.graph.output_node().args[0]
    probed.output((copies[output], [copies[node] for node in sources]))
    return GraphModule(graph, probed)
