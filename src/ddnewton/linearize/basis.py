r"""The basis L of a loss's Hessian: a matrix for every sample, or blocks of its positions.

Where a loss is a sum over positions (tokens, pixels), L [c, m] is block diagonal: the columns of a
position are zero at the outputs of all others. Of a sentence of T tokens T² blocks would be stored,
and as many cotangents, of which T are not zero. So blocks are kept as they are, and columns are
written out where they are pulled back, some at a time.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor


class PositionBlocks(NamedTuple):
    """L of a loss that sums over positions: the block of every position, v outputs by m columns.

    A sample's outputs run over [v, t], positions fastest; its columns over [t, m]. In place of a
    `Tensor` [n, c, m] it has the same shape, device and dtype as that.
    """

    blocks: Float[Tensor, "n t v m"]

    @property
    def shape(self) -> torch.Size:
        """The shape of L: samples, outputs, and columns."""
        n, t, v, m = self.blocks.shape
        return torch.Size((n, v * t, t * m))

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.blocks.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the blocks."""
        return self.blocks.dtype


Basis: TypeAlias = Tensor | PositionBlocks
"""L of some samples [n, c, m]: as it is, or as the blocks of positions."""


def of_positions(blocks: Float[Tensor, "n t v m"]) -> Basis:
    """Return the basis of positions; that of a single one is a matrix."""
    return blocks[:, 0] if blocks.shape[1] == 1 else PositionBlocks(blocks)


def stored(basis: Basis) -> Tensor:
    """Return the entries of a basis that are stored, samples first."""
    return basis.blocks if isinstance(basis, PositionBlocks) else basis


def with_stored(basis: Basis, entries: Tensor) -> Basis:
    """Return a basis of the same form with other entries, perhaps of other samples."""
    return PositionBlocks(entries) if isinstance(basis, PositionBlocks) else entries


def basis_at(basis: Basis, samples: Int[Tensor, " _"] | slice) -> Basis:
    """Return the basis of some samples."""
    return with_stored(basis, stored(basis)[samples])


def written_columns(basis: Basis, columns: slice) -> Float[Tensor, "n c k"]:
    """Return some columns of a basis, with their zeros at the outputs of other positions."""
    if not isinstance(basis, PositionBlocks):
        return basis[:, :, columns]
    # Take column r of the block of position s, and put it at this position.
    n, t, v, m = basis.blocks.shape
    numbers = torch.arange(t * m, device=basis.device)[columns]
    positions = numbers // m
    of_blocks = basis.blocks.transpose(2, 3).flatten(1, 2)[:, columns]  # [n k v]
    there = positions[:, None, None] == torch.arange(t, device=basis.device)  # [k 1 t]
    return torch.where(there, of_blocks[..., None], 0).movedim(1, 3).reshape(n, v * t, -1)


def written_out(basis: Basis) -> Float[Tensor, "n c m"]:
    """Return a basis as matrices, with all zeros."""
    return written_columns(basis, slice(None)) if isinstance(basis, PositionBlocks) else basis


def combined(basis: Basis, weights: Float[Tensor, "n m"]) -> Float[Tensor, "n c"]:
    """Return L w for every sample."""
    if not isinstance(basis, PositionBlocks):
        return torch.einsum("ncm,nm->nc", basis, weights)
    t, m = basis.blocks.shape[1], basis.blocks.shape[3]
    return torch.einsum("ntvm,ntm->nvt", basis.blocks, weights.unflatten(1, (t, m))).flatten(1)


def projected(basis: Basis, vectors: Float[Tensor, "n c k"]) -> Float[Tensor, "n m k"]:
    """Return Lᵀv of several vectors for every sample."""
    if not isinstance(basis, PositionBlocks):
        return torch.einsum("ncm,nck->nmk", basis, vectors)
    t, v = basis.blocks.shape[1:3]
    by_position = vectors.unflatten(1, (v, t))
    return torch.einsum("ntvm,nvtk->ntmk", basis.blocks, by_position).flatten(1, 2)
