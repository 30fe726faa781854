"""Weights that are computed from parameters alone: w = g v/‖v‖, exp θ, or θ times a mask.

No data enter into them, so they have one Jacobian for all samples. Their columns are found by the
rules of their uses, as those of a leaf, and pulled back to the leaves: column by column, or, where
every row of w is made of parameters of its own, by pulling back what goes in. Where w is θ itself
times a number, the rules are those of θ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ddnewton.linearize.structured.dependence import multiple_of, rows_of_leaf
from ddnewton.linearize.structured.program import Path
from ddnewton.linearize.structured.rules import DTYPE, SHAPE, Use, aten
from ddnewton.linearize.structured.uses import Survey, by_weight, has_overlap, operation, uses_of


class Derived(NamedTuple):
    """Leaves, and the weights computed from them: a graph of these, and their uses in data.

    ``rows`` holds for every leaf the entries [row, p] that the rows of the only weight are computed
    from; None where there are several weights, or several rows are computed from one entry.
    """

    leaves: Sequence[int]
    graph: GraphModule | None  # (*params) -> the entries of all weights; None: those of the leaf
    size: int  # of these entries, by which the indices of the uses count
    uses: Sequence[Use]
    rows: Sequence[Int[Tensor, "_ _"] | None]


class DerivedWeights(NamedTuple):
    """The uses of leaves that had no rules, by their numbers; weights derived from others."""

    uses: dict[int, list[Use]]
    derived: list[Derived]
    paths: dict[int, Path]


def derived_weights(
    graph: GraphModule, survey: Survey, obstructed: Sequence[int]
) -> DerivedWeights:
    """Find the weights that stand between the leaves that have no rules and the data.

    A leaf that has no rule where it meets data is left out, and so is one whose weights have none.
    """
    total = DerivedWeights({}, [], {})
    direct = {i for i in obstructed if uses_of(survey, survey.leaves[i], True)[1].obstacle}
    for number in obstructed:
        if number not in direct and number not in total.paths:
            part = _component(graph, survey, number, direct)
            direct |= set() if part.paths else {number}
            total.uses.update(part.uses)
            total.paths.update(part.paths)
            total.derived.extend(part.derived)
    return total


def _component(graph: GraphModule, survey: Survey, number: int, direct: set[int]) -> DerivedWeights:
    """Find the weights computed from a leaf, with all other leaves that these are made from."""
    # Leaf by leaf, the weights that data meet; weight by weight, its leaves.
    leaves, roots = [number], list[Node]()
    for leaf in leaves:
        for root in dict.fromkeys(survey.root_of.values()):
            if leaf in survey.origins[root] and root not in roots and _meets_data(survey, root):
                roots.append(root)
                leaves += [i for i in sorted(survey.origins[root] - direct) if i not in leaves]
    # Their uses, by indices that count the entries of a weight.
    uses: dict[Node, list[Use]] = {}
    names: dict[str, None] = {}
    for root in roots:
        of_root, path = uses_of(survey, root, True)
        if path.obstacle:
            return DerivedWeights({}, [], {})
        start = int(survey.indices[root].min())
        uses[root] = [use._replace(indices=use.indices - start) for use in of_root]
        names |= dict.fromkeys([operation(root)] * (root not in survey.leaves))
        names |= dict.fromkeys(path.operations)
    # Leaves of which all weights are multiples, entry by entry, have the uses of these.
    multiples = {i: _uses_of_multiples(survey, i, uses) for i in leaves}
    simple = {i: leaf_uses for i, leaf_uses in multiples.items() if leaf_uses is not None}
    paths = dict.fromkeys(leaves if roots else [], Path(list(names), None))
    remaining = sorted(set(leaves) - set(simple))
    if not (roots and remaining):
        return DerivedWeights(simple, [], paths)
    # The others have the columns of all weights, one after the other, pulled back.
    starts = list(accumulate((root.meta[SHAPE].numel() for root in roots), initial=0))
    shifted = [
        use._replace(indices=use.indices + start)
        for start, root in zip(starts, roots, strict=False)
        for use in uses[root]
    ]
    weights = by_weight(shifted)
    single = len(weights) == 1 and not has_overlap(weights)
    rows = [
        rows_of_leaf(survey, survey.leaves[i], roots[0], weights[0].indices) if single else None
        for i in remaining
    ]
    computed = _computed(graph, survey, roots)
    return DerivedWeights(simple, [Derived(remaining, computed, starts[-1], shifted, rows)], paths)


def _meets_data(survey: Survey, root: Node) -> bool:
    """Return whether an operation into which data enter uses a leaf or weight."""
    nodes = (node for node, of in survey.root_of.items() if of is root)
    return any(user not in survey.origins for node in nodes for user in node.users)


def _uses_of_multiples(
    survey: Survey, number: int, uses: dict[Node, list[Use]]
) -> list[Use] | None:
    """Return the uses of weights as those of a leaf, None if they are no multiples of it."""
    leaf = survey.leaves[number]
    of_leaf: list[Use] = []
    for root, of_root in uses.items():
        if number in survey.origins[root]:
            multiple = multiple_of(survey, leaf, root)
            if multiple is None:
                return None
            indices, coefficient = multiple
            of_leaf += [
                _scaled(use, coefficient)._replace(indices=indices.reshape(-1)[use.indices])
                for use in of_root
            ]
    return of_leaf


def _scaled(use: Use, coefficient: float) -> Use:
    """Return the use of a multiple of a weight as a use of the weight."""
    read_a, read_b = use.read_a, use.read_b
    if coefficient == 1:
        return use
    if use.source is not None and not use.source.meta[DTYPE].is_floating_point:
        return use._replace(read_b=lambda b: coefficient * read_b(b))  # a are places
    return use._replace(read_a=lambda x: coefficient * read_a(x))


def _computed(graph: GraphModule, survey: Survey, roots: Sequence[Node]) -> GraphModule:
    """Return the part of a graph that computes some weights, as one vector, from the leaves."""
    part = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        if node in survey.origins:
            copies[node] = part.node_copy(node, copies.__getitem__)
    flat = [part.call_function(aten.reshape.default, (copies[root], [-1])) for root in roots]
    part.output(part.call_function(torch.cat, (flat,)))
    part.eliminate_dead_code()
    return GraphModule(graph, part)
