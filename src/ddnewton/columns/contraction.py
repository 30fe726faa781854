r"""Inner products of columns that are sums of outer products, in the cheapest order.

Columns Σ_t b_t ⊗ a_t of a weight, for groups g side by side, have the inner products

    Σ_g Σ_tt' (a_gt · a'_gt') (b_gt · b'_gt').

The sums are taken in one of two orders, whichever takes fewer operations: form the columns, some
outputs at a time, and multiply them; or multiply a with a' for all pairs of positions, which needs
no columns. Columns of a single position need neither order: there it is (a · a') (b · b').
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from opt_einsum import contract_path
from torch import Tensor

from ddnewton.columns.column_sums import inner_products
from ddnewton.columns.exact_products import is_sliced, matrix_product
from ddnewton.columns.factors import (
    Factor,
    Outer,
    dense_columns,
    entries_at_once,
    formed,
    intermediate_bytes,
    rows_of,
    single_position,
)
from ddnewton.columns.large_products import product_of_rows
from ddnewton.columns.positions import in_one_position
from ddnewton.columns.symmetric_products import (
    LONG_ROWS,
    SYMMETRIC_STRIPS,
    completed,
    product,
)
from ddnewton.transforms import scaled
from ddnewton.trees import chunks

INNER_PRODUCTS = "ngtp,nmgot,NgTp,NMgoT->nmNM"

COLUMNS_FIRST, POSITIONS_FIRST = ((0, 1), (0, 1), (0, 1)), ((0, 2), (1, 2), (0, 1))
"""Two orders: each a with its b; and a with a', then b', then b."""

COMPILED_ROWS = 2**13
"""The length of the rows that are formed at once where torch compiles, for any number of them."""

LEFT_SAMPLES_AT_ONCE = 8
"""The number of samples whose a is multiplied with all a' in one product, memory permitting."""

IRREGULAR_FLOP, IRREGULAR_FLOP_ON_GPUS = 1.6, 32.0
"""How much longer a flop takes in many small products than in one large one."""


def inner(
    left: Factor, right: Factor, columns: tuple[int, int]
) -> Float[Tensor, "n {columns[0]} n2 {columns[1]}"]:
    """Return all inner products of two sets of columns, in float64.

    Of a set with itself half of them are computed, and mirrored. ``columns`` are the numbers of
    columns of a sample, on either side. Products of a single position lie in memory as columns are
    counted, all samples of the first column first.
    """
    if isinstance(left, Outer) and isinstance(right, Outer):
        if left.b.shape[2:4] != right.b.shape[2:4]:  # one of them in one position
            left, right = in_one_position(left), in_one_position(right)
        if single_position(left) and single_position(right):
            return _of_single_positions(left, right)
        # The order that ends with fewer positions on the left is the cheaper one.
        if left.b.shape[4] > right.b.shape[4]:
            return inner(right, left, (columns[1], columns[0])).permute(2, 3, 0, 1)
        contract = _columns_first if _columns_are_cheaper(left, right) else _positions_first
        if contract is _positions_first and left.b.shape[4] == right.b.shape[4] == 1:
            contract = _in_groups_of_one_position
        matrix = contract(left, right)
    elif isinstance(left, Tensor) and len(left) == 1 and isinstance(right, Outer):
        matrix = inner_products(right, left).mT
    else:
        matrix = _of_dense(dense_columns(left), dense_columns(right))
    products: Tensor = matrix.unflatten(1, (-1, columns[1])).unflatten(0, (-1, columns[0]))
    return products


def flops(outer: Outer) -> float:
    """Return the number of operations of the inner products of columns with each other."""
    if single_position(outer):
        count = outer.b.shape[0] * outer.b.shape[1]
        return float(count**2 * outer.b.shape[3])
    return min(_flops(outer, outer, order) for order in (COLUMNS_FIRST, POSITIONS_FIRST))


def _columns_are_cheaper(left: Outer, right: Outer) -> bool:
    """Return whether forming the columns is cheaper than contracting positions first.

    Products of slices are for columns alone; and opt_einsum cannot be compiled.
    """
    if torch.compiler.is_compiling() or is_sliced(left.b):
        return True
    longer = IRREGULAR_FLOP_ON_GPUS if left.b.is_cuda else IRREGULAR_FLOP
    return _flops(left, right, COLUMNS_FIRST) <= longer * _flops(left, right, POSITIONS_FIRST)


