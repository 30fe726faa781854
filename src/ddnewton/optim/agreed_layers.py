"""The layers of the terms of a loss, as all ranks go by them: by none that are not found on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ddnewton.distributed.team import Team
from ddnewton.inputs.term_names import Name, one_or_several
from ddnewton.types import AnyModelFn, GramWay, GramWays, ModelFn


class Traced(NamedTuple):
    """The function of a term, and why it has no layers on this rank.

    The reason is empty where that costs nothing, and None where they are found or not missed, as on
    a rank without samples.
    """

    model_fn: ModelFn
    slow: str | None


class Layers(NamedTuple):
    """A model with the layers that are found, and how its columns are formed.

    ``slow`` are reasons why these go without layers, to be said once: not by every rank.
    """

    model_fn: AnyModelFn
    gram: GramWays
    slow: Sequence[str]


def agreed_layers(traced: Mapping[Name, Traced], gram: GramWays, team: Team | None) -> Layers:
    """Return the model of all terms, given what is found on this rank.

    What has no layers, or none yet, is not searched for them at every step.
    """
    # What all ranks have to say of every term.
    reasons = {name: of_term.slow for name, of_term in traced.items()}
    of_ranks = [reasons] if team is None else team.exchanged(lambda: reasons)
    # One reason on one of them is enough to do without.
    ways: dict[Name, GramWay] = {}
    slow = []
    for name in traced:
        told = [of_rank[name] for of_rank in of_ranks if of_rank[name] is not None]
        way = gram[name] if isinstance(gram, Mapping) else gram
        ways[name] = "dense" if way == "auto" and told else way
        slow += [reason for reason in told if reason and ways[name] == "dense"][:1]
    functions = {name: of_term.model_fn for name, of_term in traced.items()}
    tells = team is None or team.leads
    return Layers(one_or_several(functions), one_or_several(ways), slow if tells else [])
