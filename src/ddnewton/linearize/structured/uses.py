"""The uses of parameters in the graph of a model, from which its layers are made.

Every parameter is followed through transposes, reshapes, selections and casts to the operations
that compute with its entries. Uses of the same entries are further positions of one weight.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ddnewton.linearize.structured.program import Path
from ddnewton.linearize.structured.rules import DTYPE, RULES, SHAPE, Use, aten
from ddnewton.linearize.widening import cast_rounding

REARRANGING = {
    *(aten.t.default, aten.permute.default, aten.transpose.int, aten.view.default),
    *(aten._unsafe_view.default, aten.reshape.default, aten.expand.default),
    aten.repeat.default,
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.unbind.int, aten.alias.default, aten.clone.default, aten.flip.default),
    *(aten.diagonal.default, aten._reshape_alias.default, operator.getitem),
}
"""Operations whose results consist of entries of their first argument."""

CASTING = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}
"""Operations whose results are their first argument, in another dtype."""

RESHAPING = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


class WeightUses(NamedTuple):
    """A weight, or a bias, as the parameters that it consists of, with all its uses."""

    indices: Int[Tensor, "g o p"]
    uses: list[Use]


class Survey(Interpreter):
    """Run a graph once; note shapes and dtypes, and the operands that consist of parameters.

    ``origins`` holds the leaves that a node is computed from, for every node that no data enter.
    Such a node is a leaf, rearranges one, or is a weight computed from some. ``indices`` says which
    entry of the leaf or weight each of its entries is, and ``root_of`` of which leaf or weight.
    ``rounding`` is the eps of the narrowest dtype that an operation casts to, 0 without casts.
    """

    def __init__(self, graph: GraphModule, leaves: Sequence[Tensor]) -> None:
        super().__init__(graph)
        self.indices: dict[Node, Any] = {}
        self.root_of: dict[Node, Node] = {}
        self.origins: dict[Node, frozenset[int]] = {}
        self.rounding = 0.0
        # The leaves come first among the inputs, and are numbered entry by entry.
        self.leaves: list[Node] = graph.graph.find_nodes(op="placeholder")[: len(leaves)]
        start = 0
        for number, (node, leaf) in enumerate(zip(self.leaves, leaves, strict=True)):
            stop = start + leaf.numel()
            self.indices[node] = torch.arange(start, stop, device=leaf.device).reshape(leaf.shape)
            self.root_of[node], self.origins[node] = node, frozenset([number])
            start = stop

    def run_node(self, n: Node) -> Any:
        """Run an operation on the sample, and one that computes nothing on the indices as well."""
        result = super().run_node(n)
        n.meta[SHAPE] = getattr(result, "shape", None)
        n.meta[DTYPE] = getattr(result, "dtype", None)
        operands, _ = self.fetch_args_kwargs_from_env(n)
        self.rounding = max(self.rounding, cast_rounding(result, operands))
        # The leaves that it is computed from, if from nothing else but constants.
        if n.op not in ("placeholder", "output") and all(
            x in self.origins for x in n.all_input_nodes
        ):
            self.origins[n] = frozenset().union(*(self.origins[x] for x in n.all_input_nodes))
        # The indices of what a rearrangement, or a cast to another floating dtype, gives.
        source: Any = n.args[0] if n.args else None
        floating = isinstance(result, Tensor) and result.is_floating_point()
        if n.target == aten.view_as_complex.default and source in self.indices:
            pairs: Any = self.indices[source].double()  # which hold integers up to 2⁵³
            self.indices[n] = torch.complex(pairs[..., 0], pairs[..., 1])
            self.root_of[n] = self.root_of[source]
        elif isinstance(source, Node) and source in self.indices and n.target in REARRANGING:
            self.indices[n] = rearranged(n, self.indices[source])
            self.root_of[n] = self.root_of[source]
        elif (
            isinstance(source, Node) and source in self.indices and n.target in CASTING and floating
        ):
            self.indices[n], self.root_of[n] = self.indices[source], self.root_of[source]
        elif self.origins.get(n) and floating and n not in self.root_of:
            self.indices[n] = torch.arange(result.numel(), device=result.device)
            self.indices[n] = self.indices[n].reshape(result.shape)
            self.root_of[n] = n
        return result


def rearranged(node: Node, entries: Any) -> Any:
    """Return other entries in the places in which an operation puts those of its argument."""
    target: Any = aten.reshape.default if node.target in RESHAPING else node.target
    return target(entries, *node.args[1:], **node.kwargs)


def uses_of(survey: Survey, root: Node, in_data: bool = False) -> tuple[list[Use], Path]:
    """Return the uses of a leaf or weight and their operations; none if an operation has no rule.

    They are all its uses, or only those by operations into which data enter.
    """
    uses: list[Use] = []
    names: dict[str, None] = {}
    # Every node that consists of its entries, and the operations that use it.
    for node in [node for node, of in survey.root_of.items() if of is root]:
        for user in node.users:
            # What rearranges them comes by itself.
            if survey.root_of.get(user) is root or (in_data and user in survey.origins):
                continue
            name = operation(user)
            rule = RULES.get(user.target)
            # The node may be several operands of the operation, each with a use of its own.
            for operand, argument in enumerate(user.args):
                if argument is not node or rule is None:
                    continue
                use = rule(user, operand, survey.indices[node])
                if use is None:
                    return [], Path([name], f"no rule for this {name}")
                uses.append(_at_site(in_reals(use) if use.indices.is_complex() else use))
                names[name] = None
            if rule is None:
                return [], Path([name], f"no rule for {name}")
    return uses, Path(list(names) or ["unused"], None)


def operation(node: Node) -> str:
    """Return the name of an operation without its overload."""
    return str(node.target).removeprefix("aten.").split(".")[0]


def in_reals(use: Use) -> Use:
    r"""Return the use of a complex weight, of which the indices are pairs, as that of a real one.

    As Re y = Σ Re w Re a − Im w Im a and Im y = Σ Re w Im a + Im w Re a, both are positions.
    """

    def read_a(x: Tensor) -> Tensor:
        a = use.read_a(x)
        rows = [torch.cat([a.real, -a.imag], -1), torch.cat([a.imag, a.real], -1)]
        return torch.cat(rows, 2)

    def read_b(b: Tensor) -> Tensor:
        b = use.read_b(b)
        return torch.cat([b.real, b.imag], -1)

    indices = torch.cat([use.indices.real, use.indices.imag], -1).long()
    return use._replace(indices=indices, read_a=read_a, read_b=read_b)


def _at_site(use: Use) -> Use:
    """Move a use down the graph while its cotangent stays the same: past reshapes and additions.

    There it meets its bias, and other summands, which need no probes of their own then.
    """
    site, shape = use.node, use.node.meta[SHAPE]
    while len(site.users) == 1:
        user = next(iter(site.users))
        total = user.target == aten.add.Tensor and not user.kwargs and user.args[0] != user.args[1]
        keeps_cotangent = (
            user.meta[SHAPE] == site.meta[SHAPE] if total else user.target in RESHAPING
        )
        if not keeps_cotangent:
            break
        site = user
    read_b = use.read_b
    return use._replace(node=site, read_b=lambda b: read_b(b.reshape(*b.shape[:2], *shape)))


def by_weight(uses: Sequence[Use]) -> list[WeightUses]:
    """Put together the uses of the same parameters in the same places."""
    weights: list[WeightUses] = []
    for use in uses:
        for weight in weights:
            if torch.equal(weight.indices, use.indices):
                weight.uses.append(use)
                break
        else:
            weights.append(WeightUses(use.indices, [use]))
    return weights


def biases_with_weights(weights: Sequence[WeightUses]) -> list[list[WeightUses]]:
    """Put every bias to a weight whose sites and outputs it shares: then a = (a, 1).

    A bias without such a weight stays alone, as does a weight without a bias. So does the bias of a
    weight of several positions, of which large inputs would be copied, while its own columns are
    sums over these.
    """
    layouts = [[layout(use) for use in weight.uses] for weight in weights]
    is_bias = [all(use.source is None for use in weight.uses) for weight in weights]
    pairs: dict[int, list[WeightUses]] = {
        i: [weight] for i, weight in enumerate(weights) if not is_bias[i]
    }
    for i, bias in enumerate(weights):
        if not is_bias[i]:
            continue
        hosts = (
            j
            for j, pair in pairs.items()
            if len(pair) == 1
            and not is_bias[j]
            and positions(layouts[j]) == 1
            and _same_layouts(layouts[i], layouts[j])
        )
        host = next(hosts, i)
        pairs.setdefault(host, []).append(bias)
    return list(pairs.values())


def positions(layouts: Sequence[tuple[Node, Tensor]]) -> int:
    """Return the number of positions of a weight in all of its uses, by their layouts."""
    return sum(places.shape[-1] for _, places in layouts)


def layout(use: Use) -> tuple[Node, Tensor]:
    """Return the site of a use, and b as the places of its entries there."""
    shape = use.node.meta[SHAPE]
    places = torch.arange(shape.numel(), device="cpu").reshape(1, 1, *shape)
    if use.node.meta[DTYPE].is_complex:
        places = torch.complex(places.double(), -1 - places.double())
    return use.node, use.read_b(places)


def _same_layouts(left: list[tuple[Node, Tensor]], right: list[tuple[Node, Tensor]]) -> bool:
    """Return whether two weights have the same sites and read b off them alike, use by use."""
    return len(left) == len(right) and all(
        a is b and torch.equal(x, y) for (a, x), (b, y) in zip(left, right, strict=True)
    )


def has_overlap(weights: Sequence[WeightUses]) -> bool:
    """Return whether a parameter is in two weights, or twice in one."""
    if not weights:
        return False
    indices = torch.cat([weight.indices.reshape(-1) for weight in weights])
    return bool(((indices - indices.min()).bincount() > 1).any())
