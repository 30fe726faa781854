"""Pytrees of parameters and of samples; the only file that imports a library of pytrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
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

from ddnewton.dtensors import placed_like
from ddnewton.types import PyTree

__all__ = [
    "TreeSpec",
    "as_batch",
    "as_real",
    "batches",
    "chunks",
    "device_to_go_to",
    "flattened",
    "joined",
    "leaf_paths",
    "moved_to",
    "moving",
    "named_leaves",
    "on_copies",
    "on_pairs",
    "parameter_count",
    "real_count",
    "real_outputs",
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
    """Return the leaves with their key paths, ``"['layer']['weight']"``, "" for one tensor."""
    leaves, _ = tree_flatten_with_path(tree)
    return [(keystr(path), leaf) for path, leaf in leaves]


def leaf_paths(tree: PyTree) -> list[str]:
    """Return the path of every leaf, keys joined by dots as in ``named_parameters``."""
    leaves, _ = tree_flatten_with_path(tree)
    return [".".join(map(_key, path)) for path, _ in leaves]


def _key(entry: Any) -> str:
    """Return the key of a dict, the index of a sequence, or the name of a field."""
    keys = (getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind))
    return str(next(keys, entry))


def sample_count(X: PyTree) -> int:
    """Return the number of samples: the length of axis 0 of the first leaf."""
    return int(tree_leaves(X)[0].shape[0])


def parameter_count(params: PyTree) -> int:
    """Return the number of parameters: the entries of all leaves."""
    return sum(leaf.numel() for leaf in tree_leaves(params))


def take(X: PyTree, samples: slice | Tensor) -> PyTree:
    """Return the batch of some of the samples of a batch; their indices may be elsewhere."""
    leaves, structure = tree_flatten(X)
    for i, leaf in enumerate(leaves):  # of a slice in a closure, torch.compile fixes the ends
        rows = samples.to(leaf.device) if isinstance(samples, Tensor) else samples
        leaves[i] = leaf[rows]
    return tree_unflatten(leaves, structure)


def device_to_go_to(X: PyTree, params: PyTree) -> torch.device | None:
    """Return where samples have to go that are on no device of the parameters, None if on one."""
    devices = [leaf.device for leaf in tree_leaves(params)]
    samples = [leaf.device for leaf in tree_leaves(X) if isinstance(leaf, Tensor)]
    return None if not devices or all(device in devices for device in samples) else devices[0]


def moved_to(X: PyTree, device: torch.device | None) -> PyTree:
    """Return samples on a device, None for where they are."""
    if device is None:
        return X
    # To the host a copy that nobody waits for would be read too early.
    return tree_map(lambda leaf: leaf.to(device, non_blocking=device.type != "cpu"), X)


def moving(function: Callable[..., Tensor], device: torch.device | None) -> Callable[..., Tensor]:
    """Return a function of parameters and samples that moves these to a device first."""
    return function if device is None else partial(_called_there, function, device)


def _called_there(
    function: Callable[..., Tensor], device: torch.device, params: PyTree, X: PyTree
) -> Tensor:
    """Call a function of parameters and samples with the samples moved to a device."""
    return function(params, moved_to(X, device))


def chunks(n: int, size: int) -> list[slice]:
    """Cut range(n) into slices of at most ``size``."""
    # What torch compiles is for any n with as many slices.
    last = -(-n // size) - 1
    return [slice(i * size, (i + 1) * size if i < last else n) for i in range(last + 1)]


def batches(X: PyTree, size: int | None) -> list[PyTree]:
    """Cut a batch into batches of at most ``size`` samples; a size of one is taken as two."""
    n = sample_count(X)
    size = max(2, size or n)
    return [take(X, slice(start, start + size)) for start in range(0, n, size)]


def on_copies(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function called on copies, so that it may write to its arguments."""

    def with_copies(*args: PyTree) -> Tensor:
        return function(*tree_map(torch.clone, args))

    return with_copies


def as_batch(x: PyTree) -> PyTree:
    """Return one sample as a batch of one."""
    return tree_map(lambda leaf: leaf[None], x)


def as_real(tree: PyTree) -> PyTree:
    """Return a tree with every complex tensor as pairs of reals, along a new last axis."""
    has_pairs = any(isinstance(x, Tensor) and x.is_complex() for x in tree_leaves(tree))
    return tree_map(_as_real_leaf, tree) if has_pairs else tree


def _as_real_leaf(leaf: Any) -> Any:
    is_complex = isinstance(leaf, Tensor) and leaf.is_complex()
    return torch.view_as_real(leaf.resolve_conj()) if is_complex else leaf


