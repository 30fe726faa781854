"""Groups of parameters, each with its own block of the Gauss-Newton matrix."""

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
"""How many parameters an error message lists."""


class Group(NamedTuple):
    """Parameters with a block of the Gauss-Newton matrix, directions and damping of their own.

    ``params`` names them by their paths, keys joined by dots: ``"encoder.weight"`` for
    ``params["encoder"]["weight"]`` and for ``params["encoder.weight"]``, ``"0"`` for the first of a
    list. A path that ends before a leaf, ``"encoder"``, names all leaves below it. It may be one
    path, a sequence of paths, or a function that returns true for the paths to take. A group
    without ``select`` or ``damping`` takes that of the call; to keep all directions where the call
    does not, select ``above(0.0)``.

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
    # Several leaves may have one path, {"a": {"b": …}, "a.b": …}: their key paths tell them apart.
    count = Counter(paths)
    pairs = zip(paths, shown, strict=True)
    return [Group([path if count[path] == 1 else name]) for path, name in pairs]


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
    """The leaves of a group as indices into all leaves, with its selection rule and damping."""

    leaves: Sequence[int]
    select: Select | None
    damping: float | Tensor | DampingRule


def blocks_of(
    groups: Sequence[Group] | None,
    params: PyTree,
    select: Select | None,
    damping: float | Tensor | DampingRule,
) -> list[Block]:
    """Return one block for every group, or one of all parameters where groups is None."""
    if groups is None:
        return [Block(range(len(tree_leaves(params))), select, damping)]
    # Every leaf by its path, "a.b", and by its key path, "['a']['b']", as messages show it.
    _check_groups(groups)
    blocks: list[Block] = []
    owner: dict[int, int] = {}
    names = list(zip(leaf_paths(params), (name for name, _ in named_leaves(params)), strict=True))
    for number, group in enumerate(groups):
        # No leaf may be in two groups; a leaf in none gets a zero step.
        leaves = _leaves_of_group(group, names, number)
        for leaf in leaves:
            if leaf in owner:
                rule = "a parameter must be in one group only"
                got = f"{names[leaf][0]!r} in groups {owner[leaf]} and {number}"
                raise BadValue(sentence(rule, got, "Take it out of one of them."))
            owner[leaf] = number
        # What the group leaves out, the call gives.
        blocks.append(
            Block(
                leaves,
                select=select if group.select is None else group.select,
                damping=damping if group.damping is None else group.damping,
            )
        )
    return blocks


def grouped(results: Sequence[T], groups: Sequence[Group] | None) -> T | tuple[T, ...]:
    """Return one result a group, or, where a call has no groups, the result of all parameters."""
    return results[0] if groups is None else tuple(results)


def _leaves_of_group(group: Group, names: Sequence[tuple[str, str]], number: int) -> list[int]:
    """Return the indices of the leaves that a group names, by path or by key path."""
    # A function chooses among the paths.
    if callable(group.params):
        matches = [i for i, (path, _) in enumerate(names) if group.params(path)]
        if not matches:
            _raise_no_match(f"groups[{number}].params, which is false for every path", names)
        return matches
    # A name is that of a leaf, or else of the branch with all leaves below it.
    group_names = [group.params] if isinstance(group.params, str) else group.params
    indices: set[int] = set()
    for name in group_names:
        leaves = _leaves_named(name, names) or _leaves_below(name, names)
        if not leaves:
            _raise_no_match(f"{name!r} in groups[{number}]", names)
        indices |= leaves
    return sorted(indices)


def _leaves_named(name: str, names: Sequence[tuple[str, str]]) -> set[int]:
    """Return the leaves with this path, or, where there are none, with this key path."""
    by_path = {i for i, (path, _) in enumerate(names) if path == name}
    return by_path or {i for i, (_, shown) in enumerate(names) if shown == name}


def _leaves_below(name: str, names: Sequence[tuple[str, str]]) -> set[int]:
    """Return the leaves whose path or key path goes on from this one; all for an empty path."""
    return {
        i
        for i, (path, shown) in enumerate(names)
        if not name or path.startswith(f"{name}.") or shown.startswith((f"{name}[", f"{name}."))
    }


def _raise_no_match(got: str, names: Sequence[tuple[str, str]]) -> None:
    """Raise the error of a group that names no parameter, with the first of those there are."""
    listed = ", ".join(repr(path) for path, _ in names[:SHOWN_PARAMETERS])
    listed += ", …" * (len(names) > SHOWN_PARAMETERS)
    rule = "a group must name parameters that there are"
    raise BadValue(sentence(rule, got, f"The parameters are {listed}."))


def _check_groups(groups: object) -> None:
    """Require a sequence of groups, at least one, with sensible fields."""
    rule, remedy = "groups must be a sequence of Group, or None", "Pass [Group(…), …]."
    if isinstance(groups, Group | str) or not isinstance(groups, Sequence):
        raise BadType(sentence(rule, repr(groups), remedy))
    if not groups:
        raise BadValue(sentence(rule, "an empty one", remedy))
    for number, group in enumerate(groups):
        if not isinstance(group, Group):
            raise BadType(sentence(rule, f"{group!r} in it", remedy))
        _check_group(group, f"groups[{number}]")


def is_whole(blocks: Sequence[Sequence[int]], count: int) -> bool:
    """Return whether there is one block, of all leaves in their order."""
    return len(blocks) == 1 and list(blocks[0]) == list(range(count))


def _check_group(group: Group, name: str) -> None:
    """Require paths or a function of a path, and a selection rule and damping as in the call."""
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
