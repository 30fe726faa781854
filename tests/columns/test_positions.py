"""Columns formed over their positions are the same columns, and go with those that are not."""

import pytest
import torch

from ddnewton.columns.column_sums import inner_products, weighted_sums
from ddnewton.columns.contraction import inner
from ddnewton.columns.positions import in_one_position, shortest
from tests.columns.test_contraction import Shape, columns, outer_products

SHAPES = [
    Shape(4, 1, 1, 3, 5, (6,)),
    Shape(3, 2, 2, 3, 4, (5,)),
    Shape(40, 2, 1, 30, 2, (3,)),
    Shape(3, 2, 1, 2, 4, (7,), lookup=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_products_and_sums_stay_what_they_are(shape):
    outer = outer_products(shape)
    rows, formed, n, m = columns(outer), in_one_position(outer), shape.n, shape.m
    products = (rows @ rows.T).unflatten(1, (n, m)).unflatten(0, (n, m))
    for left, right in ((formed, formed), (formed, outer), (outer, formed)):
        torch.testing.assert_close(inner(left, right, (m, m)), products)
    weights, vectors = torch.randn(2, n, m).double(), torch.randn(3, rows.shape[1]).double()
    (sums,) = weighted_sums(formed, weights)
    torch.testing.assert_close(sums, weights.flatten(1) @ rows)
    torch.testing.assert_close(inner_products(formed, vectors), rows @ vectors.T)


def test_columns_of_other_counts_and_samples_go_together():
    left = outer_products(Shape(4, 1, 2, 3, 5, (6,)))
    right = outer_products(Shape(3, 9, 2, 3, 5, (6,)))
    products = (columns(left) @ columns(right).T).unflatten(1, (3, 9)).unflatten(0, (4, 1))
    for pair in ((in_one_position(left), right), (left, in_one_position(right)), (left, right)):
        torch.testing.assert_close(inner(*pair, (1, 9)), products)


@pytest.mark.parametrize(
    ("shape", "is_formed"),
    [
        (Shape(4, 1, 1, 3, 784, (6,)), True),  # a convolution with one column a sample
        (Shape(4, 1, 1, 3, 5, (1,)), True),  # a bias of several positions
        (Shape(4, 9, 1, 128, 36, (864,)), False),  # many outputs and inputs, few positions
        (Shape(4, 9, 1, 8, 4, (8,)), False),  # fewer positions than columns
        (Shape(4, 3, 1, 8, 1, (8,)), False),  # one position
    ],
    ids=["one column", "bias", "large", "few positions", "one position"],
)
def test_short_columns_are_formed(shape, is_formed):
    outer = outer_products(shape)
    assert (shortest(outer) is not outer) == is_formed


def test_two_pieces_stay_apart():
    outer = outer_products(Shape(4, 1, 1, 3, 8, (2, 1)))
    assert shortest(outer) is outer
