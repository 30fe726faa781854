"""Running the program of a model: outputs, and Jacobian columns as outer products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Inexact, Num
from torch import Tensor

from ddnewton.columns.factors import Factor, Outer, Stack, without_zeros
from ddnewton.linearize.basis import Basis, PositionBlocks, written_columns
from ddnewton.linearize.structured.program import Layer, Program
from ddnewton.linearize.structured.pulled_back import pulled_back
from ddnewton.transforms import concatenated, is_batched, linear_map, vmap
from ddnewton.trees import chunks

COTANGENTS_AT_ONCE, COTANGENTS_AT_ONCE_ON_GPUS = 2**20, 2**28
"""The number of cotangents pulled back at once: more of them leave a processor's cache, while a GPU
waits for fewer of them."""

MOST_PARTS, PART_COLUMNS = 32, 64
"""Of columns of positions, into how many parts of a stack they are cut, and how many columns of all
samples a part has at least: products of small parts take longer than what they leave out."""


class Visit(NamedTuple):
    """A model at some samples: its outputs, and the pullback of a basis to factors of columns."""

    outputs: Float[Tensor, "n ..."]
    pullback: Callable[[Basis], list[Factor]]


class Pulled(NamedTuple):
    """What some columns are pulled back to: layers, uses of derived weights, rows of copies."""

    layers: list[Outer]
    derived: list[list[Outer]]
    rows: list[Float[Tensor, "n m ..."]]


def run(
    program: Program, leaves: Sequence[Tensor], samples: Sequence[Tensor]
) -> Float[Tensor, "n ..."]:
    """Return the model's outputs, which can be differentiated along parameters or samples."""
    outputs: Tensor = vmap(lambda sample: program.plain.forward(*leaves, *sample))(list(samples))
    return outputs


