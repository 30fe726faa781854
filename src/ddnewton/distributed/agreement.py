"""What all ranks of a call must agree on before the first of them begins."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ddnewton.distributed.team import Team
from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.trees import tree_leaves
from ddnewton.types import PyTree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Processes: TypeAlias = "dist.ProcessGroup | DeviceMesh | None"
"""The processes that hold the samples together; None for this one alone."""

OUTSIDE = "a group that this rank is not in"


def team_of(processes: Processes | Team, params: PyTree) -> Team | None:
    """Return the ranks of a group, None for a process by itself; with the parameters on each."""
    if processes is None or isinstance(processes, Team):
        return processes
    if not dist.is_available() or not dist.is_initialized():
        rule, got = "process_group needs torch.distributed", "no initialised process group"
        remedy = "Call torch.distributed.init_process_group first, or launch with torchrun."
        raise BadValue(sentence(rule, got, remedy))
    homes = [leaf.device for leaf in tree_leaves(params) if isinstance(leaf, Tensor)]
    return Team(_group_of(processes), homes[0] if homes else torch.device("cpu"))


def _group_of(processes: Any) -> dist.ProcessGroup:
    """Return the process group of a mesh of one axis, or the group itself."""
    rule = "process_group must be a ProcessGroup, a DeviceMesh of one axis, or None"
    if isinstance(processes, dist.ProcessGroup):
        return processes
    # Neither a group nor a mesh.
    if not (hasattr(processes, "get_group") and hasattr(processes, "ndim")):
        got = type(processes).__name__
        if processes is dist.GroupMember.NON_GROUP_MEMBER:
            got = OUTSIDE
        raise BadType(sentence(rule, got, "Pass torch.distributed.group.WORLD for all ranks."))
    # A mesh of one axis, on which this rank is.
    if processes.ndim != 1:
        names = processes.mesh_dim_names or ("data", "model")
        remedy = f"Pass the axis along which the samples are split: mesh[{names[0]!r}]."
        raise BadValue(sentence(rule, f"a mesh of {processes.ndim} axes", remedy))
    if processes.get_coordinate() is None:
        raise BadType(sentence(rule, OUTSIDE, "Call it on the ranks of the mesh alone."))
    group: dist.ProcessGroup = processes.get_group()
    return group


def shards_of(
    team: Team, counts: Callable[[], Mapping[Hashable, int]]
) -> dict[Hashable, list[range]]:
    """Return which samples of every term each rank has, counted in the order of the ranks.

    ``counts`` returns how many this rank has of every term.
    """
    # The same terms on all ranks.
    of_ranks = team.exchanged(counts)
    terms = list(of_ranks[0])
    for rank, of_rank in enumerate(of_ranks):
        if list(of_rank) != terms:
            rule = "the terms of the loss must be the same on all ranks"
            got = f"rank 0: {terms}; rank {rank}: {list(of_rank)}"
            raise team.shared(BadValue(sentence(rule, got, "Pass the same dicts everywhere.")))
    # The samples of one rank after those of another, and one at least.
    shards = {}
    for term in terms:
        stops = accumulate((of_rank[term] for of_rank in of_ranks), initial=0)
        shards[term] = [range(start, stop) for start, stop in pairwise(stops)]
        if shards[term][-1].stop == 0:
            rule = "X and y must hold at least one sample on one of the ranks"
            got = "none" if term is None else f"none of the term {term!r}"
            raise team.shared(BadValue(sentence(rule, got, "Skip the empty batch.")))
    return shards


@contextmanager
def agreeing(
    team: Team | None, told: Callable[[], Mapping[str, Any]] | None = None
) -> Iterator[None]:
    """Raise on all ranks what is raised inside on one, or where what they tell differs.

    ``told`` returns what has to be the same on all, by its name in messages.
    """
    if team is None:
        yield
        return
    # Whatever is wrong here is told to the others, unless it has been told already.
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        if error is team.error_of_all:
            raise
        failure = error

    def told_here() -> Mapping[str, Any]:
        if failure is not None:
            raise failure
        return told() if told else {}

    # Nothing is wrong anywhere, and all are told the same.
    check_same(team.exchanged(told_here))


def check_same(told: Sequence[Mapping[str, Any]]) -> None:
    """Require what the ranks tell to be the same, item by item."""
    # Every rank beside the first, by all that either has told; parameters by their names alone.
    first = told[0]
    for rank, of_rank in enumerate(told):
        for name in dict.fromkeys([*first, *of_rank]):
            if first.get(name) != of_rank.get(name):
                rule = f"{name} must be the same on all ranks"
                if name.startswith("params"):
                    got = f"other values on rank {rank} than on rank 0"
                    remedy = "Broadcast from rank 0 what each process has made by itself."
                else:
                    got = f"{first.get(name)} on rank 0, {of_rank.get(name)} on rank {rank}"
                    remedy = "Pass the same on every rank."
                raise BadValue(sentence(rule, got, remedy))
