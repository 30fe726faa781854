"""Columns formed over their positions are the same columns, and go with those that are not."""

import pytest
import torch

from ddnewton.columns.column_sums import inner_products, weighted_sums
from ddnewton.columns.contraction import inner
from ddnewton.columns.factors import Outer
from ddnewton.columns.positions import in_one_position, shortest


def outer_products(n, m, g, o, t, p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, g, t, p, generator=generator, dtype=torch.float64)
    b = torch.randn(n, m, g, o, t, generator=generator, dtype=torch.float64)
    return Outer(a, b, (p,))


def written(outer):
    """Return the columns [n m d] as they are defined."""
    return torch.einsum("nmgot,ngtp->nmgop", outer.b, outer.a).flatten(2)


SHAPES = [(4, 1, 1, 3, 5, 6), (3, 2, 2, 3, 4, 5), (40, 2, 1, 30, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_sums_stay_what_they_are(shape):
    outer = outer_products(*shape)
    columns, formed = written(outer), in_one_position(outer)
    n, m, d = columns.shape
    products = torch.einsum("nmd,NMd->nmNM", columns, columns)
    for left, right in ((formed, formed), (formed, outer), (outer, formed)):
        torch.testing.assert_close(inner(left, right, (m, m)), products)
    weights, vectors = torch.randn(2, n, m).double(), torch.randn(3, d).double()
    (sums,) = weighted_sums(formed, weights)
    torch.testing.assert_close(sums, torch.einsum("knm,nmd->kd", weights, columns))
    torch.testing.assert_close(inner_products(formed, vectors), columns.flatten(0, 1) @ vectors.T)


def test_columns_of_other_counts_and_samples_go_together():
    left, right = outer_products(4, 1, 2, 3, 5, 6), outer_products(3, 9, 2, 3, 5, 6, seed=1)
    products = torch.einsum("nmd,NMd->nmNM", written(left), written(right))
    for pair in ((in_one_position(left), right), (left, in_one_position(right)), (left, right)):
        torch.testing.assert_close(inner(*pair, (1, 9)), products)


@pytest.mark.parametrize(
    ("shape", "is_formed"),
    [
        ((4, 1, 1, 3, 784, 6), True),  # a convolution with one column a sample
        ((4, 1, 1, 3, 5, 1), True),  # a bias of several positions
        ((4, 9, 1, 128, 36, 864), False),  # many outputs and inputs, few positions
        ((4, 9, 1, 8, 4, 8), False),  # fewer positions than columns
        ((4, 3, 1, 8, 1, 8), False),  # one position
    ],
    ids=["one column", "bias", "large", "few positions", "one position"],
)
def test_short_columns_are_formed(shape, is_formed):
    outer = outer_products(*shape)
    assert (shortest(outer) is not outer) == is_formed


def test_two_pieces_stay_apart():
    outer = outer_products(4, 1, 1, 3, 8, 3)._replace(widths=(2, 1))
    assert shortest(outer) is outer
