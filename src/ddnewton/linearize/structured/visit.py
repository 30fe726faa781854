"""Running the program of a model: outputs, and Jacobian columns as outer products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from ddnewton.columns.factors import Factor, Outer
from ddnewton.linearize.structured.program import Layer, Program
from ddnewton.linearize.structured.pulled_back import pulled_back
from ddnewton.transforms import concatenated, linear_map, vmap

COTANGENTS_AT_ONCE = 2**20
"""The number of cotangents pulled back at once: more of them leave the processor's cache."""


class Visit(NamedTuple):
    """A model at some samples: its outputs, and the pullback of a basis to factors of columns."""

    outputs: Float[Tensor, "n ..."]
    pullback: Callable[[Float[Tensor, "n c m"]], list[Factor]]


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

    def pullback(basis: Float[Tensor, "n c m"]) -> list[Factor]:
        # Pull back column m of every sample's basis at a time, or several of them.
        cotangents = basis.to(outputs).movedim(-1, 0).reshape(-1, *outputs.shape)
        pulled = _by_groups(pull, cotangents, max(1, COTANGENTS_AT_ONCE // (n * program.size)))
        # Read b off the probes and a off the sources; a copy's cotangents are columns themselves.
        at_sites, rows = pulled[: len(probes)], pulled[len(probes) :]
        outer = partial(_outer, at_sites, sources)
        firsts = [leaves[pieces[0][0]] for pieces in program.pieces[: len(program.layers)]]
        factors: list[Factor] = list(map(outer, program.layers, firsts))
        for derived in program.derived_leaves:
            first = leaves[derived.leaves[0]]
            factors += pulled_back(derived, [outer(x, first) for x in derived.layers], leaves)
        return [*factors, *(row.reshape(row.shape[0] * row.shape[1], -1) for row in rows)]

    return Visit(outputs, pullback)


def _by_groups(
    pull: Callable[[Tensor], list[Tensor]], cotangents: Float[Tensor, "m n ..."], size: int
) -> list[Tensor]:
    """Return the pullbacks of so many cotangents at a time, samples first: [n m ...]."""
    if len(cotangents) <= size:
        return [piece.transpose(0, 1) for piece in _pulled(pull, cotangents)]
    n, start = cotangents.shape[1], 0
    pullbacks: list[Tensor] = []
    for group in cotangents.split(size):
        pieces, stop = _pulled(pull, group), start + group.shape[0]
        # In place, column by column, for all of them are most of what a step takes of memory.
        pullbacks = pullbacks or [x.new_empty(n, len(cotangents), *x.shape[2:]) for x in pieces]
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


def _outer(
    at_sites: Sequence[Tensor], sources: Sequence[Tensor], layer: Layer, leaf: Tensor
) -> Outer:
    """Read a and b of a layer off its sources and the cotangents at its sites.

    Weight and bias stand side by side along axis p of a, and the uses along the positions t. What
    they are made of may be narrower than the leaf, which has been cast; they are multiplied in the
    widest dtype of all.
    """
    inputs, cotangents = [], []
    for part in layer.parts:
        at_site = at_sites[part.site]
        reads = [read(at_site if i is None else sources[i]) for i, read in part.read_a]
        inputs.append(concatenated(reads, -1))
        cotangents.append(part.read_b(at_site))
    a, b = concatenated(inputs, 2), concatenated(cotangents, -1)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), leaf.dtype)
    widths = tuple(index.shape[-1] for index in layer.indices)
    return Outer(a.to(dtype) if a.is_floating_point() else a, b.to(dtype).contiguous(), widths)