def on_pairs(function: Callable[..., Tensor], params: PyTree) -> Callable[..., Tensor]:
    """Return a function that takes pairs of reals where ``params`` has complex leaves.

    It is the function itself where there are none.
    """
    is_complex = [leaf.is_complex() for leaf in tree_leaves(params)]
    return partial(_called_on_pairs, function, is_complex) if any(is_complex) else function


def _called_on_pairs(
    function: Callable[..., Tensor], is_complex: Sequence[bool], params: PyTree, X: PyTree
) -> Tensor:
    """Call a function of parameters and samples, with pairs made complex numbers."""
    leaves, spec = tree_flatten(params)
    pairs = zip(leaves, is_complex, strict=True)
    numbers = [torch.view_as_complex(leaf) if pair else leaf for leaf, pair in pairs]
    return function(tree_unflatten(numbers, spec), X)


def real_outputs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function with complex outputs as one whose outputs are pairs of reals."""
    return lambda *args: torch.view_as_real(function(*args).resolve_conj())


def real_count(leaf: Tensor) -> int:
    """Return the number of reals in a tensor: a complex number has two."""
    return leaf.numel() * (2 if leaf.is_complex() else 1)


def joined(
    flat: Sequence[Float[Tensor, "*k _"]], blocks: Sequence[Sequence[int]], sizes: Sequence[int]
) -> Float[Tensor, "*k d"]:
    """Return one vector of all leaves from a vector of every block of leaves.

    Leaves in no block are zero. ``blocks`` are the numbers of the leaves in each block, and
    ``sizes`` the lengths of all leaves. There may be several vectors, along axes in front.
    """
    parts = _split_into_leaves(flat, blocks, sizes)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def along_block(
    vector: Shaped[Tensor, " d"], block: Sequence[int], sizes: Sequence[int]
) -> Shaped[Tensor, " _"]:
    """Return the part of one vector of all leaves along those of a block: `joined` puts it back."""
    parts = vector.split(list(sizes))
    return torch.cat([vector[:0], *(parts[leaf] for leaf in block)])


def _split_into_leaves(
    flat: Sequence[Float[Tensor, "*k _"]], blocks: Sequence[Sequence[int]], sizes: Sequence[int]
) -> list[Float[Tensor, "*k _"]]:
    """Return the part of every leaf in the vectors of the blocks, zeros for a leaf in no block."""
    in_blocks: dict[int, Tensor] = {}
    for vector, block in zip(flat, blocks, strict=True):
        parts = vector.split([sizes[leaf] for leaf in block], -1)
        in_blocks |= dict(zip(block, parts, strict=True))
    zeros = flat[0].new_zeros
    return [
        in_blocks[leaf] if leaf in in_blocks else zeros((*flat[0].shape[:-1], size))
        for leaf, size in enumerate(sizes)
    ]


def flattened(tree: PyTree) -> Float[Tensor, " d"]:
    """Return the leaves of a tree as one vector of reals, in float64."""
    return torch.cat([leaf.double().reshape(-1) for leaf in tree_leaves(as_real(tree))])


def unflattened(vector: Float[Tensor, " d"], like: PyTree) -> PyTree:
    """Return a vector of all leaves as a tree like ``like``: the inverse of `flattened`.

    `unflatten` does the same for vectors of blocks of leaves.
    """
    return unflatten([vector], [range(len(tree_leaves(like)))], like)


def unflatten(
    flat: Sequence[Float[Tensor, "*k _"]], blocks: Sequence[Sequence[int]], like: PyTree
) -> PyTree:
    """Return the vectors of blocks of leaves as a tree like ``like``.

    Every leaf gets the shape, dtype, device and placements that it has in ``like``, complex ones
    from pairs of reals; leaves in no block are zero. There may be several vectors of every block,
    along axes in front. `unflattened` does the same for one vector of all leaves.
    """
    leaves, spec = tree_flatten(like)
    parts = _split_into_leaves(flat, blocks, list(map(real_count, leaves)))
    return tree_unflatten(list(map(_shaped, parts, leaves)), spec)


def _shaped(part: Float[Tensor, "*k _"], leaf: Tensor) -> Tensor:
    """Return vectors in the shape, dtype, device and placements of a leaf."""
    shape = (*part.shape[:-1], *leaf.shape)
    if leaf.is_complex():
        pairs = part.reshape((*shape, 2)).to(dtype=leaf.dtype.to_real(), device=leaf.device)
        return placed_like(torch.complex(*pairs.unbind(-1)), leaf)
    return placed_like(part.reshape(shape).to(dtype=leaf.dtype, device=leaf.device), leaf)