def _flops(left: Outer, right: Outer, order: Sequence[tuple[int, int]]) -> float:
    """Return the cost of an order of contraction, half of which symmetry saves."""
    p = sum(left.widths)
    shapes = [shape for x in (left, right) for shape in ((*x.a.shape[:3], p), tuple(x.b.shape))]
    return _path_flops(tuple(shapes), tuple(order)) / (2 if left is right else 1)


@lru_cache(maxsize=4096)
def _path_flops(shapes: Sequence[Sequence[int]], order: Sequence[tuple[int, int]]) -> float:
    """Return the cost of an order of contraction of tensors of these shapes."""
    _, path = contract_path(INNER_PRODUCTS, *shapes, shapes=True, optimize=list(order))
    return float(path.opt_cost)


def _of_single_positions(left: Outer, right: Outer) -> Float[Tensor, "n m n2 m2"]:
    """Return (a · a') (b · b'), all of a single position."""
    n, m, _, o, _ = left.b.shape
    n2, m2 = right.b.shape[:2]
    symmetric = left is right and o >= LONG_ROWS
    a_products = matrix_product(left.a[:, 0, 0], right.a[:, 0, 0])
    # b as rows n·m where they are long, and their products take less to be put in order.
    if o > n * m:
        b, b_right = (x.b.flatten(0, 1).flatten(1) for x in (left, right))
        b_products = completed(product(b, b if left is right else b_right), symmetric)
        by_sample = b_products.unflatten(1, (n2, m2)).unflatten(0, (n, m))
        return scaled(by_sample, a_products[:, None, :, None]).double()
    # Otherwise as rows m·n, in the order in which columns are counted.
    b = left.b.transpose(0, 1).flatten(0, 1).flatten(1)
    b_right = b if left is right else right.b.transpose(0, 1).flatten(0, 1).flatten(1)
    b_products = completed(product(b, b_right), symmetric)
    products = scaled(b_products.unflatten(1, (-1, n2)).unflatten(0, (-1, n)), a_products[:, None])
    return products.permute(1, 0, 3, 2).double()


