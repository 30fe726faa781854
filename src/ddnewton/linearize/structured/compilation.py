"""From the graph of a model to its program: its layers, and the graph that returns their parts."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from ddnewton.linearize.structured.derived import Derived, derived_weights
from ddnewton.linearize.structured.program import DerivedLeaves, Layer, Part, Program, Site
from ddnewton.linearize.structured.rules import DTYPE, SHAPE, aten
from ddnewton.linearize.structured.simplified import simplified
from ddnewton.linearize.structured.uses import (
    Survey,
    WeightUses,
    biases_with_weights,
    by_weight,
    has_overlap,
    layout,
    positions,
    uses_of,
)
from ddnewton.linearize.widening import widened_graph


def compile_program(
    graph: GraphModule, leaves: Sequence[Tensor], sample: Sequence[Tensor]
) -> Program:
    """Find the layers in ``graph(*leaves, *sample)``; make a graph to read their columns from."""
    # The uses of every leaf, or those of the weights that are computed from it. A leaf with an
    # obstacle that is neither is differentiated directly.
    survey = Survey(graph, leaves)
    survey.run(*leaves, *sample)
    uses_and_paths = [uses_of(survey, leaf) for leaf in survey.leaves]
    obstructed = [number for number, (_, path) in enumerate(uses_and_paths) if path.obstacle]
    computed = derived_weights(graph, survey, obstructed)
    paths = {number: path for number, (_, path) in enumerate(uses_and_paths)} | computed.paths
    derived = computed.derived
    pulled_back = {number for one in derived for number in one.leaves}
    # By weights of their own, or by weights that overlap.
    weights: list[WeightUses] = []
    sizes = [leaf.numel() for leaf in leaves]
    for number in range(len(leaves)):
        leaf_uses = computed.uses.get(number, uses_and_paths[number][0])
        leaf_weights = [] if number in pulled_back else by_weight(leaf_uses)
        if has_overlap(leaf_weights):
            start = sum(sizes[:number])
            shifted = [use._replace(indices=use.indices - start) for use in leaf_uses]
            derived.append(Derived([number], None, sizes[number], shifted, [None]))
        else:
            weights += leaf_weights
    direct = [number for number in range(len(leaves)) if paths[number].obstacle]
    # Number the sites, where cotangents are taken, and the sources, off which a is read.
    uses = [use for weight in weights for use in weight.uses]
    uses += [use for one in derived for use in one.uses]
    sites = list(dict.fromkeys(use.node for use in uses))
    sources = list(dict.fromkeys(use.source for use in uses if use.source is not None))
    # In the order of the parameters, if only those of layers are used, so that columns are too.
    layers = [_layer(pair, sites, sources) for pair in biases_with_weights(weights)]
    layers.sort(key=lambda layer: int(layer.indices[0].min()))
    derived_leaves = [_derived_leaves(one, sites, sources) for one in derived]
    # Their columns, and those of direct leaves, come after those of the layers.
    entries = {i: torch.arange(size, device=leaves[0].device) for i, size in enumerate(sizes)}
    later = [
        (i, entries[i] if rows is None else rows.reshape(-1))
        for one in derived
        for i, rows in zip(one.leaves, one.rows, strict=True)
    ]
    later += [(i, entries[i]) for i in direct]
    return Program(
        plain=graph,
        graph=_probed(graph, sites, sources),
        sites=[Site(site.meta[SHAPE], site.meta[DTYPE]) for site in sites],
        size=sum(site.meta[SHAPE].numel() for site in sites) + sum(sizes[i] for i in direct),
        results=_results(graph, len(leaves)),
        layers=layers,
        derived_leaves=derived_leaves,
        direct=direct,
        paths=[paths[number] for number in range(len(leaves))],
        pieces=[
            *(_pieces(layer, sizes) for layer in layers),
            *([(i, of.numel())] for i, of in later),
        ],
        order=_order(layers, sizes, later, leaves[0].device),
        rounding=survey.rounding,
    )


def _results(graph: GraphModule, leaves: int) -> int:
    """Return the number of entries of all results of a sample that are tensors of their own.

    What is computed of the leaves alone, the first inputs of the graph, is there once for all.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    of_sample = set(inputs[leaves:])
    for node in graph.graph.nodes:
        if of_sample.intersection(node.all_input_nodes):
            of_sample.add(node)
    shapes = [node.meta[SHAPE] for node in of_sample if _is_new(node.target)]
    return sum(shape.numel() for shape in shapes if shape is not None)


def _is_new(target: Any) -> bool:
    """Return whether the result of an operation has memory of its own."""
    if not isinstance(target, OpOverload):
        return target is operator.getitem  # one of several results
    return not any(result.alias_info for result in target._schema.returns)


def widened_program(program: Program, dtype: torch.dtype) -> tuple[Program, bool]:
    """Return a program in float64, and whether it rounds below ``dtype`` inside as it is."""
    graph, rounded = widened_graph(program.graph, dtype)
    sites = [
        site._replace(dtype=torch.complex128 if site.dtype.is_complex else torch.float64)
        for site in program.sites
    ]
    # The graphs that compute weights in float64 as well.
    derived = [
        one._replace(graph=one.graph and widened_graph(one.graph, dtype)[0])
        for one in program.derived_leaves
    ]
    plain, _ = widened_graph(program.plain, dtype)
    wide = program._replace(
        plain=plain, graph=graph, sites=sites, derived_leaves=derived, rounding=0.0
    )
    return wide, rounded


def simplified_program(program: Program) -> Program:
    """Return a program that computes the same with fewer operations."""
    return program._replace(plain=simplified(program.plain), graph=simplified(program.graph))


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
    return Layer(
        [weight.indices for weight in pair], parts, positions(list(map(layout, pair[0].uses)))
    )


def _derived_leaves(derived: Derived, sites: list[Node], sources: list[Node]) -> DerivedLeaves:
    """Return derived weights with their uses as layers."""
    weights = by_weight(derived.uses)
    return DerivedLeaves(
        leaves=derived.leaves,
        graph=derived.graph,
        size=derived.size,
        layers=[_layer([weight], sites, sources) for weight in weights],
        repeated=[has_overlap([weight]) for weight in weights],
        orders=[order_of(weight.indices, derived.size) for weight in weights],
        rows=derived.rows,
    )


def _pieces(layer: Layer, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the leaf that each piece of a layer is from, and the size of the piece."""
    ends = list(accumulate(sizes))
    return [(bisect_right(ends, int(index.min())), index.numel()) for index in layer.indices]


def _order(
    layers: Sequence[Layer],
    sizes: Sequence[int],
    later: Sequence[tuple[int, Tensor]],
    device: torch.device,
) -> Int[Tensor, " d"] | None:
    """Return every parameter's place among the entries of all factors, None if all are in order.

    The place of a parameter that is not used is one past the last.
    """
    starts = list(accumulate(sizes, initial=0))
    parameters = [index.reshape(-1) for layer in layers for index in layer.indices]
    parameters += [starts[i] + entries for i, entries in later]
    return order_of(torch.cat([*parameters, torch.arange(0, device=device)]), starts[-1])


def order_of(indices: Int[Tensor, "..."], size: int) -> Int[Tensor, " d"] | None:
    """Return the place of each of so many numbers among some, None if these are all, in order.

    The place of a number that is not among them is one past the last.
    """
    order = indices.new_full((size,), indices.numel())
    order[indices.reshape(-1)] = torch.arange(indices.numel(), device=indices.device)
    # Without the last number the place past the last is that number's.
    counted = torch.arange(size, device=indices.device)
    return None if indices.numel() == size and torch.equal(order, counted) else order


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
