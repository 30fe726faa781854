"""Pytrees of parameters and of samples: the only file that knows which library they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

from ddnewton.types import PyTree

__all__ = [
    "TreeSpec",
    "as_batch",
    "batches",
    "chunks",
    "flattened",
    "joined",
    "leaf_paths",
    "named_leaves",
    "on_copies",
    "parameter_count",
    "sample_count",
    "take",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_structure",
    "tree_unflatten",
    "unflatten",
    "unflattened",
]


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Return every leaf with its key path, ``"['layer']['weight']"``; a lone leaf has none."""
    leaves, _ = tree_flatten_with_path(tree)
    return [(keystr(path), leaf) for path, leaf in leaves]


def leaf_paths(tree: PyTree) -> list[str]:
    """Return the path of every leaf, keys joined by dots as in ``named_parameters``."""
    leaves, _ = tree_flatten_with_path(tree)
    return [".".join(map(_key, path)) for path, _ in leaves]


def _key(entry: Any) -> str:
    """Return the key of a dict, the index of a sequence, or the name of a field."""
    found = (getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind))
    return str(next(found, entry))


def sample_count(X: PyTree) -> int:
    """Return the length of axis 0 of the first leaf."""
    return int(tree_leaves(X)[0].shape[0])


def parameter_count(params: PyTree) -> int:
    """Return the number of entries of all leaves together."""
    return sum(leaf.numel() for leaf in tree_leaves(params))


def take(X: PyTree, samples: slice | Tensor) -> PyTree:
    """Return the samples of a batch."""
    return tree_map(lambda x: x[samples], X)


def chunks(n: int, size: int) -> list[slice]:
    """Return which of n things come together, at most ``size`` at a time."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def batches(X: PyTree, size: int | None) -> list[PyTree]:
    """Return a batch in pieces of at most ``size`` samples, but of two where ``size`` is one."""
    n = sample_count(X)
    size = max(2, size or n)
    return [take(X, slice(start, start + size)) for start in range(0, n, size)]


def on_copies(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that may write to its arguments without the caller's tensors changing."""

    def harmless(*args: PyTree) -> Tensor:
        return function(*tree_map(torch.clone, args))

    return harmless


def as_batch(x: PyTree) -> PyTree:
    """Return a batch that holds one sample."""
    return tree_map(lambda leaf: leaf[None], x)


def joined(
    flat: Sequence[Float[Tensor, "*k _"]], blocks: Sequence[Sequence[int]], sizes: Sequence[int]
) -> Float[Tensor, "*k d"]:
    """Return the vectors of blocks of leaves as those of all leaves, zero in no block."""
    parts = _by_leaf(flat, blocks, sizes)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _by_leaf(
    flat: Sequence[Float[Tensor, "*k _"]], blocks: Sequence[Sequence[int]], sizes: Sequence[int]
) -> list[Float[Tensor, "*k _"]]:
    found: dict[int, Tensor] = {}
    for vector, block in zip(flat, blocks, strict=True):
        found |= dict(zip(block, vector.split([sizes[leaf] for leaf in block], -1), strict=True))
    none = flat[0].new_zeros
    return [
        found[leaf] if leaf in found else none((*flat[0].shape[:-1], size))
        for leaf, size in enumerate(sizes)
    ]


def flattened(tree: PyTree) -> Float[Tensor, " d"]:
    """Return the leaves of a tree in one vector, in float64."""
    return torch.cat([leaf.double().reshape(-1) for leaf in tree_leaves(tree)])


def unflattened(vector: Float[Tensor, " d"], like: PyTree) -> PyTree:
    """Return a vector of all leaves as a tree: back from `flattened`."""
    return unflatten([vector], [range(len(tree_leaves(like)))], like)


def unflatten(
    flat: Sequence[Float[Tensor, "*k _"]], blocks: Sequence[Sequence[int]], like: PyTree
) -> PyTree:
    """Cut vectors into the leaves of a tree, each with the leaf's shape, dtype and device.

    A block of leaves has a vector, or several of them along axes in front; leaves in no block are
    zero.
    """
    leaves, spec = tree_flatten(like)
    parts = _by_leaf(flat, blocks, [leaf.numel() for leaf in leaves])
    cast = [
        part.reshape((*part.shape[:-1], *leaf.shape)).to(dtype=leaf.dtype, device=leaf.device)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return tree_unflatten(cast, spec)
