"""Which entries of a leaf every entry of a weight that is computed from it depends on.

It is read off the operations, not off values, for it must hold for any values of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ddnewton.linearize.structured.rules import SHAPE, aten
from ddnewton.linearize.structured.uses import CASTING, REARRANGING, Survey, rearranged

REDUCING = {aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.linalg_vector_norm.default: 2}
"""Operations that reduce their first argument along some axes, and which argument names these."""

LINEAR = {
    getattr(getattr(aten, name), overload): name
    for name in ("add", "sub", "rsub", "mul", "div")
    for overload in ("Tensor", "Scalar")
} | {aten.neg.default: "neg"}
"""Operations that are linear in one of their operands, beside another one that is constant."""


class Dependence(NamedTuple):
    """The part of a leaf that each entry depends on, and the multiple of it that it is.

    Of a tuple of results the parts are a tuple too. Without a coefficient it is no multiple.
    """

    parts: Any
    coefficient: float | None


def rows_of_leaf(
    survey: Survey, leaf: Node, root: Node, indices: Int[Tensor, "g o p"]
) -> Int[Tensor, "rows _"] | None:
    """Return the entries of a leaf that every row of a weight depends on, alone of all rows.

    The entries are counted in the leaf, the rows g·o of the weight are those of ``indices``. None
    if there are no such rows.
    """
    # The parts of the leaf are its entries, or its slices along one of its axes.
    if not survey.indices[leaf].numel():
        return None
    entries = survey.indices[leaf] - int(survey.indices[leaf].min())
    partitions = [(entries, entries.reshape(-1, 1))]
    for axis, size in enumerate(entries.shape):
        slices = torch.arange(size, device=entries.device)
        slices = slices.reshape(-1, *[1] * (entries.ndim - axis - 1)).expand(entries.shape)
        partitions.append((slices, entries.movedim(axis, 0).reshape(size, -1)))
    for parts, members in partitions:
        dependence = _dependences(survey, leaf, parts)[root]
        if dependence is None:
            continue
        # A row depends on one slice, or on as many entries as it has.
        of_rows = dependence.parts.reshape(-1)[indices.flatten(0, 1)]
        if parts is not entries:
            if not bool((of_rows == of_rows[:, :1]).all()):
                continue
            of_rows = of_rows[:, :1]
        rows: Tensor = members[of_rows].flatten(1)
        if rows.unique().numel() == rows.numel():
            return rows
    return None


def multiple_of(survey: Survey, leaf: Node, root: Node) -> tuple[Int[Tensor, "..."], float] | None:
    """Return of which parameter every entry of a weight is a multiple, plus a constant, and which.

    None if it is another function of them.
    """
    dependence = _dependences(survey, leaf, survey.indices[leaf])[root]
    if dependence is None or dependence.coefficient is None:
        return None
    return dependence.parts, dependence.coefficient


def _dependences(
    survey: Survey, leaf: Node, parts: Int[Tensor, "..."]
) -> dict[Node, Dependence | None]:
    """Return how the nodes that no data enter depend on the parts of a leaf, None for several."""
    of: dict[Node, Dependence | None] = {leaf: Dependence(parts, 1.0)}
    for node in survey.origins:
        operands = [x for x in node.all_input_nodes if x in of]
        if operands:
            parts_in = [x for x in map(of.__getitem__, operands) if x is not None]
            of[node] = (
                _dependence(node, operands, parts_in) if len(parts_in) == len(operands) else None
            )
    return of


def _dependence(
    node: Node, operands: Sequence[Node], of: Sequence[Dependence]
) -> Dependence | None:
    """Return how the result of an operation depends on what its operands depend on."""
    target: Any = node.target
    first = of[0]
    if target in CASTING:
        return first
    if target in REARRANGING:
        return first._replace(parts=rearranged(node, first.parts))
    if isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
        # Every entry of the result depends on one entry of every operand, of the same part.
        parts = [x.parts.expand(node.meta[SHAPE]) for x in of]
        same_parts = all(torch.equal(parts[0], x) for x in parts[1:])
        return Dependence(parts[0], _coefficient(node, operands[0], first)) if same_parts else None
    if target in REDUCING:
        arguments: Any = node.args
        axes, keep = (*arguments[REDUCING[target] :], None, False)[:2]
        least, largest = (f(first.parts, axes or (), bool(keep)) for f in (torch.amin, torch.amax))
        return Dependence(least, None) if torch.equal(least, largest) else None
    return None


def _coefficient(node: Node, operand: Node, of: Dependence) -> float | None:
    """Return the multiple of a part that the result of a pointwise operation is."""
    if of.coefficient is None or node.target not in LINEAR or node.kwargs or len(node.args) > 2:
        return None
    name, where = LINEAR[node.target], [argument is operand for argument in node.args]
    factor: Any = node.args[-1]
    if sum(where) == 1 and name in ("add", "sub", "rsub", "neg"):
        minus = name == "neg" or (name, where[0]) in (("sub", False), ("rsub", True))
        return -of.coefficient if minus else of.coefficient
    if where[0] and isinstance(factor, (int, float)):
        return of.coefficient * factor if name == "mul" else of.coefficient / factor
    return None
