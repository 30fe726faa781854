"""Which samples of a batch give the slopes, the directions and the curvatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import distinct

Indices: TypeAlias = Sequence[int] | slice | Tensor


class Samples(NamedTuple):
    """Samples by their numbers; None for all of the batch.

    Without ``curvatures``, curvatures are those of the samples that give the directions.
    """

    slopes: Int[Tensor, " _"] | None
    directions: Int[Tensor, " _"] | None
    curvatures: Int[Tensor, " _"] | None


def indices(name: str, chosen: Indices | None, n: int, device: torch.device) -> Tensor | None:
    """Return distinct numbers of samples, counted from 0; refuse what is none."""
    if chosen is None:
        return None
    rule = f"{name} must hold distinct indices of samples"
    remedy = f"The batch has {n} samples: index them from 0."
    try:
        listed = range(n)[chosen] if isinstance(chosen, slice) else chosen
        found = torch.as_tensor(listed, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(sentence(rule, repr(chosen), remedy)) from error
    if found.layout != torch.strided:
        raise BadType(sentence(rule, f"a tensor of layout {found.layout}", remedy))
    if found.ndim != 1 or found.numel() == 0:
        got = "none" if found.numel() == 0 else f"shape {list(found.shape)}"
        raise BadValue(sentence(rule, got, remedy))
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        got = "a mask" if found.dtype == torch.bool else f"numbers of {found.dtype}"
        remedy += " For a mask, pass mask.nonzero()[:, 0]." * (found.dtype == torch.bool)
        raise BadType(sentence(rule, got, remedy))
    return distinct(found, n, rule, remedy)


def rows_among(
    chosen: Int[Tensor, " _"] | None, known: Int[Tensor, " _"] | None, n: int
) -> tuple[Int[Tensor, " _"] | None, Int[Tensor, " _"] | None]:
    """Return in which row to find samples, given those with a row, and which come in new rows.

    None stands for all n samples, for all rows in their order, and for no new row.
    """
    if known is None:
        return chosen, None
    chosen = torch.arange(n, device=known.device) if chosen is None else chosen
    row = chosen.new_full((n,), -1)
    row[known] = torch.arange(len(known), device=known.device)
    new = chosen[row[chosen] < 0]
    row[new] = len(known) + torch.arange(len(new), device=known.device)
    return row[chosen], new if len(new) else None
