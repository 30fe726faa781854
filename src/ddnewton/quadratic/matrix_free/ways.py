"""Which way a call goes: by matrices, or by products where asked, or where nothing else fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from ddnewton.errors import BadValue, sentence, warn
from ddnewton.inputs.memory import TooLarge
from ddnewton.quadratic.arguments import Arguments, Scaling
from ddnewton.transforms import is_transformed
from ddnewton.types import GramWays

R = TypeVar("R")


def either_way(
    arguments: Arguments,
    by_matrix: Callable[[Arguments], R],
    by_products: Callable[[Arguments], R],
    *,
    say: Callable[[str], None] = warn,
    automatic: bool | None = None,
    unscaled: bool = False,
) -> R:
    """Return the result of a call by matrices or, where asked or too large, by products.

    What is too large is said, and goes without a scale by columns if it may be ``unscaled``. It is
    ``automatic`` to choose by products there, by default as the arguments say.
    """
    if arguments.is_free:
        check_free(arguments)
        return by_products(arguments)
    try:
        return by_matrix(arguments)
    except TooLarge as reason:
        choose = is_automatic({term.name: term.gram for term in arguments.terms})
        if not (choose if automatic is None else automatic) or is_transformed():
            raise
        if unscaled and arguments.scaling.by_columns:
            arguments = arguments._replace(scaling=Scaling(by_columns=False))
        # What products do not give stays what it was: too large.
        try:
            check_free(arguments)
        except BadValue as refusal:
            raise TooLarge(f'{reason} gram="free" is no way out: {refusal}') from refusal
        say(
            f'going on with gram="free", by products to tol={arguments.tol:g} of the decrease, as '
            f"{reason}"
        )
        return by_products(arguments)


def is_automatic(gram: GramWays) -> bool:
    """Return whether the way is left to the library."""
    ways = gram.values() if isinstance(gram, Mapping) else [gram]
    return all(way == "auto" for way in ways)


def check_free(arguments: Arguments) -> None:
    """Refuse what products alone do not give."""
    if is_transformed():
        rule, got = 'gram="free" must be outside of torch.func and torch.compile', "a call inside"
        raise BadValue(sentence(rule, got, "Loop over the members of an ensemble."))
    check_free_scale(by_columns=arguments.scaling.by_columns)


def check_free_scale(*, by_columns: bool) -> None:
    """Refuse a scale by the columns, whose sizes products do not give."""
    if by_columns:
        rule, got = 'gram="free" must have a scale that is given', 'scale="jac"'
        remedy = "The sizes of the columns are not known: pass a pytree of numbers, or None."
        raise BadValue(sentence(rule, got, remedy))


def refuse_free(arguments: Arguments, what: str, remedy: str) -> None:
    """Refuse products where what is asked for is all of a matrix."""
    if arguments.is_free:
        rule = f"{what} needs the matrix itself"
        raise BadValue(sentence(rule, 'gram="free"', remedy))
