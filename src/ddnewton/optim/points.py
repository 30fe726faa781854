"""Inputs and targets of a fit: tensors, or functions of the number of updates."""

from __future__ import annotations

from ddnewton.trees import tree_leaves, tree_map
from ddnewton.types import PyTree


def points_at(points: PyTree, updates: int) -> PyTree:
    """Return inputs or targets with every function in them called once."""
    return tree_map(lambda leaf: leaf(updates) if callable(leaf) else leaf, points)


def are_fixed(*points: PyTree) -> bool:
    """Return whether inputs and targets are the same at every update."""
    return not any(map(callable, tree_leaves(points)))
