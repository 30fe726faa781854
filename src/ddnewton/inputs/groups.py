"""Which parameters have a block of the Gauss-Newton matrix of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from ddnewton.errors import BadType, BadValue, public, sentence
from ddnewton.inputs.checks import check_damping, check_params, check_select
from ddnewton.trees import leaf_paths, named_leaves, tree_leaves
from ddnewton.types import DampingRule, PyTree, Select

T = TypeVar("T")

SHOWN_PARAMETERS = 8
"""How many parameters a message names."""


class Group(NamedTuple):
    """Parameters with a block of the Gauss-Newton matrix, directions and damping of their own.

    ``params`` names them by their paths, keys joined by dots: ``"encoder.weight"`` for
    ``params["encoder"]["weight"]`` and for ``params["encoder.weight"]``, ``"0"`` for the first of a
    list. A path that ends before a leaf, ``"encoder"``, names all leaves below it. Several are
    given as a sequence; a function of the path takes those for which it returns true. Without a
    ``select`` or a ``damping`` of its own, a group follows those of the call; to keep all
    directions where the call does not, select ``above(0.0)``.

    Examples
    --------
    >>> import torch
    >>> from ddnewton import newton_step
    >>> params = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
    >>> model_fn = lambda p, x: p["weight"] * x + p["bias"]
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> groups = [Group("weight"), Group(lambda path: path.endswith("bias"), damping=1.0)]
    >>> loss = torch.nn.MSELoss()
    >>> step = newton_step(model_fn, params, x, 3 * x + 1, loss, 0.0, groups=groups)
    >>> {name: round(value.item(), 5) for name, value in step.items()}
    {'weight': 3.6, 'bias': 2.66667}
    """

    params: str | Sequence[str] | Callable[[str], bool]
    select: Select | None = None
    damping: float | Tensor | DampingRule | None = None


@public
def per_parameter(params: PyTree) -> list[Group]:
    """Return groups that make one block of every tensor in ``params``.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> [group.params for group in per_parameter(dict(net.named_parameters()))]
    [['weight'], ['bias']]
    """
    check_params(params)
    paths, shown = leaf_paths(params), [name for name, _ in named_leaves(params)]
    often = Counter(paths)
    pairs = zip(paths, shown, strict=True)
    return [Group([path if often[path] == 1 else name]) for path, name in pairs]


@public
def per_layer(params: PyTree) -> list[Group]:
    """Return groups that make one block of all tensors whose paths differ in the last key alone.

    These are the parameters of one module, or of one dict, list or tuple.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    >>> [group.params for group in per_layer(dict(net.named_parameters()))]
    [['0.weight', '0.bias'], ['2.weight', '2.bias']]
    """
    check_params(params)
    layers: dict[str, list[str]] = {}
    for path in leaf_paths(params):
        layers.setdefault(path.rpartition(".")[0], []).append(path)
    return [Group(paths) for paths in layers.values()]


class Block(NamedTuple):
    """A group with its leaves by their numbers, and what it follows."""

    leaves: Sequence[int]
    select: Select | None
    damping: float | Tensor | DampingRule


def blocks_of(
    groups: Sequence[Group] | None,
    params: PyTree,
    select: Select | None,
    damping: float | Tensor | DampingRule,
) -> list[Block]:
    """Return the blocks that groups name; one of all parameters for None."""
    if groups is None:
        return [Block(range(len(tree_leaves(params))), select, damping)]
    _check_groups(groups)
    blocks: list[Block] = []
    owner: dict[int, int] = {}
    names = list(zip(leaf_paths(params), (name for name, _ in named_leaves(params)), strict=True))
    for number, group in enumerate(groups):
        leaves = _named(group, names, number)
        for leaf in leaves:
            if leaf in owner:
                rule = "a parameter must be in one group only"
                got = f"{names[leaf][0]!r} in groups {owner[leaf]} and {number}"
                raise BadValue(sentence(rule, got, "Take it out of one of them."))
            owner[leaf] = number
        own = group.select if group.select is not None else select
        blocks.append(Block(leaves, own, damping if group.damping is None else group.damping))
    return blocks


def grouped(results: Sequence[T], groups: Sequence[Group] | None) -> T | tuple[T, ...]:
    """Return one result a group, or, where a call has no groups, the result of all parameters."""
    return results[0] if groups is None else tuple(results)


def _named(group: Group, names: Sequence[tuple[str, str]], number: int) -> list[int]:
    """Return the numbers of the leaves that a group names, by path or as messages show them."""
    if callable(group.params):
        found = [i for i, (path, _) in enumerate(names) if group.params(path)]
        if not found:
            _refuse(f"groups[{number}].params, which is false for every path", names)
        return found
    wanted = [group.params] if isinstance(group.params, str) else group.params
    chosen: set[int] = set()
    for name in wanted:
        leaves = _exactly(name, names) or _below(name, names)
        if not leaves:
            _refuse(f"{name!r} in groups[{number}]", names)
        chosen |= leaves
    return sorted(chosen)


def _exactly(name: str, names: Sequence[tuple[str, str]]) -> set[int]:
    by_path = {i for i, (path, _) in enumerate(names) if path == name}
    return by_path or {i for i, (_, shown) in enumerate(names) if shown == name}


def _below(name: str, names: Sequence[tuple[str, str]]) -> set[int]:
    return {
        i
        for i, (path, shown) in enumerate(names)
        if not name or path.startswith(f"{name}.") or shown.startswith((f"{name}[", f"{name}."))
    }


def _refuse(got: str, names: Sequence[tuple[str, str]]) -> None:
    known = ", ".join(repr(path) for path, _ in names[:SHOWN_PARAMETERS]) + ", …" * (
        len(names) > SHOWN_PARAMETERS
    )
    rule = "a group must name parameters that there are"
    raise BadValue(sentence(rule, got, f"The parameters are {known}."))


def _check_groups(groups: object) -> None:
    """Require a sequence of groups."""
    rule, remedy = "groups must be a sequence of Group, or None", "Pass [Group(…), …]."
    if isinstance(groups, Group | str) or not isinstance(groups, Sequence):
        raise BadType(sentence(rule, repr(groups), remedy))
    if not groups:
        raise BadValue(sentence(rule, "an empty one", remedy))
    for number, group in enumerate(groups):
        if not isinstance(group, Group):
            raise BadType(sentence(rule, f"{group!r} in it", remedy))
        _check_group(group, f"groups[{number}]")


def _check_group(group: Group, name: str) -> None:
    names = [group.params] if isinstance(group.params, str) else group.params
    if not callable(names):
        rule = f"{name}.params must be a path, a sequence of paths, or a function of a path"
        if not isinstance(names, Sequence) or not all(isinstance(path, str) for path in names):
            raise BadType(sentence(rule, repr(names), 'Name parameters as in "encoder.weight".'))
        if not names:
            raise BadValue(sentence(rule, "none", "Name at least one parameter."))
    check_select(f"{name}.select", group.select)
    if group.damping is not None:
        check_damping(f"{name}.damping", group.damping)
