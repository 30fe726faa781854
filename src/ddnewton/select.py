"""Which directions to take: ready-made rules, and what becomes of the user's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.checks import check_nonnegative, distinct
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.spectrum import Spectrum
from ddnewton.transforms import is_batched
from ddnewton.types import Select


class Leading(NamedTuple):
    """The rule of `top_k`, which tells that no other eigenpairs are needed."""

    k: int

    def __call__(self, evals: Float[Tensor, " i"]) -> Int[Tensor, " k"]:
        """Return the indices of the k largest."""
        count = evals.shape[0]
        return torch.arange(max(0, count - self.k), count, device=evals.device)


def top_k(k: int) -> Leading:
    """Return a rule that takes the k largest eigenvalues, or all if there are fewer.

    Examples
    --------
    >>> import torch
    >>> top_k(2)(torch.tensor([0.0, 1.0, 5.0])).tolist()
    [1, 2]
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise BadType(sentence("top_k: k must be an integer", type(k).__name__, "Pass a count."))
    if k < 1:
        raise BadValue(sentence("top_k: k must be at least 1", k, "Pass a count."))
    return Leading(k)


def above(threshold: float, relative: bool = True) -> Select:
    """Return a rule that takes eigenvalues above a threshold, relative to the largest or absolute.

    Examples
    --------
    >>> import torch
    >>> above(0.1)(torch.tensor([0.0, 1.0, 5.0])).tolist()
    [False, True, True]
    """
    check_nonnegative("above: threshold", threshold)

    def beyond(evals: Float[Tensor, " i"]) -> Bool[Tensor, " i"]:
        return evals > (threshold * evals[-1] if relative else threshold)

    return beyond


def energy(fraction: float) -> Select:
    """Return a rule that takes the fewest leading eigenvalues whose sum is a fraction of the trace.

    Examples
    --------
    >>> import torch
    >>> energy(0.9)(torch.tensor([0.5, 1.0, 3.0, 6.0])).tolist()
    [False, True, True, True]
    """
    check_nonnegative("energy: fraction", fraction)
    if fraction > 1:
        rule = "energy: fraction must lie in 0 to 1"
        raise BadValue(sentence(rule, fraction, "Pass a share of the trace, such as 0.99."))

    def leading(evals: Float[Tensor, " i"]) -> Bool[Tensor, " i"]:
        sums = evals.flip(0).cumsum(0)
        before = torch.cat([sums.new_zeros(1), sums[:-1]])
        return (before < fraction * sums[-1]).flip(0)

    return leading


class Directions(NamedTuple):
    """The kept directions, in the order asked for; one that is not ``live`` counts for nothing.

    ``left_out`` marks, among the r directions of the spectrum, the live ones that were left out.
    """

    evals: Float[Tensor, " k"]
    evecs: Float[Tensor, "i k"]
    slopes: Float[Tensor, "a k"]
    span: Float[Tensor, "j k"]
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
        slopes=torch.where(live, spectrum.slopes[:, thin], 0),
        span=torch.where(live, spectrum.span[:, thin], 0),
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
