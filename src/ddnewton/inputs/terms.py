"""The terms of a loss: dicts of functions, inputs, targets and criteria with the same keys.

A loss of one term has the name None, and its arguments stand by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.batches import Batches, check_without_targets
from ddnewton.inputs.callables import CRITERION_REMEDY, is_function
from ddnewton.inputs.checks import check_batch
from ddnewton.inputs.samples import Indices, Samples, indices
from ddnewton.trees import sample_count, tree_leaves
from ddnewton.types import GramWay, GramWays, PyTree

Name: TypeAlias = Hashable
"""The key of a term, None where the loss is one term."""

T = TypeVar("T")

TermIndices: TypeAlias = Indices | Mapping[Any, Indices | None]
"""Indices of samples, or a dict of them for the terms of a loss."""

EXAMPLE = '{"inside": …, "edge": …}'
"""A dict of terms, for messages."""


class TermArguments(NamedTuple):
    """What is passed for one term of the loss."""

    name: Name
    model_fn: Any
    X: PyTree | Batches
    y: PyTree
    criterion: Any
    gram: GramWay
    samples: Samples

    @property
    def in_batches(self) -> bool:
        """Whether the samples come in batches, of which there are several."""
        return isinstance(self.X, Batches)


def is_several(model_fn: object) -> bool:
    """Return whether a model is a dict of functions, one for each term of the loss."""
    return isinstance(model_fn, Mapping)


def term_names(model_fn: object) -> list[Name]:
    """Return the names of the terms, [None] for a loss of one."""
    if not isinstance(model_fn, Mapping):
        return [None]
    if not model_fn:
        rule, remedy = "model_fn must hold at least one term", f"Pass functions, {EXAMPLE}."
        raise BadValue(sentence(rule, "an empty dict", remedy))
    return list(model_fn)


def of_term(tree: Any, name: Name) -> Any:
    """Return the part of an argument that is for one term."""
    return tree if name is None else tree[name]


def one_or_several(parts: Mapping[Name, T]) -> T | Mapping[Name, T]:
    """Return the part of the only term, or the parts of several: the opposite of `of_term`."""
    return parts.get(None, parts)


def check_keys(model_fn: object, **trees: Any) -> None:
    """Require arguments to be dicts with the keys of the model's terms, where there are several."""
    names = term_names(model_fn)
    if names == [None]:
        return
    # Dicts, all of them.
    for argument, tree in trees.items():
        if not isinstance(tree, Mapping):
            rule = (
                f"where model_fn is a dict of terms, {argument} must be a dict with the same keys"
            )
            example = ", ".join(f"{name!r}: …" for name in names)
            remedy = f"The terms are {_listed(names)}: pass {argument} = {{{example}}}."
            remedy += f" {CRITERION_REMEDY}" * is_function(tree)
            raise BadType(sentence(rule, type(tree).__name__, remedy))
    # The keys are compared with the model's; which of them are wrong is told of all together.
    if any(set(tree) != set(names) for tree in trees.values()):
        raise BadValue(_differing_keys({"model_fn": model_fn, **trees}))


def _differing_keys(trees: Mapping[str, Any]) -> str:
    """Return the message of dicts with other keys than the rest: what each lacks, or has besides.

    Those are expected that most of them have, and of keys that half of them have, the model's.
    """
    votes = Counter(key for tree in trees.values() for key in tree)
    terms = trees["model_fn"]
    expected = [key for key, count in votes.items() if 2 * count > len(trees) - (key in terms)]
    expected = expected or list(terms)
    # What is missing, and what nobody expects, in every argument that differs.
    differences: dict[str, str] = {}
    for argument, tree in trees.items():
        missing = [key for key in expected if key not in tree]
        unexpected = [key for key in tree if key not in expected]
        parts = [f"missing {_listed(missing)}"] * bool(missing)
        parts += [f"unexpected {_listed(unexpected)}"] * bool(unexpected)
        if parts:
            differences[argument] = f"{argument}: {', '.join(parts)}"
    # Which of them is wrong nobody knows: the remedy is for all.
    *first, last = trees
    rule = f"{', '.join(first)} and {last} must be dicts with the same keys, one for every term"
    remedy = f"Give each of them the keys {_listed(expected)}."
    remedy += " One criterion that is in no dict serves all terms." * ("criterion" in differences)
    return sentence(rule, "; ".join(differences.values()), remedy)


def terms_of(
    model_fn: Any,
    X: PyTree,
    y: PyTree,
    criterion: Any,
    gram: GramWays,
    subsampling: Mapping[str, TermIndices | None],
    *,
    takes_batches: bool = False,
) -> list[TermArguments]:
    """Return the arguments of every term, in the order of ``model_fn``, with its samples.

    ``subsampling`` are the indices of the slopes, the directions and the curvatures.
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
                samples = _samples(inputs, targets, of_name)
            terms.append(
                TermArguments(
                    name=name,
                    model_fn=of_term(model_fn, name),
                    X=inputs,
                    y=targets,
                    criterion=_one_for_all("criterion", criterion, name),
                    gram=_one_for_all("gram", gram, name),
                    samples=samples,
                )
            )
    return terms


def _samples(X: PyTree, y: PyTree, subsampling: Mapping[str, Indices | None]) -> Samples:
    """Require as many targets as inputs, and indices among these; return the indices."""
    check_batch(X=X, y=y)
    n, device = sample_count(X), tree_leaves(X)[0].device
    return Samples(*(indices(option, subset, n, device) for option, subset in subsampling.items()))


def _check_no_indices(subsampling: Mapping[str, TermIndices | None]) -> None:
    """Refuse sub-samples of batches, which are visited whole."""
    for option, subset in subsampling.items():
        if subset is not None:
            rule, remedy = f"{option} must be None for Batches", "Sub-sample the data set instead."
            raise BadValue(sentence(rule, "indices", remedy))


@contextmanager
def about_term(name: Name) -> Iterator[None]:
    """Put the name of a term in front of the errors raised inside."""
    try:
        yield
    except (BadValue, BadType) as error:
        if name is not None:
            error.args = (f"term {name!r}: {error}",)
        raise


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
        raise BadValue(sentence(rule, _listed(unknown), f"The terms are {_listed(names)}."))


def _listed(names: Any) -> str:
    """Return names side by side, for messages."""
    return ", ".join(map(repr, names))


def first_samples(
    model_fn: Any, X: PyTree, fraction: float
) -> tuple[TermIndices, list[Int[Tensor, " _"]]]:
    """Return the samples of every term but a last ``fraction``, and these."""
    check_keys(model_fn, X=X)
    first: dict[Name, slice] = {}
    last = []
    for name in term_names(model_fn):
        with about_term(name):
            inputs = of_term(X, name)
            check_batch(X=inputs)
            n, device = sample_count(inputs), tree_leaves(inputs)[0].device
            # At least one of either.
            count = n - max(1, round(fraction * n))
            if count < 1:
                rule = "a batch to hold samples out of must have two of them or more"
                raise BadValue(sentence(rule, n, "Pass a larger batch, or damp by another rule."))
        first[name] = slice(0, count)
        last.append(torch.arange(count, n, device=device))
    return first.get(None, first), last
