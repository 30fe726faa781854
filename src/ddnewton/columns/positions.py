"""Columns of several positions as columns of one: Σ_t b_t ⊗ a_t formed once for all that ask."""

from __future__ import annotations

from ddnewton.columns.factors import Factor, Outer, formed, rows_of

LONGER = 4
"""How many times more entries than b and a together columns may have to be formed once for all."""


def shortest(factor: Factor) -> Factor:
    """Return columns formed over their positions where that is about as short as b and a.

    Whatever asks for their products or sums then forms them no more. Of fewer positions than there
    are columns a sample, products of positions are the cheaper ones.
    """
    if not isinstance(factor, Outer) or len(factor.widths) > 1:
        return factor
    _, m, g, o, t = factor.b.shape
    p = factor.widths[0]
    is_short = m * g * o * p <= LONGER * g * t * (p + m * o)
    return in_one_position(factor) if t > 1 and t >= m and is_short else factor


def in_one_position(outer: Outer) -> Outer:
    """Return the same columns as b ⊗ 1, summed over positions, for a single piece."""
    columns = formed(outer.b, rows_of(outer))
    n, m = columns.shape[:2]
    return Outer(columns.new_ones(n, 1, 1, 1), columns.reshape(n, m, 1, -1, 1), (1,))
