"""The order of the parameters as ranges of the factors' entries, copied instead of looked up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

MOST_RUNS = 256
"""Up to how many ranges are copied one by one."""


def runs_of(order: Int[Tensor, " d"]) -> list[slice] | None:
    """Return places as ranges, one after the other; None if there are many, or none of a number.

    >>> runs_of(torch.tensor([3, 4, 0, 1, 2]))
    [slice(3, 5, None), slice(0, 3, None)]
    """
    breaks = (order.diff() != 1).nonzero()[:, 0] + 1
    if len(breaks) >= MOST_RUNS or len(order.unique()) < len(order):
        return None
    firsts = order[torch.cat([breaks.new_zeros(1), breaks])].tolist()
    lengths = [len(part) for part in order.tensor_split(breaks.cpu())]
    return [slice(first, first + size) for first, size in zip(firsts, lengths, strict=True)]


def in_runs(
    parts: Sequence[Float[Tensor, "*rows _"]], runs: Sequence[slice]
) -> Float[Tensor, "*rows d"]:
    """Return the entries of all factors, part by part, in ranges of them, by one copy."""
    starts = list(accumulate((part.shape[-1] for part in parts), initial=0))
    cut = []
    for run in runs:
        for start, part in zip(starts, parts, strict=False):
            first, last = max(run.start - start, 0), min(run.stop - start, part.shape[-1])
            if first < last:
                cut.append(part[..., first:last])
    return torch.cat(cut, -1)
