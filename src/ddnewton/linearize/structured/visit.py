"""A visit of a model by its program: outputs, and columns as outer products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from ddnewton.columns.factors import Factor, Outer, dense_columns
from ddnewton.linearize.structured.program import Layer, Program, Sum
from ddnewton.transforms import linear_map

COTANGENTS_AT_ONCE = 2**20
"""How many cotangents are pulled back at once: more of them leave the processor's cache."""


class Visit(NamedTuple):
    """The model linearized at some samples: what it returns, and how to pull back."""

    outputs: Float[Tensor, "n ..."]
    pullback: Callable[[Float[Tensor, "n c m"]], list[Factor]]


def run(
    program: Program, leaves: Sequence[Tensor], samples: Sequence[Tensor]
) -> Float[Tensor, "n ..."]:
    """Return the model's outputs, to be differentiated as one likes."""
    n = samples[0].shape[0]
    probes = [leaves[0].new_zeros(()).expand(n, *shape) for shape in program.sites]
    mapped = (*(None for _ in leaves), *(0 for _ in (*samples, *probes)))
    outputs: Tensor = vmap(program.graph.forward, mapped)(*leaves, *samples, *probes)[0]
    return outputs


def visit(program: Program, leaves: Sequence[Tensor], samples: Sequence[Tensor]) -> Visit:
    """Run the model once, on all samples, ready to be pulled back."""
    n = samples[0].shape[0]
    zero = leaves[0].new_zeros(())
    probes = [zero.expand(n, *shape) for shape in program.sites]
    copies = [leaves[i].expand(n, *leaves[i].shape) for i in program.direct]
    mapped = [0 if i in program.direct else None for i in range(len(leaves))]
    over = vmap(program.graph.forward, (*mapped, *(0 for _ in (*samples, *probes))))

    def forward(*given: Tensor) -> tuple[Tensor, list[Tensor]]:
        probes, copies = given[: len(program.sites)], given[len(program.sites) :]
        arguments = list(leaves)
        for i, copy in zip(program.direct, copies, strict=True):
            arguments[i] = copy
        outputs, inputs = over(*arguments, *samples, *probes)
        return outputs, inputs

    outputs, pull, inputs = linear_map(forward, *probes, *copies)

    def pullback(basis: Float[Tensor, "n c m"]) -> list[Factor]:
        cotangents = basis.to(outputs).movedim(-1, 0).reshape(-1, *outputs.shape)
        together, start = max(1, COTANGENTS_AT_ONCE // (n * program.size)), 0
        pulled: list[Tensor] = []
        for group in cotangents.split(together):
            pieces, stop = pull(group), start + group.shape[0]
            # In place, column by column, for all of them are most of what a step takes of memory.
            pulled = pulled or [x.new_empty(n, len(cotangents), *x.shape[2:]) for x in pieces]
            for whole, piece in zip(pulled, pieces, strict=True):
                whole[:, start:stop] = piece.transpose(0, 1)
            start = stop
        at_sites, rows = pulled[: len(probes)], pulled[len(probes) :]
        read = partial(_outer, at_sites, inputs, outputs)
        factors: list[Factor] = [read(layer) for layer in program.layers]
        factors += [_summed(each, [read(layer) for layer in each.layers]) for each in program.sums]
        return [*factors, *(row.reshape(row.shape[0] * row.shape[1], -1) for row in rows)]

    return Visit(outputs, pullback)


def _summed(leaf: Sum, uses: Sequence[Outer]) -> Float[Tensor, "nm d"]:
    """Return the columns of a leaf as the sum of those of its uses."""
    total: Tensor | float = 0.0
    for layer, use in zip(leaf.layers, uses, strict=True):
        part, places = dense_columns(use), layer.indices[0].reshape(-1) - leaf.start
        total = total + part.new_zeros(part.shape[0], leaf.size).index_add(1, places, part)
    return torch.as_tensor(total)


def _outer(
    at_sites: Sequence[Tensor], inputs: Sequence[Tensor], batch: Tensor, layer: Layer
) -> Outer:
    """Read a and b off the inputs of a layer and the cotangents at its sites."""
    a = [
        _joined([read(batch if i is None else inputs[i]) for i, read in part.inputs], -1)
        for part in layer.parts
    ]
    b = [part.outputs(at_sites[part.site]) for part in layer.parts]
    widths = tuple(index.shape[-1] for index in layer.indices)
    return Outer(_joined(a, 2), _joined(b, -1).contiguous(), widths)


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)
