"""The directions that are kept: what becomes of a caller's selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import distinct
from ddnewton.quadratic.spectrum import Spectrum
from ddnewton.transforms import is_batched
from ddnewton.types import Select


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


def keep(spectrum: Spectrum, select: Select | None, dtype: torch.dtype) -> Directions:
    """Return the directions that ``select`` asks for; all live ones for None.

    ``select`` gets the eigenvalues in the user's dtype.
    """
    count, r = spectrum.evals.shape[0], spectrum.live.shape[0]
    if select is None:
        mask = torch.nn.functional.pad(spectrum.live, (count - r, 0))
        indices, wanted = _from_mask(mask)
    else:
        indices, wanted = _answer(select(spectrum.evals.to(dtype, copy=True)), spectrum.evals)
    # Below the last r, eigenvalues are exactly zero and have no vector: point at any, not live.
    thin = (indices - (count - r)).clamp(min=0)
    live = spectrum.live[thin] & wanted & (indices >= count - r)
    taken = (thin[:, None] == torch.arange(r, device=thin.device)) & live[:, None]
    return Directions(
        evals=spectrum.evals[indices],
        evecs=torch.where(indices >= count - r, spectrum.evecs[:, thin], 0),
        column_slopes=torch.where(live, spectrum.column_slopes[:, thin], 0),
        vectors=torch.where(live, spectrum.vectors[:, thin], 0),
        live=live,
        left_out=spectrum.live & ~taken.any(0),
    )


def _from_mask(mask: Bool[Tensor, " i"]) -> tuple[Int[Tensor, " k"], Bool[Tensor, " k"]]:
    """Return indices and which of them are wanted: under ``vmap`` the number kept is not known."""
    if is_batched(mask):
        return torch.arange(mask.shape[0], device=mask.device), mask
    indices = mask.nonzero()[:, 0]
    return indices, torch.ones_like(indices, dtype=torch.bool)


def _answer(
    answer: Tensor | Sequence[int], evals: Float[Tensor, " i"]
) -> tuple[Int[Tensor, " k"], Bool[Tensor, " k"]]:
    """Return a user's selection as indices; refuse what is no selection."""
    count = evals.shape[0]
    rule = "select must return distinct indices of the eigenvalues, or a boolean mask"
    remedy = f"There are {count} eigenvalues, in ascending order: index them from 0."
    try:
        chosen = torch.as_tensor(answer, device=evals.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(sentence(rule, repr(answer), remedy)) from error
    if chosen.numel() == 0 and chosen.dtype != torch.bool:
        chosen = chosen.long()
    if chosen.ndim != 1:
        raise BadValue(sentence(rule, f"shape {list(chosen.shape)}", remedy))
    if chosen.dtype == torch.bool:
        if chosen.shape[0] != count:
            raise BadValue(sentence(rule, f"a mask of length {chosen.shape[0]}", remedy))
        return _from_mask(chosen)
    if chosen.is_floating_point() or chosen.is_complex():
        raise BadType(sentence(rule, f"numbers of {chosen.dtype}", remedy))
    indices = distinct(chosen, count, rule, remedy)
    return indices, torch.ones_like(indices, dtype=torch.bool)
