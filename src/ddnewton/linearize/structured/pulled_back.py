"""The columns of leaves from those of the weights that are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.factors import (
    Factor,
    Outer,
    dense_columns,
    from_order,
    in_order,
    rows_of,
)
from ddnewton.linearize.structured.program import DerivedLeaves
from ddnewton.transforms import concatenated, linear_map
from ddnewton.trees import chunks

ENTRIES_AT_ONCE = 2**20
"""The number of entries pulled back at once: more of them leave the processor's cache."""


def pulled_back(
    derived: DerivedLeaves, uses: Sequence[Outer], leaves: Sequence[Tensor]
) -> list[Factor]:
    """Return the columns of derived leaves, given those of the weights' uses.

    Row by row they are Σ_t b_t ⊗ Jᵀa_t, with another Jᵀa for every row. That takes as many
    pullbacks as there are positions, a sum of dense columns as many as there are columns.
    """
    n, m, _, _, t = uses[0].b.shape
    by_rows = [rows is not None and t < m for rows in derived.rows]

    def of_samples(per_sample: int, rows_of_uses: Callable[..., Tensor]) -> list[Tensor]:
        # Some samples at a time, which stay in the processor's cache.
        size = max(1, ENTRIES_AT_ONCE // (per_sample * derived.size))
        parts = [
            pull(rows_of_uses(derived, [Outer(x.a[i], x.b[i], x.widths) for x in uses]))
            for i in chunks(n, size)
        ]
        return [concatenated(part) for part in zip(*parts, strict=True)]

    # What goes in, or whole columns, are pulled back, whichever a leaf asks for.
    pull = _pullback(derived, leaves)
    of_inputs = of_samples(t, _inputs) if any(by_rows) else []
    of_columns = [] if all(by_rows) else of_samples(m, _columns)
    factors: list[Factor] = []
    for i, rows in enumerate(derived.rows):
        if rows is not None and by_rows[i]:
            a = of_inputs[i][:, rows].unflatten(0, (n, t)).transpose(1, 2)
            factors.append(Outer(a, uses[0].b.reshape(n, m, -1, 1, t), (rows.shape[1],)))
        else:
            columns = of_columns[i]
            factors.append(columns if rows is None else columns[:, rows.reshape(-1)])
    return factors


def _pullback(
    derived: DerivedLeaves, leaves: Sequence[Tensor]
) -> Callable[[Float[Tensor, "k _"]], list[Float[Tensor, "k _"]]]:
    """Return the function that pulls rows along all weights back to rows along each leaf."""
    graph = derived.graph
    if graph is None:
        return lambda rows: [rows]

    def compute(*variables: Tensor) -> tuple[Tensor, list[Tensor]]:
        arguments = list(leaves)
        for i, variable in zip(derived.leaves, variables, strict=True):
            arguments[i] = variable
        return graph(*arguments), []

    _, pull, _ = linear_map(compute, *(leaves[i] for i in derived.leaves))
    return lambda rows: [pulled.reshape(len(rows), -1) for pulled in pull(rows)]


def _columns(derived: DerivedLeaves, uses: Sequence[Outer]) -> Float[Tensor, "nm _"]:
    """Return the sums of the columns of all uses, along the entries of all weights."""
    parts = []
    for i, use in enumerate(uses):
        columns, indices = dense_columns(use), derived.layers[i].indices[0].reshape(-1)
        if derived.repeated[i]:
            parts.append(from_order(columns, indices, derived.size))
        else:
            parts.append(in_order(columns, derived.orders[i]))
    return reduce(torch.add, parts)


def _inputs(derived: DerivedLeaves, uses: Sequence[Outer]) -> Float[Tensor, "nt _"]:
    """Return a of every sample and position as rows along the entries of the weight."""
    rows = rows_of(uses[0]).transpose(1, 2).unsqueeze(3)  # [n t g 1 p]
    rows = rows.expand(*rows.shape[:3], *derived.layers[0].indices[0].shape[1:])
    return in_order(rows.flatten(2).flatten(0, 1), derived.orders[0])