def _of_samples(
    program: Program,
    leaves: Sequence[Tensor],
    copies: Sequence[Tensor],
    samples: Sequence[Tensor],
    probes: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Return outputs and sources of all samples; with copies, of the direct leaves at these."""

    def of_sample(mapped: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        arguments = list(leaves)
        for i, copy in zip(program.direct, mapped[: len(copies)], strict=False):
            arguments[i] = copy
        outputs, sources = program.graph.forward(*arguments, *mapped[len(copies) :])
        return outputs, sources

    # What is the same for all samples is no argument, for each of these takes time.
    outputs, sources = vmap(of_sample)([*copies, *samples, *probes])
    return outputs, sources


def visit(program: Program, leaves: Sequence[Tensor], samples: Sequence[Tensor]) -> Visit:
    """Run the model once, on all samples, and return its outputs with their pullback."""
    # The variables of the pullback: probes, zeros that are added at the sites of the layers, and
    # copies, one a sample, of the parameters that are differentiated directly.
    n = samples[0].shape[0]
    probes = _probes(program, leaves[0], n)
    copies = [leaves[i].expand(n, *leaves[i].shape) for i in program.direct]

    def forward(*variables: Tensor) -> tuple[Tensor, list[Tensor]]:
        probes, copies = variables[: len(program.sites)], variables[len(program.sites) :]
        return _of_samples(program, leaves, copies, samples, probes)

    outputs, pull, sources = linear_map(forward, *probes, *copies)
    # What goes into the layers, the same for all columns.
    of_derived = [layer for derived in program.derived_leaves for layer in derived.layers]
    inputs = [_inputs(sources, probes, layer) for layer in (*program.layers, *of_derived)]
    entries = COTANGENTS_AT_ONCE if outputs.is_cpu else COTANGENTS_AT_ONCE_ON_GPUS
    at_once = max(1, entries // (n * program.size))

    def pulled_columns(basis: Basis, columns: slice) -> Pulled:
        # Read b off the probes, to be beside a; a copy's cotangents are columns themselves.
        cotangents = (
            written_columns(basis, part).to(outputs).movedim(-1, 0).reshape(-1, *outputs.shape)
            for part in _groups(columns, at_once)
        )
        pulled = _together(pull, cotangents, columns.stop - columns.start)
        outer, a = partial(_outer, pulled[: len(probes)]), iter(inputs)
        firsts = [leaves[pieces[0][0]] for pieces in program.pieces[: len(program.layers)]]
        layers = [outer(next(a), *pair) for pair in zip(program.layers, firsts, strict=True)]
        uses = [
            [outer(next(a), layer, leaves[derived.leaves[0]]) for layer in derived.layers]
            for derived in program.derived_leaves
        ]
        return Pulled(layers, uses, pulled[len(probes) :])

    def pullback(basis: Basis) -> list[Factor]:
        parts = _parts(basis)
        factors, uses, rows = _in_parts(partial(pulled_columns, basis), parts)
        for derived, of_weights in zip(program.derived_leaves, uses, strict=True):
            factors += pulled_back(derived, of_weights, leaves)
        return [*factors, *(row.reshape(row.shape[0] * row.shape[1], -1) for row in rows)]

    return Visit(outputs, pullback)


def _parts(basis: Basis) -> list[slice]:
    """Return which columns are pulled back to a part of a stack, those of some positions; or all.

    No branch may depend on the values under ``vmap``, where all are one part.
    """
    n, _, m = basis.shape
    if not isinstance(basis, PositionBlocks) or is_batched(basis.blocks):
        return [slice(0, m)]
    t, columns = basis.blocks.shape[1], basis.blocks.shape[3]
    positions = max(-(-t // MOST_PARTS), -(-PART_COLUMNS // max(1, n * columns)))
    return chunks(m, positions * columns)


def _in_parts(
    pulled_columns: Callable[[slice], Pulled], parts: Sequence[slice]
) -> tuple[list[Factor], list[list[Outer]], list[Tensor]]:
    """Pull columns back part by part: layers are stacks of what the columns of each reach."""
    if len(parts) == 1:
        whole = pulled_columns(parts[0])
        return list(whole.layers), whole.derived, whole.rows
    # The zeros of a part are left out before the next one is made.
    pulled = []
    for columns in parts:
        layers, derived, rows = pulled_columns(columns)
        pulled.append(Pulled([without_zeros(layer) for layer in layers], derived, rows))
    stacks: list[Factor] = [
        Stack(layers) for layers in zip(*(part.layers for part in pulled), strict=True)
    ]
    # What is pulled back further is put together again.
    derived = [
        [
            uses[0]._replace(b=torch.cat([use.b for use in uses], 1))
            for uses in zip(*of_weights, strict=True)
        ]
        for of_weights in zip(*(part.derived for part in pulled), strict=True)
    ]
    rows = [torch.cat(of_leaf, 1) for of_leaf in zip(*(part.rows for part in pulled), strict=True)]
    return stacks, derived, rows


def _groups(columns: slice, size: int) -> list[slice]:
    """Cut a range of columns into groups."""
    if torch.compiler.is_compiling():  # one graph for any number of samples
        return [columns]
    starts = range(columns.start, columns.stop, size)
    return [slice(start, min(start + size, columns.stop)) for start in starts] or [columns]


def _together(
    pull: Callable[[Tensor], list[Tensor]], groups: Iterable[Float[Tensor, "_ n ..."]], m: int
) -> list[Tensor]:
    """Return the pullbacks of m cotangents, some of them at a time, samples first: [n m ...]."""
    pullbacks: list[Tensor] = []
    start = 0
    for group in groups:
        pieces, stop = _pulled(pull, group), start + group.shape[0]
        if stop - start == m:
            return [piece.transpose(0, 1) for piece in pieces]
        # In place, column by column, for all of them are most of what a step takes of memory.
        n = group.shape[1]
        pullbacks = pullbacks or [x.new_empty(n, m, *x.shape[2:]) for x in pieces]
        for pullback, piece in zip(pullbacks, pieces, strict=True):
            pullback[:, start:stop] = piece.transpose(0, 1)
        start = stop
    return pullbacks


def _pulled(
    pull: Callable[[Tensor], list[Tensor]], cotangents: Float[Tensor, "m n ..."]
) -> list[Tensor]:
    """Return the pullbacks of several cotangents: at once, or one by one where torch cannot."""
    try:
        return pull(cotangents)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # The second derivative of group norm, say, in torch 2.13.
        return [torch.cat(pieces) for pieces in zip(*map(pull, cotangents.split(1)), strict=True)]


def _probes(program: Program, leaf: Tensor, n: int) -> list[Inexact[Tensor, "n ..."]]:
    """Return zeros for the sites of n samples, in the dtypes of these, where the leaf is."""
    return [leaf.new_zeros((), dtype=site.dtype).expand(n, *site.shape) for site in program.sites]


def _inputs(
    sources: Sequence[Tensor], probes: Sequence[Tensor], layer: Layer
) -> Num[Tensor, "n g t ..."]:
    """Read a of a layer off its sources.

    Weight and bias stand side by side along axis p, and the uses along the positions t.
    """
    of_uses = []
    for part in layer.parts:
        read = [read(probes[part.site] if i is None else sources[i]) for i, read in part.read_a]
        of_uses.append(concatenated(read, -1))
    return concatenated(of_uses, 2)


def _outer(
    at_sites: Sequence[Tensor], a: Num[Tensor, "n g t ..."], layer: Layer, leaf: Tensor
) -> Outer:
    """Read b of a layer off the cotangents at its sites, and put it beside a.

    What they are made of may be narrower than the leaf, which has been cast; they are multiplied in
    the widest dtype of all.
    """
    b = concatenated([part.read_b(at_sites[part.site]) for part in layer.parts], -1)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), leaf.dtype)
    widths = tuple(index.shape[-1] for index in layer.indices)
    return Outer(a.to(dtype) if a.is_floating_point() else a, b.to(dtype).contiguous(), widths)
