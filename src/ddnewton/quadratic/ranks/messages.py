"""What ranks tell each other of their samples' columns, and which samples are theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddnewton.columns.factors import Jacobian
from ddnewton.columns.ring import Part
from ddnewton.criteria.denominators import Share
from ddnewton.errors import BadValue, sentence
from ddnewton.hashes import hashed
from ddnewton.linearize.basis import Basis, stored, with_stored
from ddnewton.linearize.free_linearization import FreeLinearization
from ddnewton.linearize.model import Linearization

Rows: TypeAlias = slice | Tensor
"""Where the samples of a rank are among all those that are asked for."""


OUTPUTS_REMEDY = "Pass the same model_fn, and X alike, everywhere."


class Outputs(NamedTuple):
    """What a rank tells of a linearization: its outputs, and what the leader decides by."""

    outputs: Float[Tensor, "n ..."]
    precise: Float[Tensor, "n ..."] | None  # None for the outputs themselves
    can_widen: bool
    complex_outputs: bool
    dtypes: Sequence[torch.dtype]  # of the leaves


class FreeOutputs(NamedTuple):
    """What a rank tells of a linearization by products, and not its outputs."""

    shape: tuple[int, ...]  # of a sample's outputs
    dtype: torch.dtype
    precise_dtype: torch.dtype
    can_widen: bool
    complex_outputs: bool
    dtypes: Sequence[torch.dtype]  # of the leaves
    eps: float


class OwnShare(NamedTuple):
    """What a rank's samples bring to what a loss divides by; None where they have no losses."""

    share: Share | None


class Form(NamedTuple):
    """What a rank tells of its columns: how many, their rounding, and what their factors are of."""

    part: Part
    eps: float
    sums: float
    layout: Any


class OwnBasis(NamedTuple):
    """The basis of a rank's samples; where all have one, the first's and how many they are."""

    basis: Basis | None
    copies: int | None


def outputs_of(linearization: Linearization) -> Outputs:
    """Describe a linearization to the leader."""
    outputs, precise = linearization.outputs, linearization.precise
    return Outputs(
        outputs=outputs,
        precise=None if precise is outputs else precise,
        can_widen=linearization.in_float64 is not None,
        complex_outputs=linearization.complex_outputs,
        dtypes=[leaf.dtype for leaf in linearization.leaves],
    )


def free_outputs_of(linearization: FreeLinearization) -> FreeOutputs:
    """Describe a linearization by products to the leader."""
    return FreeOutputs(
        shape=tuple(linearization.outputs.shape[1:]),
        dtype=linearization.outputs.dtype,
        precise_dtype=linearization.precise.dtype,
        can_widen=linearization.in_float64 is not None,
        complex_outputs=linearization.complex_outputs,
        dtypes=[leaf.dtype for leaf in linearization.leaves],
        eps=linearization.eps,
    )


def form_of(jacobian: Jacobian) -> Form:
    """Describe columns to the leader."""
    digest = None if jacobian.order is None else hashed(jacobian.order)
    pieces = [list(map(tuple, factor_pieces)) for factor_pieces in jacobian.pieces]
    return Form(
        part=Part(jacobian.samples, jacobian.columns, list(jacobian.chunks)),
        eps=jacobian.eps,
        sums=jacobian.sums,
        layout=repr((pieces, digest)),
    )


def rows_on(shard: range, samples: Int[Tensor, " n"] | None) -> Rows:
    """Return where the samples of a shard are among all that are asked for, None for all."""
    if samples is None:
        return slice(shard.start, shard.stop)
    inside = (samples >= shard.start) & (samples < shard.stop)
    return inside.nonzero()[:, 0]


def numbers_on(shard: range, samples: Int[Tensor, " n"] | None) -> Int[Tensor, " n"]:
    """Return the numbers in a shard of its samples among all that are asked for."""
    if samples is None:
        return torch.arange(len(shard), device="cpu")
    numbers: Tensor = samples[rows_on(shard, samples)] - shard.start
    return numbers


def assembled(
    parts: Sequence[Float[Tensor, "n ..."] | None],
    shards: Sequence[range],
    samples: Int[Tensor, " n"] | None,
) -> Float[Tensor, "n ..."]:
    """Return the parts of all ranks in the order of samples that were asked for, None for all."""
    present = [part for part in parts if part is not None]
    n, first = shards[-1].stop if samples is None else len(samples), present[0]
    # Ranks may compute in other dtypes, where not all can in float64.
    dtype = reduce(torch.promote_types, (part.dtype for part in present))
    whole: Tensor = first.new_empty(n, *first.shape[1:], dtype=dtype)
    for shard, part in zip(shards, parts, strict=True):
        if part is not None:
            whole[rows_on(shard, samples)] = part
    return whole


def check_alike(what: str, told: Mapping[int, str], remedy: str) -> None:
    """Require what is told of a sample to be the same on all ranks that have one."""
    first, *further = told
    for rank in further:
        if told[rank] != told[first]:
            rule = f"{what} must have the same shape and dtype on all ranks"
            got = "; ".join(f"rank {r}: {told[r]}" for r in (first, rank))
            raise BadValue(sentence(rule, got, remedy))


def own_basis(basis: Basis, rows: Rows) -> OwnBasis:
    """Return the basis of some of its samples, to be passed to their rank."""
    entries = stored(basis)
    if len(entries) > 1 and entries.stride(0) == 0:
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        return OwnBasis(with_stored(basis, entries[:1]), count)
    return OwnBasis(with_stored(basis, entries[rows]), None)


def basis_of(passed: OwnBasis) -> Basis:
    """Return the basis that was passed."""
    basis, copies = passed
    assert basis is not None
    if copies is None:
        return basis
    entries = stored(basis)
    return with_stored(basis, entries.expand(copies, *entries.shape[1:]))
