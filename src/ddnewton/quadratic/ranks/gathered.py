"""A model linearized at the samples of several processes, on their leader.

The outputs of all samples are here, in the order of the ranks: what the loss makes of them is what
it makes of one batch, random numbers included. Columns stay where their samples are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from jaxtyping import Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.distributed.service import Leader
from ddnewton.inputs.terms import TermArguments
from ddnewton.linearize.basis import Basis
from ddnewton.linearize.model import Linearization, forgotten
from ddnewton.quadratic.ranks.columns_of_ranks import RankColumns
from ddnewton.quadratic.ranks.messages import (
    OUTPUTS_REMEDY,
    Form,
    Outputs,
    OwnBasis,
    assembled,
    check_alike,
    own_basis,
    rows_on,
)
from ddnewton.trees import named_leaves, tree_map
from ddnewton.types import PyTree


def gathered(
    leader: Leader, number: int, term: TermArguments, leaves: Sequence[Tensor]
) -> Linearization:
    """Linearize the model of a term at the samples of all ranks."""
    assert term.shards is not None
    return _gathered(leader, term.shards, leaves, *leader.order("linearized", number))


def gathered_targets(leader: Leader, number: int, term: TermArguments) -> PyTree:
    """Return the targets of a term on all ranks, in their order."""
    shards = term.shards
    assert shards is not None
    targets = leader.order("targets", number)
    parts = {
        rank: part
        for rank, (part, shard) in enumerate(zip(targets, shards, strict=True))
        if len(shard)
    }
    told = {
        rank: ", ".join(f"y{path} {list(y.shape[1:])} {y.dtype}" for path, y in named_leaves(part))
        for rank, part in parts.items()
    }
    check_alike("the targets of a sample", told, "Cast and pad y alike everywhere.")
    return tree_map(lambda *of_leaf: torch.cat(of_leaf), *parts.values())


def _gathered(
    leader: Leader,
    shards: Sequence[range],
    leaves: Sequence[Tensor],
    number: int,
    outputs: Sequence[Outputs | None],
) -> Linearization:
    """Return a linearization by those of the ranks, with outputs of all their samples."""
    # Outputs in the order of the ranks, in both precisions, of which a rank may have one alone.
    parts = [part for part in outputs if part is not None]
    told = {
        rank: f"{list(part.outputs.shape[1:])} {part.outputs.dtype}"
        for rank, part in enumerate(outputs)
        if part is not None
    }
    check_alike("the outputs of a sample", told, OUTPUTS_REMEDY)
    narrow = torch.cat([part.outputs for part in parts])
    precise = narrow
    if any(part.precise is not None for part in parts):
        precise = torch.cat([_most_precise(part) for part in parts])

    # What the leader asks of all ranks.
    def in_float64() -> Linearization:
        return _gathered(leader, shards, leaves, *leader.order("widened", number))

    def function(leaves: Sequence[Tensor], samples: Int[Tensor, " n"] | slice) -> Tensor:
        if isinstance(samples, slice):
            samples = torch.arange(len(narrow), device=narrow.device)[samples]
        of_ranks = leader.order("outputs", number, leaves, samples)
        return assembled(of_ranks, shards, samples).to(precise.dtype)

    by_leaf = zip(*(part.dtypes for part in parts), strict=True)
    dtypes = [reduce(torch.promote_types, of_leaf) for of_leaf in by_leaf]
    return Linearization(
        outputs=narrow,
        precise=precise,
        jacobian=partial(_jacobian, leader, number, shards, leaves),
        function=function,
        leaves=[leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)],
        in_float64=in_float64 if any(part.can_widen for part in parts) else None,
        complex_outputs=parts[0].complex_outputs,
        depends=lambda: any(leader.order("depends", number)),
    )


def _most_precise(part: Outputs) -> Tensor:
    """Return the outputs of a rank in the highest precision that it has them in."""
    return part.outputs if part.precise is None else part.precise


def _jacobian(
    leader: Leader,
    number: int,
    shards: Sequence[range],
    leaves: Sequence[Tensor],
    basis: Basis,
    samples: Int[Tensor, " n"] | None,
) -> Jacobian:
    """Return the columns of samples, None for all, which are on several ranks."""
    rows = [rows_on(shard, samples) for shard in shards]
    bases: list[OwnBasis] = [own_basis(basis, of_rank) for of_rank in rows]
    place, forms = leader.order("pulled_back", number, samples, bases=bases)
    present: list[Form] = [form for form in forms if form is not None]
    n, _, m = basis.shape
    return Jacobian(
        visit=forgotten,
        chunks=[slice(0, n)],
        samples=n,
        columns=m,
        sizes=[leaf.numel() for leaf in leaves],
        pieces=[],
        order=None,
        device=basis.device,
        eps=max(form.eps for form in present),
        sums=max(form.sums for form in present),
        of_ranks=RankColumns(leader, place, n, m, forms, rows),
    )
