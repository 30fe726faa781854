"""The samples of a batch that a damping is chosen on, and those that are left for the step."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ddnewton.distributed.agreement import shards_of
from ddnewton.distributed.team import Team
from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.term_names import Name, about_term, check_keys, of_term, sample_counts
from ddnewton.inputs.terms import TermIndices
from ddnewton.trees import tree_leaves
from ddnewton.types import PyTree


def first_samples(
    model_fn: Any, X: PyTree, fraction: float, team: Team | None
) -> tuple[TermIndices, list[Int[Tensor, " _"]]]:
    """Return the samples of every term, on all ranks, but a last ``fraction``, and these."""
    check_keys(model_fn, X=X)
    counts = _counts(model_fn, X, team)
    first: dict[Name, slice] = {}
    last = []
    for name, n in counts.items():
        # At least one of either.
        count = n - max(1, round(fraction * n))
        if count < 1:
            with about_term(name):
                rule = "a batch to hold samples out of must have two of them or more"
                raise BadValue(sentence(rule, n, "Pass a larger batch, or damp by another rule."))
        first[name] = slice(0, count)
        device = tree_leaves(of_term(X, name))[0].device
        last.append(torch.arange(count, n, device=device))
    return first.get(None, first), last


def _counts(model_fn: Any, X: PyTree, team: Team | None) -> dict[Name, int]:
    """Return how many samples every term has."""
    if team is None:
        return sample_counts(model_fn, of_rank=False, X=X)
    shards = shards_of(team, lambda: sample_counts(model_fn, of_rank=True, X=X))
    return {name: of_ranks[-1].stop for name, of_ranks in shards.items()}
