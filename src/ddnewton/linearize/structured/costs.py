"""What a program costs: the flops of a step, and the samples whose results fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddnewton.columns.contraction import flops
from ddnewton.columns.factors import Outer
from ddnewton.inputs.memory import samples_at_once
from ddnewton.linearize.structured.program import Program

SUM_ADVANTAGE = 1.5
"""How many times fewer flops products with a sum of columns take, so that it is worth the vectors
of parameters that it is: of a net whose layers are mostly dense these take as long."""

TINY_FLOPS = 1e9
"""Up to how many flops products of dense columns take less time than finding the layers."""


def step_flops(program: Program, n: int, m: int) -> float:
    """Return an estimate of the flops of a step."""
    # The shapes of outer products: of layers, and of rows of weights that are computed.
    shapes = _layer_shapes(program)
    dense_entries = program.size - sum(site.shape.numel() for site in program.sites)
    for derived in program.derived_leaves:
        t = derived.layers[0].positions
        by_rows = [rows for rows in derived.rows if rows is not None and t < m]
        shapes += [(rows.shape[0], 1, t, rows.shape[1]) for rows in by_rows]
        dense_entries += derived.size if len(by_rows) < len(derived.rows) else 0
    # Their inner products, dense columns' as they are, and m pullbacks and about three runs.
    products, pulled = 2.0 * dense_entries * (n * m) ** 2, 0.0
    for g, o, t, p in shapes:
        a = torch.empty(n, g, t, p, device="meta")
        b = torch.empty(n, m, g, o, t, device="meta")
        products += flops(Outer(a, b, (p,)))
        pulled += 2 * (m + 3) * a.numel() * o
    # All columns are dense on the side of the parameters, where these are fewer.
    d = sum(size for pieces in program.pieces for _, size in pieces)
    return pulled + (products if n * m <= d else 2.0 * n * m * d**2)


def _layer_shapes(program: Program) -> list[tuple[int, int, int, int]]:
    """Return the shapes g, o, t, p of the outer products of the layers."""
    shapes = []
    for layer in program.layers:
        g, o, _ = layer.indices[0].shape
        shapes.append((g, o, layer.positions, sum(index.shape[2] for index in layer.indices)))
    return shapes


def sums_pay(program: Program, n: int) -> bool:
    """Return whether a column a sample is cheaper to sum up than to multiply with all others.

    Multiplied with other columns are all of them or their sum, which is then added to the sum of
    the others: of columns in one position all are summed up at once otherwise.
    """
    if torch.compiler.is_compiling():  # one graph for any number of samples
        return False
    of_all, of_sum = 0.0, 0.0
    for g, o, t, p in _layer_shapes(program):
        once = 2.0 * n * g * o * t * p
        if g == t == 1:
            of_all += once + 2.0 * n**2 * (o + p)
            of_sum += 3 * once
        else:
            a = torch.empty(n, g, t, p, device="meta")
            of_all += 2 * flops(Outer(a, torch.empty(n, 1, g, o, t, device="meta"), (p,))) - once
            of_sum += once + 2 * once / t
    return SUM_ADVANTAGE * of_sum < of_all


def samples_of_chunk(program: Program, leaves: Sequence[Tensor], n: int, m: int) -> int:
    """Return so many samples that their results and cotangents, each twice, fill a chunk.

    Twice, as results stay beside their cotangents, and as these are written into one tensor.
    """
    inputs = sum(
        layer.positions * sum(index.shape[0] * index.shape[2] for index in layer.indices)
        for layer in program.layers
    )
    entries = program.size + sum(derived.size for derived in program.derived_leaves)
    sample_bytes = leaves[0].element_size() * (2 * m * entries + inputs + 2 * program.results) + 1
    side = min(n * m, sum(leaf.numel() for leaf in leaves))
    return samples_at_once(n, sample_bytes, side, leaves[0].device, revisited=n * m <= side)


def is_tiny(count: int, d: int) -> bool:
    """Return whether products of a dense column for every output take less time than a trace."""
    return dense_flops(count, d) <= TINY_FLOPS


def dense_flops(count: int, d: int) -> float:
    """Return the flops of products of a dense column for every output."""
    return 2.0 * count * d * min(count, d)
