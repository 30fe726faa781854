"""Trees of tensors on meshes of ranks, for tests: placed by short texts, and gathered.

A text has a letter for every axis of the mesh: "0" and "1" are shards along that axis of the
tensor, "r" is a replica. A tensor with the text "" stays plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_map


def mesh_of(axes: int = 1) -> DeviceMesh:
    """All ranks in a row, or along two axes of which the first has two."""
    size = distributed.get_world_size()
    return init_device_mesh("cpu", (size,) if axes == 1 else (2, size // 2))


def placed(tensor: Tensor, text: str, mesh: DeviceMesh) -> Tensor:
    """A tensor that is the same on all ranks as a DTensor."""
    if not text:
        return tensor
    placements = [Replicate() if letter == "r" else Shard(int(letter)) for letter in text]
    return distribute_tensor(tensor, mesh, placements)


def placed_tree(tree: Any, texts: Any) -> Any:
    """Every leaf placed by its text."""
    mesh = mesh_of(max(map(len, texts.values())))
    return {name: placed(leaf, texts[name], mesh) for name, leaf in tree.items()}


def text_of(leaf: Any) -> str:
    """How a leaf is placed."""
    if not isinstance(leaf, DTensor):
        return ""
    return "".join("r" if p.is_replicate() else str(p.dim) for p in leaf.placements)


def texts_of(tree: Any) -> Any:
    """How every leaf of a tree is placed."""
    return tree_map(text_of, tree)


def gathered(tree: Any) -> Any:
    """The tree with every DTensor as a whole tensor."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def same_on_all(values: list[Any]) -> bool:
    """Whether trees of all ranks are the same to the bit."""
    first, *others = (torch.utils._pytree.tree_leaves(value) for value in values)
    return all(
        len(first) == len(leaves)
        and all(
            torch.equal(a, b) or bool((a.isnan() & b.isnan()).all())
            for a, b in zip(first, leaves, strict=True)
        )
        for leaves in others
    )
