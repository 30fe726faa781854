"""The directions that are kept: what becomes of a caller's selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.groups import Block
from ddnewton.inputs.samples import distinct
from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.spectrum import Spectrum
from ddnewton.transforms import is_batched
from ddnewton.types import Select

Selection: TypeAlias = tuple[Int[Tensor, " k"], Bool[Tensor, " k"]]
"""Indices of eigenvalues, and which of these are wanted at all: under ``vmap`` maybe not all."""


class Directions(NamedTuple):
    """The kept directions, in the order asked for; one that is not ``live`` counts for nothing.

    ``left_out`` marks, among the r directions of the spectrum, the live ones that were left out.
    """

    evals: Float[Tensor, " k"]
    evecs: Float[Tensor, "i k"]
    column_slopes: Float[Tensor, "a k"]  # a_iᵀ e_k
    vectors: Float[Tensor, "j k"]  # e_k, in the coordinates of the spectrum
    live: Bool[Tensor, " k"]
    left_out: Bool[Tensor, " r"]


class BlockDirections(NamedTuple):
    """A block with its spectrum, the directions that are kept, and the derivatives along them."""

    block: Block
    spectrum: Spectrum
    kept: Directions
    derivatives: Derivatives


def selection_of(spectrum: Spectrum, select: Select | None, dtype: torch.dtype) -> Selection:
    """Return which eigenvalues ``select`` asks for, all live ones for None.

    ``select`` gets all NM eigenvalues in the user's dtype.
    """
    if select is not None:
        return checked_selection(select(spectrum.evals.to(dtype, copy=True)), spectrum.evals)
    # Of all eigenvalues, those before the last r are zero and have no vector.
    count, r = spectrum.evals.shape[0], spectrum.live.shape[0]
    return _from_mask(torch.nn.functional.pad(spectrum.live, (count - r, 0)))


def keep(spectrum: Spectrum, selection: Selection) -> Directions:
    """Return the directions that were asked for, of a spectrum that has their eigenvectors."""
    count, r = spectrum.evals.shape[0], spectrum.live.shape[0]
    indices, wanted = selection
    # Their places among the last r; where there is none, any place will do: it is not live.
    places = (indices - (count - r)).clamp(min=0)
    live = spectrum.live[places] & wanted & (indices >= count - r)
    # Which directions of the spectrum are kept: the live ones among the others are left out.
    taken = (places[:, None] == torch.arange(r, device=places.device)) & live[:, None]
    return Directions(
        evals=spectrum.evals[indices],
        evecs=torch.where(indices >= count - r, spectrum.evecs[:, places], 0),
        column_slopes=torch.where(live, spectrum.column_slopes[:, places], 0),
        vectors=torch.where(live, spectrum.vectors[:, places], 0),
        live=live,
        left_out=spectrum.live & ~taken.any(0),
    )


def _from_mask(mask: Bool[Tensor, " i"]) -> Selection:
    """Return the indices that a mask asks for, and a mask of them.

    Under ``vmap`` their number is not known: all indices, and the mask itself.
    """
    if is_batched(mask):
        return torch.arange(mask.shape[0], device=mask.device), mask
    indices = mask.nonzero()[:, 0]
    return indices, torch.ones_like(indices, dtype=torch.bool)


def checked_selection(answer: Tensor | Sequence[int], evals: Float[Tensor, " i"]) -> Selection:
    """Return a caller's selection as indices, and refuse anything else."""
    count = evals.shape[0]
    rule = "select must return distinct indices of the eigenvalues, or a boolean mask"
    remedy = "They are in ascending order: index them from 0."
    if not torch.compiler.is_compiling():  # to which their number is not known
        remedy = f"There are {count} eigenvalues, in ascending order: index them from 0."
    # Any sequence of indices will do, or a mask.
    try:
        if torch.compiler.is_compiling() and isinstance(answer, list):
            # Numbers that follow from that of the eigenvalues stay symbols.
            entries = [torch.full((), index, device=evals.device) for index in answer]
            answer = torch.stack(entries) if entries else []
        selection = torch.as_tensor(answer, device=evals.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(sentence(rule, repr(answer), remedy)) from error
    if selection.numel() == 0 and selection.dtype != torch.bool:
        selection = selection.long()
    if selection.ndim != 1:
        raise BadValue(sentence(rule, f"shape {list(selection.shape)}", remedy))
    # A mask has an entry for every eigenvalue.
    if selection.dtype == torch.bool:
        if selection.shape[0] != count:
            raise BadValue(sentence(rule, f"a mask of length {selection.shape[0]}", remedy))
        return _from_mask(selection)
    # Indices are distinct integers.
    if selection.is_floating_point() or selection.is_complex():
        raise BadType(sentence(rule, f"numbers of {selection.dtype}", remedy))
    indices = distinct(selection, count, rule, remedy)
    return indices, torch.ones_like(indices, dtype=torch.bool)
