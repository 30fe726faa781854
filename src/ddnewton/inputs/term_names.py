"""The names of the terms of a loss, the keys of all dicts among its arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.inputs.batches import Batches
from ddnewton.inputs.callables import CRITERION_REMEDY, is_function
from ddnewton.inputs.checks import check_batch
from ddnewton.trees import sample_count
from ddnewton.types import PyTree

Name: TypeAlias = Hashable
"""The key of a term, None where the loss is one term."""

T = TypeVar("T")

EXAMPLE = '{"inside": …, "edge": …}'
"""A dict of terms, for messages."""


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
            remedy = f"The terms are {listed(names)}: pass {argument} = {{{example}}}."
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
        parts = [f"missing {listed(missing)}"] * bool(missing)
        parts += [f"unexpected {listed(unexpected)}"] * bool(unexpected)
        if parts:
            differences[argument] = f"{argument}: {', '.join(parts)}"
    # Which of them is wrong nobody knows: the remedy is for all.
    *first, last = trees
    rule = f"{', '.join(first)} and {last} must be dicts with the same keys, one for every term"
    remedy = f"Give each of them the keys {listed(expected)}."
    remedy += " One criterion that is in no dict serves all terms." * ("criterion" in differences)
    return sentence(rule, "; ".join(differences.values()), remedy)


def sample_counts(model_fn: Any, *, of_rank: bool, **trees: PyTree) -> dict[Name, int]:
    """Return how many samples there are here of every term; on one rank of several perhaps none."""
    counts = {}
    for name in term_names(model_fn):
        with about_term(name):
            of_name = {argument: of_term(tree, name) for argument, tree in trees.items()}
            if of_rank and isinstance(of_name["X"], Batches):
                rule, remedy = "Batches must be of one process", "Leave process_group out."
                raise BadValue(sentence(rule, "a process_group", remedy))
            check_batch(**of_name, least=0 if of_rank else 1)
            counts[name] = sample_count(of_name["X"])
    return counts


@contextmanager
def about_term(name: Name) -> Iterator[None]:
    """Put the name of a term in front of the errors raised inside."""
    try:
        yield
    except (BadValue, BadType) as error:
        if name is not None:
            error.args = (f"term {name!r}: {error}",)
        raise


def listed(names: Any) -> str:
    """Return names side by side, for messages."""
    return ", ".join(map(repr, names))
