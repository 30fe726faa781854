"""Which way a call goes: by matrices, or by products where asked, or where nothing else fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, TypeVar

from ddnewton.distributed.service import served
from ddnewton.errors import BadValue, TooLarge, sentence, warn
from ddnewton.host_reads import read_once
from ddnewton.quadratic.arguments import Arguments, Scaling
from ddnewton.quadratic.matrix_free.free_shard import FreeShard
from ddnewton.transforms import check_not_transformed, is_transformed
from ddnewton.trees import tree_leaves
from ddnewton.types import GramWays

R = TypeVar("R")

DTENSOR_REMEDY = (
    'Ask for what products give, gram="free": steps, and ggn_eigh with select=top_k(k). Or gather '
    "params, where they fit: p.full_tensor()."
)


def either_way(
    arguments: Arguments,
    by_matrix: Callable[[Arguments], R],
    by_products: Callable[[Arguments], R],
    *,
    say: Callable[[str], None] = warn,
    automatic: bool | None = None,
    unscaled: bool = False,
    searches: bool = False,
) -> R:
    """Return the result of a call by matrices or, where asked or too large, by products.

    What is too large is said. It is ``automatic`` to choose by products there, by default as the
    arguments say. By products goes without a scale by columns what may be ``unscaled``. A call that
    ``searches`` reads values as it goes; any other by matrices does so once, at its end.
    """
    options: dict[str, Any] = {"say": say, "automatic": automatic, "unscaled": unscaled}
    options["searches"] = searches
    return on_all_ranks(
        arguments,
        lambda arguments: _either_way(arguments, by_matrix, by_products, **options),
        by_matrix.__name__,
    )


def on_all_ranks(arguments: Arguments, call: Callable[[Arguments], R], name: str = "") -> R:
    """Return the result of a call on every rank that holds samples of it, or on this process.

    By its ``name`` ranks see that they make the same call.
    """
    team = arguments.team
    if team is None:
        return call(arguments)
    # An error of the call is none of what stays open for as long as it lasts.
    with closing(ExitStack()) as stack:
        shard = FreeShard(team, arguments, stack)
        team.makes(name)
        return served(team, shard, lambda leader: call(arguments._replace(leader=leader)))


def _either_way(
    arguments: Arguments,
    by_matrix: Callable[[Arguments], R],
    by_products: Callable[[Arguments], R],
    *,
    say: Callable[[str], None],
    automatic: bool | None,
    unscaled: bool,
    searches: bool,
) -> R:
    """Return the result of a call by matrices or by products, on the process that decides."""
    if arguments.is_free:
        arguments = _unscaled(arguments) if unscaled else arguments
        check_free(arguments)
        return by_products(arguments)
    try:
        if searches or arguments.team is not None or is_transformed():
            return by_matrix(arguments)
        return read_once(partial(by_matrix, arguments), tree_leaves(arguments.params)[0].device)
    except TooLarge as reason:
        choose = is_automatic({term.name: term.gram for term in arguments.terms})
        if not (choose if automatic is None else automatic) or is_transformed():
            raise
        arguments = _unscaled(arguments) if unscaled else arguments
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


def _unscaled(arguments: Arguments) -> Arguments:
    """Return the arguments without a scale by columns, which products do not give."""
    if not arguments.scaling.by_columns:
        return arguments
    return arguments._replace(scaling=Scaling(by_columns=False))


def is_automatic(gram: GramWays) -> bool:
    """Return whether the way is left to the library."""
    ways = gram.values() if isinstance(gram, Mapping) else [gram]
    return all(way == "auto" for way in ways)


def check_free(arguments: Arguments) -> None:
    """Refuse what products alone do not give."""
    check_not_transformed('gram="free"')
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
        if arguments.has_dtensors:
            raise BadValue(sentence(rule, "params that are DTensors", DTENSOR_REMEDY))
        raise BadValue(sentence(rule, 'gram="free"', remedy))
