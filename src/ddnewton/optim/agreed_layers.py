"""The layers of the terms of a loss, as all ranks go by them: by none that are not found on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ddnewton.distributed.team import Team
from ddnewton.inputs.term_names import Name, one_or_several
from ddnewton.types import AnyModelFn, GramWay, GramWays, ModelFn


class Layers(NamedTuple):
    """A model with the layers that are found, and how its columns are formed.

    ``slow`` are reasons why these go without layers, to be said once: not by every rank.
    """

    model_fn: AnyModelFn
    gram: GramWays
    slow: Sequence[str]


def agreed_layers(
    functions: Mapping[Name, ModelFn],
    reasons: Mapping[Name, str | None],
    gram: GramWays,
    team: Team | None,
) -> Layers:
    """Return the model of all terms, given why the layers of each are not found on this rank.

    The reason is empty where that costs nothing, and None where they are found or not missed, as on
    a rank without samples. What has no layers, or none yet, is not searched for them at every step.
    """
    of_ranks = [reasons] if team is None else team.exchanged(lambda: dict(reasons))
    ways: dict[Name, GramWay] = {}
    slow = []
    for name in functions:
        told = [of_rank[name] for of_rank in of_ranks if of_rank[name] is not None]
        way = gram[name] if isinstance(gram, Mapping) else gram
        ways[name] = "dense" if way == "auto" and told else way
        slow += [reason for reason in told if reason and ways[name] == "dense"][:1]
    tells = team is None or team.leads
    return Layers(one_or_several(functions), one_or_several(ways), slow if tells else [])
