"""Terms whose samples are on several ranks, by products, on the leader.

Losses are expanded where the samples are, and what the leader decides by is collected: a number or
two of every sample. Where samples have no losses of their own, or where their curvature depends on
others, outputs and targets are gathered, and only products with Jacobians are made on the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddnewton.criteria.denominators import common_denominator
from ddnewton.distributed.service import Leader
from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.jacobian_products import Products
from ddnewton.linearize.model import forgotten
from ddnewton.quadratic.arguments import Arguments, of_complex_outputs
from ddnewton.quadratic.matrix_free.distant_root import DistantRoot, Known
from ddnewton.quadratic.matrix_free.free_term import FreeTerm, OnRanks, free_term
from ddnewton.quadratic.ranks.gathered import gathered_targets
from ddnewton.quadratic.ranks.messages import (
    OUTPUTS_REMEDY,
    FreeOutputs,
    assembled,
    check_alike,
    rows_on,
)
from ddnewton.quadratic.term import Objective
from ddnewton.trees import as_real, tree_leaves


class Place(NamedTuple):
    """A term on the ranks: its number in the call, and that of its linearization there."""

    leader: Leader
    shards: Sequence[range]
    term: int
    number: int

    @property
    def whole(self) -> int:
        """The number of samples on all ranks."""
        return self.shards[-1].stop

    def assembled(self, parts: Sequence[Tensor | None], samples: Tensor | None) -> Tensor:
        """Return the parts of the ranks, of samples or None for all, in the order of these."""
        return assembled(parts, self.shards, samples)


def rank_term(leader: Leader, arguments: Arguments, term: int) -> FreeTerm:
    """Return a term whose samples are on several ranks."""
    place, linearization = _linearized(leader, arguments, term, "free_linearized", term)
    objective = arguments.objectives[term]
    if linearization.complex_outputs:
        objective = of_complex_outputs(objective, arguments.terms[term], arguments.params)
    # With losses where the samples are, or where the leader is.
    total = _denominator(place, objective)
    if total is not None:
        of_ranks = _term_there(arguments, place, linearization, objective, total)
        if of_ranks is not None:
            return of_ranks
    y = gathered_targets(leader, term, arguments.terms[term])
    return free_term(objective._replace(y=y), _gathered(arguments, place, linearization))


def _linearized(
    leader: Leader, arguments: Arguments, term: int, order: str, number: int
) -> tuple[Place, FreeLinearization]:
    """Have all ranks linearize a term; return what is known of it, without the outputs."""
    shards, told = arguments.terms[term].shards, leader.order(order, number)
    assert shards is not None
    place = Place(leader, shards, term, told[0])
    parts: list[FreeOutputs] = [part for part in told[1] if part is not None]
    forms = {r: f"{list(x.shape)} {x.dtype}" for r, x in enumerate(told[1]) if x is not None}
    check_alike("a sample's outputs", forms, OUTPUTS_REMEDY)
    # Empty outputs, with the dtypes that they have.
    params: list[Tensor] = tree_leaves(as_real(arguments.params))
    first, n = parts[0], place.whole
    precise = max((part.precise_dtype for part in parts), key=lambda x: torch.finfo(x).eps)
    outputs = params[0].new_empty(0, *first.shape, dtype=first.dtype)

    def depends() -> bool:
        return any(leader.order("free_depends", place.number))

    return place, FreeLinearization(
        outputs=outputs,
        precise=outputs.to(precise),
        function=forgotten,
        leaves=[leaf.to(dtype) for leaf, dtype in zip(params, first.dtypes, strict=True)],
        in_float64=forgotten if any(part.can_widen for part in parts) else None,
        complex_outputs=first.complex_outputs,
        samples_at_once=n,
        eps=max(part.eps for part in parts),
        at_batch=forgotten,
        depends=depends,
    )


def _denominator(place: Place, objective: Objective) -> float | None:
    """Return the denominator of the loss, None where samples have no losses of their own."""
    if objective.loss.depends_on_batch:
        return None
    told = place.leader.order("free_shares", place.number)
    shares = [share.share for share in told if share is not None]
    if any(share is None for share in shares):
        return None
    return common_denominator(objective.loss, shares)


def _term_there(
    arguments: Arguments,
    place: Place,
    linearization: FreeLinearization,
    objective: Objective,
    total: float,
) -> FreeTerm | None:
    """Return a term whose losses are where its samples are; None if their columns differ."""
    # What is known of every sample, its columns among it.
    leader, number = place.leader, place.number
    of_ranks = leader.order("free_expanded", number, total)
    parts: list[Known] = [part for part in of_ranks if part is not None]
    if any(part.columns != parts[0].columns for part in parts):
        return None

    def mean_loss(leaves: Sequence[Tensor], samples: Tensor | None) -> Tensor:
        (summed,) = leader.order("free_loss", number, leaves, samples)
        mean: Tensor = summed / (place.whole if samples is None else len(samples))
        return mean

    def anew() -> FreeTerm:
        wide = _linearized(leader, arguments, place.term, "free_widened", number)
        term = _term_there(arguments, *wide, objective, total)
        assert term is not None
        return term

    merged = _merged(parts)
    return FreeTerm(
        objective=objective._replace(y=None, mean_loss=mean_loss),
        linearization=linearization,
        root=DistantRoot(merged, forgotten),
        known=merged,
        on_ranks=OnRanks(number, place.shards),
        anew=anew,
    )


def _merged(parts: Sequence[Known]) -> Known:
    """Return the record of the samples of all ranks, in their order."""
    squares = [part.squares for part in parts if part.squares is not None]
    n = sum(len(part.value) for part in parts)
    # The rounding of a mean is that of a sum over N, of parts that are rounded by themselves.
    roundings = torch.stack([part.rounding * len(part.value) for part in parts])
    return Known(
        value=torch.cat([part.value for part in parts]),
        steepness=torch.cat([part.steepness for part in parts]),
        is_uncurved=torch.cat([part.is_uncurved for part in parts]),
        squares=torch.cat(squares) if len(squares) == len(parts) else None,
        rounding=roundings.norm() / n,
        columns=parts[0].columns,
        spans=all(part.spans for part in parts),
        has_factors=all(part.has_factors for part in parts),
    )


def _gathered(
    arguments: Arguments, place: Place, linearization: FreeLinearization
) -> FreeLinearization:
    """Return a linearization with its outputs, whose products are made on the ranks."""
    # The outputs here, and the model where its samples are.
    leader, number = place.leader, place.number
    of_ranks = leader.order("free_gathered", number)
    pairs = zip(*(part for part in of_ranks if part is not None), strict=True)
    outputs, precise = (torch.cat(parts) for parts in pairs)

    def in_float64() -> FreeLinearization:
        wide = _linearized(leader, arguments, place.term, "free_widened", number)
        return _gathered(arguments, *wide)

    def function(leaves: Sequence[Tensor], samples: Any) -> Tensor:
        wanted = None if isinstance(samples, slice) else samples
        return place.assembled(leader.order("free_outputs", number, leaves, wanted), wanted)

    return linearization._replace(
        outputs=outputs,
        precise=precise,
        function=function,
        in_float64=None if linearization.in_float64 is None else in_float64,
        of_ranks=partial(_products, place, precise),
    )


def _products(place: Place, outputs: Tensor, wanted: Sequence[int], samples: Any) -> Products:
    """Return the products of samples with their Jacobian, where they are; a slice is all."""
    indices = None if isinstance(samples, slice) else samples
    asked = place.number, list(wanted), indices

    def push(vector: Sequence[Tensor]) -> Tensor:
        return place.assembled(place.leader.order("free_pushed", *asked, list(vector)), indices)

    def pull(u: Tensor) -> list[Tensor]:
        parts = [u[rows_on(shard, indices)] for shard in place.shards]
        pulled: list[Tensor] = place.leader.order("free_pulled", *asked, cotangents=parts)
        return pulled

    return Products(outputs[samples], push, pull)
