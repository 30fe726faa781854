"""Products of the columns A [d, i], assembled without ever holding all of A.

Sums over parameters are accumulated in float64, whatever the columns are: small eigenvalues are
differences that float32 sums do not resolve. What counts columns runs m·N + n; inside a chunk
samples come first, n·m, as they come out of ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.checks import check_derivatives
from ddnewton.contraction import combined, completed, formed, in_order, inner, product
from ddnewton.jacobians import Jacobian


class Columns(NamedTuple):
    """What the spectrum asks of A; weights w and coordinates count its columns."""

    gram: Callable[[], Float[Tensor, "i i"]]  # AᵀA
    outer: Callable[[Float[Tensor, " i"]], Float[Tensor, "d d"]]  # A diag(w) Aᵀ
    project: Callable[[Float[Tensor, "d k"]], Float[Tensor, "i k"]]  # AᵀE
    combine: Callable[[Float[Tensor, " i"]], Float[Tensor, " d"]]  # A w
    eps: float  # the rounding of a column
    sums: float  # the rounding of sums of products of columns, 0 for that of float64


def columns_of(jacobian: Jacobian) -> Columns:
    """Return the products of A, from the columns as they come."""
    return Columns(
        gram=partial(_gram, jacobian),
        outer=partial(_outer, jacobian),
        project=partial(_project, jacobian),
        combine=partial(_combine, jacobian),
        eps=jacobian.eps,
        sums=jacobian.sums,
    )


def small_matrix(
    columns: Columns, weights: Float[Tensor, " i"], d: int
) -> Float[Tensor, "side side"]:
    """Return AᵀA [i, i], or A diag(w) Aᵀ [d, d] where that is smaller."""
    matrix = columns.gram() if weights.shape[0] <= d else columns.outer(weights)
    check_derivatives(matrix)
    return matrix


def is_gram(matrix: Float[Tensor, "side side"], weights: Float[Tensor, " i"]) -> bool:
    """Return which of the two `small_matrix` is."""
    return matrix.shape[0] == weights.shape[0]


def _gram(jacobian: Jacobian) -> Float[Tensor, "i i"]:
    """Return AᵀA, in blocks on and above the diagonal; the rest is their mirror image."""
    m, chunks = jacobian.columns, jacobian.chunks
    rows: list[list[Tensor]] = [[] for _ in chunks]
    for i, chunk in enumerate(chunks):
        left = jacobian.visit(chunk)
        for j, other in enumerate(chunks[i:], start=i):
            right = left if i == j else jacobian.visit(other)
            block = torch.as_tensor(sum(map(inner, left, right)))
            block = block.unflatten(1, (-1, m)).unflatten(0, (-1, m))
            rows[i].append(block)
            if i != j:
                rows[j].append(block.permute(2, 3, 0, 1))
    whole = torch.cat([torch.cat(row, 2) for row in rows], 0)  # [n, m, n, m]
    return whole.permute(1, 0, 3, 2).flatten(0, 1).flatten(1, 2)


def _outer(jacobian: Jacobian, weights: Float[Tensor, " i"]) -> Float[Tensor, "d d"]:
    total: Tensor | float = 0.0
    for chunk in jacobian.chunks:
        root = _of_chunk(jacobian, weights, chunk).sqrt()
        a = (root.reshape(-1, 1) * _side_by_side(jacobian, chunk)).mT
        total = total + product(a, a)
    return completed(torch.as_tensor(total), symmetric=True)


def _project(jacobian: Jacobian, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "i k"]:
    parts = [
        (_side_by_side(jacobian, chunk) @ vectors).unflatten(0, (-1, jacobian.columns))
        for chunk in jacobian.chunks
    ]
    return torch.cat(parts, 0).transpose(0, 1).flatten(0, 1)


def _combine(jacobian: Jacobian, weights: Float[Tensor, " i"]) -> Float[Tensor, " d"]:
    total: Tensor | float = 0.0
    for chunk in jacobian.chunks:
        mine = _of_chunk(jacobian, weights, chunk)
        pieces = (combined(factor, mine) for factor in jacobian.visit(chunk))
        total = total + torch.cat([part for each in pieces for part in each])
    return in_order(torch.as_tensor(total), jacobian.order)


def _side_by_side(jacobian: Jacobian, chunk: slice) -> Float[Tensor, "nm d"]:
    """Return the columns of a chunk themselves."""
    rows = torch.cat([formed(factor).double() for factor in jacobian.visit(chunk)], 1)
    return in_order(rows, jacobian.order)


def _of_chunk(
    jacobian: Jacobian, weights: Float[Tensor, " i"], chunk: slice
) -> Float[Tensor, "n m"]:
    """Return the weights of a chunk's columns."""
    return weights.reshape(jacobian.columns, jacobian.samples)[:, chunk].T
