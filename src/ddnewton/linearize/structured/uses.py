"""Where parameters act in the graph of a model: which layers there are.

Every parameter is followed through transposes, reshapes and selections to the operations that
consume its entries, and the uses of the same entries are put together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ddnewton.linearize.structured.rules import RULES, SHAPE, Use, aten

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


class Path(NamedTuple):
    """How the columns of one leaf are had: through which operations, or why directly."""

    operations: Sequence[str]
    obstacle: str | None

    def __str__(self) -> str:
        return f"directly ({self.obstacle})" if self.obstacle else ", ".join(self.operations)


class Found(NamedTuple):
    """A layer in the making: its uses, whose nodes are not yet numbered."""

    entries: Int[Tensor, "g o p"]
    uses: list[Use]


class Survey(Interpreter):
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


def uses_of(survey: Survey, number: int) -> tuple[list[Use], Path]:
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


def merged(uses: Sequence[Use]) -> list[Found]:
    """Join the uses of the same entries: they are further positions."""
    found: list[Found] = []
    for use in uses:
        for layer in found:
            if torch.equal(layer.entries, use.entries):
                layer.uses.append(use)
                break
        else:
            found.append(Found(use.entries, [use]))
    return found


def with_shifts(found: Sequence[Found]) -> list[list[Found]]:
    """Put a bias to the weight whose positions and outputs it shares: a = (a, 1)."""
    layouts = [[layout(use) for use in layer.uses] for layer in found]
    shifts = [all(use.other is None for use in layer.uses) for layer in found]
    pairs: dict[int, list[Found]] = {i: [layer] for i, layer in enumerate(found) if not shifts[i]}
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


def layout(use: Use) -> tuple[Node, Tensor]:
    """Return which entry of its site each output of a use is."""
    shape = use.node.meta[SHAPE]
    return use.node, use.outputs(torch.arange(shape.numel()).reshape(1, 1, *shape))


def _alike(one: list[tuple[Node, Tensor]], other: list[tuple[Node, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a is b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


def overlap(layers: Sequence[Found]) -> bool:
    """Return whether some parameter is an entry of two layers, or twice of one."""
    if not layers:
        return False
    entries = torch.cat([layer.entries.reshape(-1) for layer in layers])
    return bool(((entries - entries.min()).bincount() > 1).any())