def _columns_first(left: Outer, right: Outer) -> Float[Tensor, "nm nm2"]:
    """Form the columns, some groups or outputs at a time, and multiply them."""
    n, m, g, o, _ = left.b.shape
    total = left.b.new_zeros((), dtype=torch.float64)
    # So many outputs, those of several groups or a part of one, that they are an intermediate.
    p = sum(left.widths)
    size = max(1, intermediate_bytes(left.b) // (n * m * p * left.b.element_size()))
    if torch.compiler.is_compiling():  # one graph for any number of samples
        size = max(1, COMPILED_ROWS // p)
    for groups in chunks(g, max(1, min(size, LONG_ROWS // p) // o)):
        for outputs in chunks(o, min(size, o)):
            rows = _columns_of_outputs(left, groups, outputs)
            rows_right = rows if left is right else _columns_of_outputs(right, groups, outputs)
            total = total + product(rows, rows_right).double()
    return completed(total, left is right)


def _columns_of_outputs(outer: Outer, groups: slice, outputs: slice) -> Float[Tensor, "nm gop"]:
    """Return the dense columns along the weights of some outputs of some groups."""
    return (
        formed(outer.b[:, :, groups, outputs], rows_of(outer)[:, groups]).flatten(2).flatten(0, 1)
    )


def _positions_first(left: Outer, right: Outer) -> Float[Tensor, "nm nm2"]:
    """Contract a with a', then with b', then with b, for one sample of the left at a time."""
    n, _, g, o, t = left.b.shape
    m = right.b.shape[1]
    # So many groups, samples of the right, and of the left, that a product is an intermediate.
    position_bytes, at_most = t * left.b.element_size(), intermediate_bytes(left.b)
    right_positions = right.b.shape[0] * right.b.shape[4]
    entries = max(4 * m * o, LEFT_SAMPLES_AT_ONCE * right_positions)
    group_count = max(1, min(g, at_most // (entries * position_bytes)))
    size = max(1, at_most // (4 * m * o * position_bytes * group_count))
    left_size = at_most // (position_bytes * right_positions * group_count)
    left_size = max(1, min(LEFT_SAMPLES_AT_ONCE, left_size))
    total = left.b.new_zeros((), dtype=torch.float64)
    for groups in chunks(g, group_count):
        b_left = left.b[:, :, groups].flatten(2)  # [n m got]
        b_right = right.b[:, :, groups].transpose(1, 2).flatten(2, 3)  # [n g mo t]
        rows = []
        for chunk in chunks(n, left_size):
            # Of columns with themselves, what lies left of the diagonal is left out.
            first = chunk.start if left is right else 0
            overlaps = _overlaps(left, right, groups, chunk, slice(first, None))
            for sample, overlap in zip(range(chunk.start, chunk.stop), overlaps, strict=True):
                # Σ_t' b'_t' (a'_t' · a_t) [n g mo t], and its product with b.
                parts = [
                    product_of_rows(b_left[sample], _by_columns(b @ a, m))
                    for b, a in zip(b_right[first:].split(size), overlap.split(size), strict=True)
                ]
                rows.append(F.pad(torch.cat(parts, 1), (first * m, 0)))
        total = total + torch.cat(rows).double()
    return completed(total, left is right)


def _in_groups_of_one_position(left: Outer, right: Outer) -> Float[Tensor, "nm nm2"]:
    """Contract a with a', then b', then b, in every group, for several samples at once."""
    n, n2, m = left.b.shape[0], right.b.shape[0], right.b.shape[1]
    b_right = right.b.flatten(3)  # [n m g o]
    size = intermediate_bytes(b_right) // (
        SYMMETRIC_STRIPS * b_right.numel() * b_right.element_size() + 1
    )
    rows = []
    for chunk in chunks(n, max(1, min(size, n // SYMMETRIC_STRIPS))):
        # Of columns with themselves, what lies left of the diagonal is left out.
        first = chunk.start if left is right else 0
        overlaps = _overlaps(left, right, slice(None), chunk, slice(first, n2))
        scaled_b = b_right[first:] * overlaps[:, :, None, :, 0]  # [n n m g o]
        part = left.b[chunk].flatten(2) @ scaled_b.flatten(3).flatten(1, 2).mT
        rows.append(F.pad(part.flatten(0, 1), (first * m, 0)).double())
    return completed(torch.cat(rows), left is right)


def _by_columns(b: Float[Tensor, "n g mo t"], m: int) -> Float[Tensor, "nm got"]:
    """Return b with a row a column."""
    rows: Tensor = b.unflatten(2, (m, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return rows


def _overlaps(
    left: Outer, right: Outer, groups: slice, left_samples: slice, right_samples: slice
) -> Float[Tensor, "n n2 g t2 t"]:
    """Return a' · a for some samples on either side."""
    a, a_right = left.a[left_samples, groups], right.a[right_samples, groups]
    if a.is_floating_point():
        rows, rows_right = (x.transpose(0, 1).flatten(1, 2) for x in (a, a_right))
        if len(rows) == 1:
            products = product_of_rows(rows_right[0], rows[0])[None]
        else:
            products = rows_right @ rows.mT  # [g nt nt]
        by_samples = products.unflatten(2, (len(a), -1)).unflatten(1, (len(a_right), -1))
        overlaps: Tensor = by_samples.permute(3, 1, 0, 2, 4)
        return overlaps
    # Rows with a single one have the inner product 1 where that is in the same place.
    same_place = (a_right[None, ..., None] == a[:, None, :, None]) & (a >= 0)[:, None, :, None]
    return same_place.to(left.b.dtype)


def _of_dense(
    left: Float[Tensor, "nm d"], right: Float[Tensor, "nm2 d"]
) -> Float[Tensor, "nm nm2"]:
    """Return the inner products of dense columns, summed over some parameters at a time."""
    total = left.new_zeros((), dtype=torch.float64)
    width = min(entries_at_once(left), entries_at_once(right))
    for a, b in zip(left.split(width, 1), right.split(width, 1), strict=True):
        wide = a if is_sliced(a) else a.double()
        total = total + product(wide, wide if left is right else b.to(wide.dtype))
    return completed(total, left is right)
