"""Selection rules: functions of the ascending eigenvalues that choose directions for the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.checks import check_nonnegative


@dataclass(frozen=True)
class Leading:
    """The rule of `top_k`: a class, for its k says how many eigenpairs must be computed at all.

    This and the rules below say so by ``asked``, of the leading ones of the eigenvalues and the sum
    of all: how many of them the rule takes, and the bound that they are above, if there is one.
    """

    k: int

    def asked(self, _evals: Float[Tensor, " m"], _total: Float[Tensor, ""]) -> tuple[int, None]:
        """Return k, and no bound."""
        return self.k, None

    def __call__(self, evals: Float[Tensor, " i"]) -> Int[Tensor, " k"]:
        """Return the indices of the k largest eigenvalues, all if there are fewer."""
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


@dataclass(frozen=True)
class Above:
    """The rule of `above`: a class, for its threshold says when enough eigenpairs are computed."""

    threshold: float | Tensor
    relative: bool

    def asked(self, evals: Float[Tensor, " m"], _total: Float[Tensor, ""]) -> tuple[int, float]:
        """Return how many eigenvalues are above the threshold, and the threshold."""
        bound = float(self.threshold) * (float(evals[-1]) if self.relative else 1.0)
        return int((evals > bound).sum()), bound

    def __call__(self, evals: Float[Tensor, " i"]) -> Bool[Tensor, " i"]:
        """Return which eigenvalues are above the threshold."""
        return evals > (self.threshold * evals[-1] if self.relative else self.threshold)


def above(threshold: float, relative: bool = True) -> Above:
    """Return a rule that takes eigenvalues above a threshold, relative to the largest or absolute.

    Examples
    --------
    >>> import torch
    >>> above(0.1)(torch.tensor([0.0, 1.0, 5.0])).tolist()
    [False, True, True]
    """
    check_nonnegative("above: threshold", threshold)
    return Above(threshold, relative)


@dataclass(frozen=True)
class Energy:
    """The rule of `energy`: a class, for its fraction says when enough eigenpairs are computed."""

    fraction: float

    def asked(self, evals: Float[Tensor, " m"], total: Float[Tensor, ""]) -> tuple[int, None]:
        """Return how many eigenvalues have the fraction of the sum of all, and no bound."""
        return int(_are_taken(evals, self.fraction * float(total)).sum()), None

    def __call__(self, evals: Float[Tensor, " i"]) -> Bool[Tensor, " i"]:
        """Return which eigenvalues are the fewest leading ones with the fraction of their sum."""
        return _are_taken(evals, self.fraction * evals.flip(0).cumsum(0)[-1])


def energy(fraction: float) -> Energy:
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
    return Energy(fraction)


def _are_taken(evals: Float[Tensor, " i"], amount: float | Tensor) -> Bool[Tensor, " i"]:
    """Return which eigenvalues are taken while the sum of all larger ones is below an amount."""
    sums = evals.flip(0).cumsum(0)
    before = torch.cat([sums.new_zeros(1), sums[:-1]])
    return (before < amount).flip(0)
