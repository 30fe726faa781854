"""From the graph of a model to a program that returns its columns as outer products.

Every parameter is followed through transposes, reshapes and selections to the operations that
consume its entries. Where a rule knows all of them, its columns are outer products; any other
parameter is differentiated directly, one copy a sample, in the same pullback.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from ddnewton.structured.rules import RULES, SHAPE, Use, aten

REARRANGING = {
    *(aten.t.default, aten.permute.default, aten.transpose.int, aten.view.default),
    *(aten._unsafe_view.default, aten.reshape.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.unbind.int, aten.alias.default, aten.clone.default, aten.flip.default),
    *(aten.diagonal.default, aten._reshape_alias.default, operator.getitem),
}
"""Operations whose results consist of entries of their first argument."""

RESHAPING = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


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


class Path(NamedTuple):
    """How the columns of one leaf are had: through which operations, or why directly."""

    operations: Sequence[str]
    obstacle: str | None

    def __str__(self) -> str:
        return f"directly ({self.obstacle})" if self.obstacle else ", ".join(self.operations)


class Program(NamedTuple):
    """A graph that takes probes after its inputs, and returns what goes into its layers too."""

    graph: GraphModule  # (*params, *x, *probes) -> (outputs, inputs of the layers)
    sites: Sequence[torch.Size]  # the shapes of the probes
    size: int  # how many cotangents a sample and column has
    layers: Sequence[Layer]
    sums: Sequence[Sum]
    direct: Sequence[int]
    paths: Sequence[Path]
    order: Int[Tensor, " d"] | None  # where the parameters are among the entries; None: in order


class _Found(NamedTuple):
    """A layer in the making: its uses, whose nodes are not yet numbered."""

    entries: Int[Tensor, "g o p"]
    uses: list[Use]


def compile_program(
    graph: GraphModule, leaves: Sequence[Tensor], sample: Sequence[Tensor]
) -> Program:
    """Find the layers in ``graph(*leaves, *sample)``, and let it return what goes into them."""
    survey = _Survey(graph, leaves)
    survey.run(*leaves, *sample)
    found: list[_Found] = []
    overlapping: list[tuple[int, list[_Found]]] = []
    paths: list[Path] = []
    for number in range(len(leaves)):
        uses, path = _uses(survey, number)
        merged = _merged(uses) if path.obstacle is None else []
        if _overlap(merged):
            overlapping.append((number, merged))
        else:
            found += merged
        paths.append(path)
    direct = [number for number, path in enumerate(paths) if path.obstacle is not None]
    uses = [use for layer in found for use in layer.uses]
    uses += [use for _, layers in overlapping for layer in layers for use in layer.uses]
    sizes = [leaf.numel() for leaf in leaves]
    sites = list(dict.fromkeys(use.node for use in uses))
    others = list(dict.fromkeys(use.other for use in uses if use.other is not None))
    layers = [_numbered(pair, sites, others) for pair in _with_shifts(found)]
    sums = [
        Sum(
            leaf=number,
            start=sum(sizes[:number]),
            size=sizes[number],
            layers=[_numbered([layer], sites, others) for layer in merged],
        )
        for number, merged in overlapping
    ]
    shapes = [site.meta[SHAPE] for site in sites]
    return Program(
        graph=_probed(graph, sites, others),
        sites=shapes,
        size=sum(map(torch.Size.numel, shapes)) + sum(sizes[i] for i in direct),
        layers=layers,
        sums=sums,
        direct=direct,
        paths=paths,
        order=_order(layers, sizes, [*(each.leaf for each in sums), *direct], leaves[0].device),
    )


def _overlap(layers: Sequence[_Found]) -> bool:
    """Return whether some parameter is an entry of two layers, or twice of one."""
    if not layers:
        return False
    entries = torch.cat([layer.entries.reshape(-1) for layer in layers])
    return bool(((entries - entries.min()).bincount() > 1).any())


class _Survey(Interpreter):
    """Run a graph once: note the shapes, and which operands consist of which parameters."""

    def __init__(self, graph: GraphModule, leaves: Sequence[Tensor]) -> None:
        super().__init__(graph)
        self.entries: dict[Node, Any] = {}
        self.owner: dict[Node, int] = {}
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        start = 0
        for number, (node, leaf) in enumerate(zip(inputs, leaves, strict=False)):
            stop = start + leaf.numel()
            self.entries[node] = torch.arange(start, stop, device=leaf.device).reshape(leaf.shape)
            self.owner[node] = number
            start = stop

    def run_node(self, n: Node) -> Any:
        """Run an operation on the sample, and a rearrangement on the entries as well."""
        result = super().run_node(n)
        n.meta[SHAPE] = getattr(result, "shape", None)
        source = n.args[0] if n.args else None
        if n.target in REARRANGING and isinstance(source, Node) and source in self.entries:
            rearrange: Any = n.target
            self.entries[n] = rearrange(self.entries[source], *n.args[1:], **n.kwargs)
            self.owner[n] = self.owner[source]
        return result


def _uses(survey: _Survey, number: int) -> tuple[list[Use], Path]:
    """Return the uses of a leaf, and the operations they are."""
    uses: list[Use] = []
    names: dict[str, None] = {}
    for node in [node for node, owner in survey.owner.items() if owner == number]:
        for user in node.users:
            if user in survey.owner:
                continue
            name = str(user.target).removeprefix("aten.").split(".")[0]
            rule = RULES.get(user.target)
            for operand, argument in enumerate(user.args):
                if argument is not node or rule is None:
                    continue
                use = rule(user, operand, survey.entries[node])
                if use is None:
                    return [], Path([name], f"no rule for this {name}")
                uses.append(_at_site(use))
                names[name] = None
            if rule is None:
                return [], Path([name], f"no rule for {name}")
    return uses, Path(list(names) or ["unused"], None)


def _at_site(use: Use) -> Use:
    """Move a use down to where its cotangent is the same: past reshapes and additions.

    There its bias is found, and what else is added needs no probe of its own.
    """
    site, shape = use.node, use.node.meta[SHAPE]
    while len(site.users) == 1:
        user = next(iter(site.users))
        total = user.target == aten.add.Tensor and not user.kwargs and user.args[0] != user.args[1]
        same = user.meta[SHAPE] == site.meta[SHAPE] if total else user.target in RESHAPING
        if not same:
            break
        site = user
    outputs = use.outputs
    return use._replace(node=site, outputs=lambda b: outputs(b.reshape(*b.shape[:2], *shape)))


def _merged(uses: Sequence[Use]) -> list[_Found]:
    """Join the uses of the same entries: they are further positions."""
    found: list[_Found] = []
    for use in uses:
        for layer in found:
            if torch.equal(layer.entries, use.entries):
                layer.uses.append(use)
                break
        else:
            found.append(_Found(use.entries, [use]))
    return found


def _with_shifts(found: Sequence[_Found]) -> list[list[_Found]]:
    """Put a bias to the weight whose positions and outputs it shares: a = (a, 1)."""
    layouts = [[_layout(use) for use in layer.uses] for layer in found]
    shifts = [all(use.other is None for use in layer.uses) for layer in found]
    pairs: dict[int, list[_Found]] = {i: [layer] for i, layer in enumerate(found) if not shifts[i]}
    for i, layer in enumerate(found):
        if not shifts[i]:
            continue
        hosts = (
            j
            for j, pair in pairs.items()
            if len(pair) == 1 and not shifts[j] and _alike(layouts[i], layouts[j])
        )
        host = next(hosts, i)
        pairs.setdefault(host, []).append(layer)
    return list(pairs.values())


def _layout(use: Use) -> tuple[Node, Tensor]:
    """Return which entry of its site each output of a use is."""
    shape = use.node.meta[SHAPE]
    return use.node, use.outputs(torch.arange(shape.numel()).reshape(1, 1, *shape))


def _alike(one: list[tuple[Node, Tensor]], other: list[tuple[Node, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a is b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


def _numbered(pair: Sequence[_Found], sites: list[Node], others: list[Node]) -> Layer:
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
    positions = sum(_layout(use)[1].shape[-1] for use in pair[0].uses)
    return Layer([layer.entries for layer in pair], parts, positions)


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
    copies: dict[Node, Node] = {}
    last = None
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        if node.op != "placeholder" and last is None:
            last = copies.get(node.prev)
            probes = {site: probed.placeholder(f"probe_{i}") for i, site in enumerate(sites)}
        copies[node] = probed.node_copy(node, copies.__getitem__)
        if node in sites:
            copies[node] = probed.call_function(aten.add.Tensor, (copies[node], probes[node]))
    output: Any = graph.graph.output_node().args[0]
    probed.output((copies[output], [copies[node] for node in others]))
    return GraphModule(graph, probed)
