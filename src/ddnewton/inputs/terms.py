"""The terms of a loss: dicts of functions, inputs, targets and criteria with the same keys.

A loss of one term has the name None, and its arguments stand by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from ddnewton.distributed.agreement import shards_of
from ddnewton.distributed.team import Team
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.batches import Batches, check_without_targets
from ddnewton.inputs.checks import check_batch
from ddnewton.inputs.samples import Indices, Samples, indices
from ddnewton.inputs.term_names import (
    EXAMPLE,
    Name,
    about_term,
    check_keys,
    listed,
    of_term,
    sample_counts,
    term_names,
)
from ddnewton.trees import sample_count, tree_leaves
from ddnewton.types import GramWay, GramWays, PyTree

TermIndices: TypeAlias = Indices | Mapping[Any, Indices | None]
"""Indices of samples, or a dict of them for the terms of a loss."""


class TermArguments(NamedTuple):
    """What is passed for one term of the loss."""

    name: Name
    model_fn: Any
    X: PyTree | Batches
    y: PyTree
    criterion: Any
    gram: GramWay
    samples: Samples
    shards: Sequence[range] | None = None  # those of every rank, counted in the whole batch

    @property
    def in_batches(self) -> bool:
        """Whether the samples come in batches, of which there are several."""
        return isinstance(self.X, Batches)


def terms_of(
    model_fn: Any,
    X: PyTree,
    y: PyTree,
    criterion: Any,
    gram: GramWays,
    subsampling: Mapping[str, TermIndices | None],
    *,
    takes_batches: bool = False,
    team: Team | None = None,
) -> list[TermArguments]:
    """Return the arguments of every term, in the order of ``model_fn``, with its samples.

    ``subsampling`` are the indices of the slopes, the directions and the curvatures, in the batch
    of all ranks where there is a ``team`` of them.
    """
    # Batches have their targets.
    if y is None and isinstance(X, Mapping) and any(isinstance(x, Batches) for x in X.values()):
        y = dict.fromkeys(X)
    # One key for every term, in all of them.
    shared = {"criterion": criterion, "gram": gram}
    dicts = {name: value for name, value in shared.items() if isinstance(value, Mapping)}
    check_keys(model_fn, X=X, y=y, **dicts)
    for option, subset in subsampling.items():
        _check_indices(option, subset, term_names(model_fn))
    in_batches = [isinstance(of_term(X, name), Batches) for name in term_names(model_fn)]
    if takes_batches and any(in_batches):
        _check_no_indices(subsampling)
    shards: dict[Any, list[range]] = {}
    if team is not None:
        shards = shards_of(team, partial(sample_counts, model_fn, of_rank=True, X=X, y=y))
    terms = []
    for name in term_names(model_fn):
        inputs, targets = of_term(X, name), of_term(y, name)
        with about_term(name):
            if isinstance(inputs, Batches) and takes_batches:
                check_without_targets(targets)
                samples = Samples(None, None, None)
            else:
                of_name = {
                    option: _indices_of(subset, name) for option, subset in subsampling.items()
                }
                samples = _samples(inputs, targets, of_name, shards.get(name))
            terms.append(
                TermArguments(
                    name=name,
                    model_fn=of_term(model_fn, name),
                    X=inputs,
                    y=targets,
                    criterion=_one_for_all("criterion", criterion, name),
                    gram=_one_for_all("gram", gram, name),
                    samples=samples,
                    shards=shards.get(name),
                )
            )
    return terms


def _samples(
    X: PyTree,
    y: PyTree,
    subsampling: Mapping[str, Indices | None],
    shards: Sequence[range] | None,
) -> Samples:
    """Require as many targets as inputs, and indices among these; return the indices."""
    check_batch(X=X, y=y, least=1 if shards is None else 0)
    n, device = sample_count(X), tree_leaves(X)[0].device
    n = n if shards is None else shards[-1].stop
    return Samples(*(indices(option, subset, n, device) for option, subset in subsampling.items()))


def _check_no_indices(subsampling: Mapping[str, TermIndices | None]) -> None:
    """Refuse sub-samples of batches, which are visited whole."""
    for option, subset in subsampling.items():
        if subset is not None:
            rule, remedy = f"{option} must be None for Batches", "Sub-sample the data set instead."
            raise BadValue(sentence(rule, "indices", remedy))


def _one_for_all(argument: str, value: Any, name: Name) -> Any:
    """Return an option of a term, of which one may serve all."""
    if not isinstance(value, Mapping):
        return value
    if name is None:
        rule = f"{argument} may be a dict only where model_fn is a dict of terms"
        remedy = f"Pass model_fn, X and y as dicts too, {EXAMPLE}."
        raise BadType(sentence(rule, "a dict", remedy))
    return value[name]


def _indices_of(samples: Any, name: Name) -> Indices | None:
    """Return the indices of one term; of a term without any, None for all samples."""
    return samples.get(name) if isinstance(samples, Mapping) else samples


def _check_indices(option: str, samples: Any, names: list[Name]) -> None:
    """Require a dict of terms for a sub-sample of several, and none for one of one."""
    if samples is None:
        return
    several = names != [None]
    if several != isinstance(samples, Mapping):
        rule = (
            f"{option} must be a dict of indices where model_fn is a dict of terms, and only there"
        )
        remedy = f"Pass {option} = {EXAMPLE}." if several else "Pass the indices themselves."
        raise BadType(sentence(rule, type(samples).__name__, remedy))
    if several and (unknown := [key for key in samples if key not in names]):
        rule = f"{option} must name terms of model_fn"
        raise BadValue(sentence(rule, listed(unknown), f"The terms are {listed(names)}."))
