"""Inputs and targets of a fit: tensors, or functions of the number of updates."""

from __future__ import annotations

from ddnewton.distributed.team import Team
from ddnewton.errors import BadType, sentence
from ddnewton.inputs.callables import accepts_updates, not_samples
from ddnewton.trees import named_leaves, tree_leaves, tree_map
from ddnewton.types import PyTree


def check_points(**points: PyTree) -> None:
    """Require functions among inputs and targets to take the number of updates."""
    for name, tree in points.items():
        for path, leaf in named_leaves(tree):
            if callable(leaf) and not accepts_updates(leaf):
                rule = (
                    "X and y must be tensors, pytrees of tensors, or functions of the number of "
                    "updates alone"
                )
                raise BadType(sentence(rule, *not_samples(name, tree, path, leaf)))


def points_at(points: PyTree, updates: int) -> PyTree:
    """Return inputs or targets with every function in them called once."""
    return tree_map(lambda leaf: leaf(updates) if callable(leaf) else leaf, points)


def are_fixed(team: Team | None, *points: PyTree) -> bool:
    """Return whether inputs and targets are the same at every update, on all ranks."""
    fixed = not any(map(callable, tree_leaves(points)))
    return fixed if team is None else all(team.exchanged(lambda: fixed))
