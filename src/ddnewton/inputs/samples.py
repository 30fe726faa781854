"""Sub-sampling: the samples of a batch that give the slopes, the directions and the curvatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.transforms import any_known, unwrapped

Indices: TypeAlias = Sequence[int] | slice | Tensor


class Samples(NamedTuple):
    """The samples of every quantity, as indices into the batch; None for all samples.

    Where ``curvatures`` is None, the samples that give the directions give the curvatures too.
    """

    slopes: Int[Tensor, " _"] | None
    directions: Int[Tensor, " _"] | None
    curvatures: Int[Tensor, " _"] | None


def indices(name: str, samples: Indices | None, n: int, device: torch.device) -> Tensor | None:
    """Return a sub-sample of n samples as distinct indices from 0 to n − 1; None for all."""
    if samples is None:
        return None
    # Any sequence of integers will do, negative ones and slices as in Python.
    rule = f"{name} must hold distinct indices of samples"
    remedy = "Index the samples from 0."
    if not torch.compiler.is_compiling():  # to which their number is not known
        remedy = f"The batch has {n} samples: index them from 0."
    try:
        listed = range(n)[samples] if isinstance(samples, slice) else samples
        index = torch.as_tensor(listed, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(sentence(rule, repr(samples), remedy)) from error
    # One axis of integers, not empty. A mask is refused: how many it selects is in its values.
    if index.layout != torch.strided:
        raise BadType(sentence(rule, f"a tensor of layout {index.layout}", remedy))
    if index.ndim != 1 or index.numel() == 0:
        got = "none" if index.numel() == 0 else f"shape {list(index.shape)}"
        raise BadValue(sentence(rule, got, remedy))
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        got = "a mask" if index.dtype == torch.bool else f"numbers of {index.dtype}"
        remedy += " For a mask, pass mask.nonzero()[:, 0]." * (index.dtype == torch.bool)
        raise BadType(sentence(rule, got, remedy))
    # Those of a slice are distinct, and none is negative.
    return index if isinstance(samples, slice) else distinct(index, n, rule, remedy)


def rows_among(
    samples: Int[Tensor, " _"] | None, row_samples: Int[Tensor, " _"] | None, n: int
) -> tuple[Int[Tensor, " _"] | None, Int[Tensor, " _"] | None]:
    """Return the row of every sample in a matrix with a row for each of ``row_samples``.

    Samples without a row get new ones behind these, in their order; the second result is the
    samples of the new rows. None stands for all n samples, for all rows in their order, and for no
    new row.
    """
    if row_samples is None:
        return samples, None
    samples = torch.arange(n, device=row_samples.device) if samples is None else samples
    if torch.compiler.is_compiling():  # which cannot count by values: new rows for all of them
        new_rows = torch.arange(len(samples), device=row_samples.device)
        return len(row_samples) + new_rows, samples
    # A table of the row of every sample, −1 where it has none.
    row = samples.new_full((n,), -1)
    row[row_samples] = torch.arange(len(row_samples), device=row_samples.device)
    # The new rows come behind.
    new = samples[row[samples] < 0]
    row[new] = len(row_samples) + torch.arange(len(new), device=row_samples.device)
    return row[samples], new if len(new) else None


def distinct(indices: Tensor, count: int, rule: str, remedy: str) -> Tensor:
    """Require distinct indices from −count to count − 1, and return them as 0 to count − 1."""
    indices = indices.long()  # in a smaller dtype, adding the count could overflow
    values = unwrapped(indices)
    if any_known((values < -count) | (values >= count)):
        got = f"indices from {int(values.min())} to {int(values.max())}"
        raise BadValue(sentence(rule, got, remedy))
    indices = torch.where(indices < 0, indices + count, indices)
    ordered = unwrapped(indices).sort(-1).values
    if any_known(ordered.diff(dim=-1) == 0):
        raise BadValue(sentence(rule, f"repeats in {values.tolist()}", remedy))
    return indices
