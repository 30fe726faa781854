"""Products of large float32 matrices by oneDNN are those of float64, wherever it is there."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import vmap

from ddnewton.columns import large_products
from ddnewton.columns.exact_products import matrix_product
from ddnewton.columns.large_products import is_large, product_by_sample, product_of_rows

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=[1, 2**40], ids=["all are large", "none is large"])
def from_how_many(request, monkeypatch):
    monkeypatch.setattr(large_products, "MULTIPLICATIONS", request.param)


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("from_how_many")
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_rows(transposed):
    left, right = rows(7, 30), rows(30, 5).T if transposed else rows(5, 30)
    product = product_of_rows(left, right)
    torch.testing.assert_close(product.double(), left.double() @ right.double().T, **ROUNDING)
    torch.testing.assert_close(matrix_product(left, right), product, rtol=0, atol=0)


@pytest.mark.usefixtures("from_how_many")
@pytest.mark.parametrize("n", [0, 1, 3])
def test_products_of_every_sample(n):
    left, right = rows(n, 4, 6), rows(n, 6, 5)
    product = product_by_sample(left, right)
    torch.testing.assert_close(product.double(), left.double() @ right.double(), **ROUNDING)


@pytest.mark.usefixtures("from_how_many")
def test_in_float64_they_are_in_float64():
    left, right = rows(7, 30).double(), rows(5, 30).double()
    torch.testing.assert_close(product_of_rows(left, right), left @ right.T, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("from_how_many")
def test_they_are_mapped_and_differentiated():
    left, right = rows(3, 7, 30), rows(3, 5, 30)
    mapped = vmap(product_of_rows)(left, right)
    torch.testing.assert_close(mapped, left @ right.mT)
    # By both modes, along the left and along the right.
    leaf, tangent = rows(7, 30).requires_grad_(), rows(7, 30)
    ones = torch.ones(7, 5)
    (slope,) = torch.autograd.grad(product_of_rows(leaf, right[0]), leaf, ones)
    torch.testing.assert_close(slope, ones @ right[0])
    (slope,) = torch.autograd.grad(product_of_rows(right[0], leaf), leaf, ones.T)
    torch.testing.assert_close(slope, ones @ right[0])
    with forward_ad.dual_level():
        for pair in ((True, False), (False, True)):
            sides = [
                forward_ad.make_dual(rows(7, 30), tangent) if dual else rows(7, 30) for dual in pair
            ]
            pushed = forward_ad.unpack_dual(product_of_rows(*sides)).tangent
            expected = tangent @ rows(7, 30).T
            torch.testing.assert_close(pushed, expected if pair[0] else expected.T)


def test_what_is_large(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(large_products, "MULTIPLICATIONS", 7 * 5 * 30)
    left, right = rows(7, 30), rows(5, 30)
    assert is_large(left, right) is torch.backends.mkldnn.is_available()
    assert not is_large(left, right[1:])
    assert not is_large(left.double(), right.double())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not is_large(left, right)
