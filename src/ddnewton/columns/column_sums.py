"""Products of columns with vectors: A w, their sums with weights, and Aᵀv, inner products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.factors import (
    Factor,
    Jacobian,
    Outer,
    Stack,
    entries_at_once,
    intermediate_bytes,
    single_position,
)
from ddnewton.transforms import is_batched


def sum_of_columns(jacobian: Jacobian) -> Jacobian:
    """Return the sum of all columns of a Jacobian as a single one, dense."""
    sums: list[Tensor] = []
    for chunk in jacobian.chunks:
        shape = (1, chunk.stop - chunk.start, jacobian.columns)
        ones = torch.ones(shape, dtype=torch.float64, device=jacobian.device)
        of_chunk = [torch.cat(weighted_sums(x, ones), 1) for x in jacobian.visit(chunk)]
        sums = list(map(torch.add, sums, of_chunk)) if sums else of_chunk
    return jacobian._replace(visit=lambda _: sums, chunks=[slice(0, 1)], samples=1, columns=1)


def sums_of_columns(
    factors: Sequence[Factor], weights: Sequence[Float[Tensor, "k n _"]]
) -> list[Float[Tensor, "k _"]]:
    """Return the sums of columns of several factors along the same entries, each with its weights.

    Outer products b ⊗ a with one a are those of one factor.
    """
    outer = [factor for factor in factors if isinstance(factor, Outer)]
    if len(outer) == len(factors) > 1 and all(factor.a is outer[0].a for factor in outer):
        joined = outer[0]._replace(b=torch.cat([factor.b for factor in outer], 1))
        return weighted_sums(joined, torch.cat(list(weights), 2))
    sums = map(weighted_sums, factors, weights)
    return [reduce(torch.add, pieces) for pieces in zip(*sums, strict=True)]


def weighted_sums(factor: Factor, weights: Float[Tensor, "k n m"]) -> list[Float[Tensor, "k _"]]:
    """Return the sums of columns with every row of weights, in float64, one tensor a piece."""
    # Every part of a stack with the weights of its columns.
    if isinstance(factor, Stack):
        by_part = weights.split([part.b.shape[1] for part in factor.parts], 2)
        sums = list(map(weighted_sums, factor.parts, by_part))
        return [torch.stack(pieces).sum(0) for pieces in zip(*sums, strict=True)]
    # Outer products, for as many vectors as an intermediate holds; and dense columns.
    if isinstance(factor, Outer):
        count = _vectors_at_once(factor)
        if len(weights) <= count:
            return _weighted_sums_outer(factor, weights)
        sums = [_weighted_sums_outer(factor, rows) for rows in weights.split(count)]
        return [torch.cat(pieces) for pieces in zip(*sums, strict=True)]
    w = weights.flatten(1)
    return [w @ part.double() for part in factor.split(entries_at_once(factor), 1)]


def inner_products(factor: Factor, vectors: Float[Tensor, "k _"]) -> Float[Tensor, "nm k"]:
    """Return the inner products of columns with vectors, in float64.

    This is the transpose of `weighted_sums`: a vector holds the pieces that it returns, one after
    the other.
    """
    # Of a stack part by part; of dense columns some parameters at a time; of others some vectors.
    if isinstance(factor, Stack):
        n = len(factor.parts[0].b)
        by_part = [inner_products(part, vectors).unflatten(0, (n, -1)) for part in factor.parts]
        return torch.cat(by_part, 1).flatten(0, 1)
    if not isinstance(factor, Outer):
        width = entries_at_once(factor)
        parts = zip(factor.split(width, 1), vectors.split(width, 1), strict=True)
        total: Tensor = reduce(
            torch.add, (part.double() @ vector.double().T for part, vector in parts)
        )
        return total
    groups = vectors.split(_vectors_at_once(factor))
    return torch.cat([_inner_products_outer(factor, group) for group in groups], 1)


def _weighted_sums_outer(
    outer: Outer, weights: Float[Tensor, "k n m"]
) -> list[Float[Tensor, "k _"]]:
    """Return Σ_nm w_nm Σ_t b_nmt ⊗ a_nt for every row w of the weights."""
    k, shape = weights.shape[0], outer.b.shape[2:]
    g, o, _ = shape
    # Columns in one position, b ⊗ a with a number a, are summed as they are.
    if single_position(outer) and sum(outer.widths) == 1:
        numbers = (weights * outer.a[:, 0, 0]).to(outer.b.dtype)
        return [(numbers.flatten(1) @ outer.b.flatten(2).flatten(0, 1)).double()]
    # First Σ_m w_nm b_nmt [n k g o t], then the sum over samples and positions with a. A product of
    # many small matrices takes several times as long as one of their entries.
    by_sample = weights.to(outer.b.dtype).transpose(0, 1)
    if outer.b.shape[1] == 1:
        b = by_sample[..., None, None] * outer.b
    else:
        b = (by_sample @ outer.b.flatten(2)).unflatten(2, shape)
    if single_position(outer):
        total = (b.flatten(1).T @ outer.a[:, 0, 0]).unflatten(0, (k, o))
    elif outer.a.is_floating_point() and g == 1 and not is_batched(b):
        # Sample by sample into one sum, without a copy of either in another order.
        zeros = b.new_zeros(k * o, outer.a.shape[3])
        total = zeros.addbmm(b.flatten(1, 3), outer.a[:, 0], beta=0).unflatten(0, (k, o))
    elif outer.a.is_floating_point():
        total = torch.einsum("nkgot,ngtp->kgop", b, outer.a)
    else:
        # A row of a has a single one: add b at its place, or, without one, in a row cut off below.
        size = sum(outer.widths)
        rows = b.permute(0, 4, 1, 2, 3).flatten(0, 1).flatten(1)
        places = torch.where(outer.a < 0, size, outer.a).flatten()
        sums = rows.new_zeros(size + 1, k * g * o).index_add(0, places, rows)
        total = sums[:-1].T.unflatten(0, (k, g * o))
    # The pieces, a weight and its bias, are summed at once and cut apart at the end.
    return [part.double().reshape(k, -1) for part in total.split(outer.widths, -1)]


def _inner_products_outer(outer: Outer, vectors: Float[Tensor, "k _"]) -> Float[Tensor, "nm k"]:
    """Return Σ_t b_nmtᵀ E_k a_nt, with every vector as a matrix E_k [g o p]."""
    _, _, g, o, _ = outer.b.shape
    parts = vectors.to(outer.b.dtype).split([g * o * width for width in outer.widths], 1)
    E = torch.cat([part.unflatten(1, (g, o, -1)) for part in parts], -1)
    if single_position(outer) and outer.b.shape[1] == 1:
        return _inner_products_single(outer.a[:, 0, 0], outer.b[:, 0, 0, :, 0], E[:, 0]).double()
    # First E a [n k g o t], which is a column of E where a is a one at a place.
    if outer.a.is_floating_point():
        Ea = torch.einsum("kgop,ngtp->nkgot", E, outer.a)
    else:
        size = sum(outer.widths)
        places = torch.where(outer.a < 0, size, outer.a)[:, 0]
        Ea = F.pad(E, (0, 1))[..., places].movedim(3, 0)
    products: Tensor = outer.b.flatten(2) @ Ea.flatten(2).mT
    return products.flatten(0, 1).double()


def _inner_products_single(
    a: Float[Tensor, "n p"], b: Float[Tensor, "n o"], E: Float[Tensor, "k o p"]
) -> Float[Tensor, "n k"]:
    """Return b_nᵀE_k a_n, one large product with the longer of a and b before sums of the other."""
    if b.shape[1] > a.shape[1]:
        a, b, E = b, a, E.mT
    products: Tensor = (a @ E.flatten(0, 1).mT).unflatten(1, E.shape[:2]) * b[:, None]
    return products.sum(2)


def _vectors_at_once(outer: Outer) -> int:
    """Return the number of vectors k for which sums of b, [n k g o t], fit into an intermediate."""
    return max(1, intermediate_bytes(outer.b) // (outer.b[:, 0].numel() * outer.b.element_size()))
