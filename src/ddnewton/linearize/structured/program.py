"""From the graph of a model to a program that returns its columns as outer products.

Where rules know all uses of a parameter, its columns are outer products; any other parameter is
differentiated directly, one copy a sample, in the same pullback.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ddnewton.linearize.structured.rules import SHAPE, aten
from ddnewton.linearize.structured.uses import (
    Found,
    Path,
    Survey,
    layout,
    merged,
    overlap,
    uses_of,
    with_shifts,
)


class Part(NamedTuple):
    """One use of a layer, with its site and inputs by their numbers in the program.

    Without an input a is 1, and ``inputs`` may take anything of the batch.
    """

    site: int
    inputs: Sequence[tuple[int | None, Callable[[Tensor], Tensor]]]
    outputs: Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """A weight, and its bias where there is one: which parameters they are, and their uses."""

    indices: Sequence[Int[Tensor, "g o _"]]
    parts: Sequence[Part]
    positions: int  # of all uses


class Sum(NamedTuple):
    """A leaf in different uses, transposed in one, say, whose columns are added up."""

    leaf: int
    start: int  # of the leaf among the parameters
    size: int
    layers: Sequence[Layer]


class Program(NamedTuple):
    """A graph that takes probes after its inputs, and returns what goes into its layers too."""

    graph: GraphModule  # (*params, *x, *probes) -> (outputs, inputs of the layers)
    sites: Sequence[torch.Size]  # the shapes of the probes
    size: int  # how many cotangents a sample and column has
    layers: Sequence[Layer]
    sums: Sequence[Sum]
    direct: Sequence[int]
    paths: Sequence[Path]
    pieces: Sequence[Sequence[tuple[int, int]]]  # the leaf and size of every factor's pieces
    order: Int[Tensor, " d"] | None  # where the parameters are among the entries; None: in order


def compile_program(
    graph: GraphModule, leaves: Sequence[Tensor], sample: Sequence[Tensor]
) -> Program:
    """Find the layers in ``graph(*leaves, *sample)``, and let it return what goes into them."""
    survey = Survey(graph, leaves)
    survey.run(*leaves, *sample)
    found: list[Found] = []
    overlapping: list[tuple[int, list[Found]]] = []
    paths: list[Path] = []
    for number in range(len(leaves)):
        uses, path = uses_of(survey, number)
        mine = merged(uses) if path.obstacle is None else []
        if overlap(mine):
            overlapping.append((number, mine))
        else:
            found += mine
        paths.append(path)
    direct = [number for number, path in enumerate(paths) if path.obstacle is not None]
    uses = [use for layer in found for use in layer.uses]
    uses += [use for _, layers in overlapping for layer in layers for use in layer.uses]
    sizes = [leaf.numel() for leaf in leaves]
    sites = list(dict.fromkeys(use.node for use in uses))
    others = list(dict.fromkeys(use.other for use in uses if use.other is not None))
    layers = [_numbered(pair, sites, others) for pair in with_shifts(found)]
    sums = [
        Sum(
            leaf=number,
            start=sum(sizes[:number]),
            size=sizes[number],
            layers=[_numbered([layer], sites, others) for layer in mine],
        )
        for number, mine in overlapping
    ]
    shapes = [site.meta[SHAPE] for site in sites]
    whole = [*(each.leaf for each in sums), *direct]
    return Program(
        graph=_probed(graph, sites, others),
        sites=shapes,
        size=sum(map(torch.Size.numel, shapes)) + sum(sizes[i] for i in direct),
        layers=layers,
        sums=sums,
        direct=direct,
        paths=paths,
        pieces=[*(_pieces(layer, sizes) for layer in layers), *([(i, sizes[i])] for i in whole)],
        order=_order(layers, sizes, whole, leaves[0].device),
    )


def _numbered(pair: Sequence[Found], sites: list[Node], others: list[Node]) -> Layer:
    """Return a layer that knows its nodes by number."""
    parts = [
        Part(
            site=sites.index(uses[0].node),
            inputs=[
                (None if use.other is None else others.index(use.other), use.inputs) for use in uses
            ],
            outputs=uses[0].outputs,
        )
        for uses in zip(*(layer.uses for layer in pair), strict=True)
    ]
    positions = sum(layout(use)[1].shape[-1] for use in pair[0].uses)
    return Layer([layer.entries for layer in pair], parts, positions)


def _pieces(layer: Layer, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return of which leaf the pieces of a layer are, and how many entries of it."""
    ends = list(accumulate(sizes))
    return [(bisect_right(ends, int(index.min())), index.numel()) for index in layer.indices]


def _order(
    layers: Sequence[Layer], sizes: Sequence[int], whole: Sequence[int], device: torch.device
) -> Int[Tensor, " d"] | None:
    """Return for every parameter which entry it is; one past the last for those unused."""
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    entries = [index.reshape(-1) for layer in layers for index in layer.indices]
    entries += [torch.arange(starts[i], starts[i + 1], device=device) for i in whole]
    entry = torch.cat([*entries, torch.arange(0, device=device)])
    order = entry.new_full((starts[-1],), entry.numel())
    order[entry] = torch.arange(entry.numel(), device=device)
    in_order = torch.equal(order, torch.arange(starts[-1], device=device))
    return None if in_order else order


def _probed(graph: GraphModule, sites: Sequence[Node], others: Sequence[Node]) -> GraphModule:
    """Return the graph with a probe added at every site, and the other operands as outputs."""
    probed = Graph()
    inputs = graph.graph.find_nodes(op="placeholder")
    copies: dict[Node, Node] = {node: probed.node_copy(node) for node in inputs}
    probes = {site: probed.placeholder(f"probe_{i}") for i, site in enumerate(sites)}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copies[node] = probed.node_copy(node, copies.__getitem__)
        if node in probes:
            copies[node] = probed.call_function(aten.add.Tensor, (copies[node], probes[node]))
    output: Any = graph.graph.output_node().args[0]
    probed.output((copies[output], [copies[node] for node in others]))
    return GraphModule(graph, probed)
