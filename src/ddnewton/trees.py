"""Pytrees of parameters and of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from ddnewton.types import PyTree


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Return every leaf with its key path, ``"['layer']['weight']"``; a lone leaf has none."""
    leaves, _ = tree_flatten_with_path(tree)
    return [(keystr(path), leaf) for path, leaf in leaves]


def sample_count(X: PyTree) -> int:
    """Return the length of axis 0 of the first leaf."""
    return int(tree_leaves(X)[0].shape[0])


def parameter_count(params: PyTree) -> int:
    """Return the number of entries of all leaves together."""
    return sum(leaf.numel() for leaf in tree_leaves(params))


def take(X: PyTree, samples: slice) -> PyTree:
    """Return the samples of a batch."""
    return tree_map(lambda x: x[samples], X)


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


def unflatten(flat: Float[Tensor, " d"], like: PyTree) -> PyTree:
    """Cut a vector into the leaves of a tree, each with the leaf's shape, dtype and device."""
    leaves, spec = tree_flatten(like)
    pieces = flat.split([leaf.numel() for leaf in leaves])
    cast = [
        piece.reshape(leaf.shape).to(dtype=leaf.dtype, device=leaf.device)
        for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return tree_unflatten(cast, spec)
