"""The basis of a loss that sums over positions: its blocks are the matrix with all its zeros."""

import pytest
import torch
from torch import nn

from ddnewton import clipped, empirical_fisher, fisher, monte_carlo, newton_step, weighted
from ddnewton import with_curvature as with_curvature_of
from ddnewton.criteria import as_loss, cross_entropy
from ddnewton.criteria.batch_root import root_of_batch
from ddnewton.criteria.loss import slopes_of
from ddnewton.inputs import memory
from ddnewton.linearize.basis import (
    PositionBlocks,
    basis_at,
    combined,
    of_positions,
    projected,
    stored,
    written_columns,
    written_out,
)
from tests.methods import FLOAT64
from tests.reference import autograd_derivatives

N, C = 3, 4
SHAPES = pytest.mark.parametrize("positions", [(5,), (2, 3)], ids=["tokens", "pixels"])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=FLOAT64)
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "class weights": {"weight": WEIGHT},
    "smooth": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 2},
    "all": {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 0},
}
CRITERIA = {
    "weighted": lambda loss: weighted(loss, 3.0),
    "fisher": fisher,
    "clipped": clipped,
    "curvature of another": lambda loss: with_curvature_of(nn.CrossEntropyLoss(), loss),
    "weighted curvature of another": lambda loss: weighted(with_curvature_of(loss, loss), 0.5),
}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def labels(*shape):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(1))


def with_zeros(blocks):
    """The matrix of blocks [n t v m], entry by entry."""
    n, t, v, m = blocks.shape
    L = torch.zeros(n, v, t, t, m, dtype=blocks.dtype)
    for position in range(t):
        L[:, :, position, position] = blocks[:, position]
    return L.reshape(n, v * t, t * m)


def test_blocks_do_what_their_matrix_does():
    blocks = random(N, 5, C, 3)
    basis, L = PositionBlocks(blocks), with_zeros(blocks)
    assert basis.shape == L.shape
    assert (basis.dtype, basis.device) == (L.dtype, L.device)
    assert torch.equal(written_out(basis), L)
    for columns in (slice(0, 4), slice(2, 9), slice(14, 15), slice(3, 3)):
        assert torch.equal(written_columns(basis, columns), L[:, :, columns])
        assert torch.equal(written_columns(L, columns), L[:, :, columns])
    samples = torch.tensor([2, 0])
    assert torch.equal(written_out(basis_at(basis, samples)), L[samples])
    assert torch.equal(written_out(basis_at(basis, slice(1, 3))), L[1:])
    w, v = random(N, 15), random(N, 20, 2)
    torch.testing.assert_close(combined(basis, w), combined(L, w), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(projected(basis, v), projected(L, v), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(projected(L, v), L.mT @ v, rtol=1e-14, atol=1e-14)


def test_one_position_is_a_matrix():
    assert isinstance(of_positions(random(N, 1, C, 3)), torch.Tensor)
    f, y = random(N, C, 1), labels(N, 1)
    assert isinstance(cross_entropy().expand(f, y).basis, torch.Tensor)
    assert cross_entropy().expand(f[:, :1], 0 * y).basis.shape == (N, 1, 1)


KINDS = [(name, "classes") for name in OPTIONS]
KINDS += [(name, "probabilities") for name in OPTIONS if "ignore_index" not in OPTIONS[name]]


@SHAPES
@pytest.mark.parametrize(("name", "targets"), KINDS)
def test_blocks_of_cross_entropy_give_its_hessian(name, targets, positions):
    f, y = random(N, C, *positions), labels(N, *positions)
    if targets == "probabilities":
        y = random(N, C, *positions, seed=2).softmax(1)
    loss = cross_entropy(**OPTIONS[name])
    expansion = loss.expand(f, y)
    # No more than the blocks is stored.
    t = f[0, 0].numel()
    assert isinstance(expansion.basis, PositionBlocks)
    assert stored(expansion.basis).shape == (N, loss.positions(f), C, C - 1)
    assert loss.positions(f) == t
    # They are the loss's derivatives.
    L, scale = written_out(expansion.basis), loss.denominator(f, y)
    slopes, hessians = autograd_derivatives(nn.CrossEntropyLoss(**OPTIONS[name]), f, y)
    torch.testing.assert_close(slopes_of(expansion) / scale, slopes, rtol=1e-12, atol=1e-14)
    found = L @ torch.diag_embed(expansion.h) @ L.mT / scale
    torch.testing.assert_close(found, hessians, rtol=1e-12, atol=1e-14)
    # The root that is made of them is the root by products.
    dense, root = (root_of_batch(record, f, f, y) for record in (loss._replace(root=None), loss))
    v = random(N, C * t, seed=3)
    torch.testing.assert_close(dense.product(v), root.product(v), rtol=1e-12, atol=1e-14)
    part = dense.at(torch.tensor([2, 0])).product(v[:2])
    torch.testing.assert_close(part, root.at(torch.tensor([2, 0])).product(v[:2]))


@SHAPES
@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_made_of_the_loss_has_blocks_too(name, positions):
    f, y = random(N, C, *positions), labels(N, *positions)
    loss = CRITERIA[name](cross_entropy())
    dense = CRITERIA[name](with_all_zeros(cross_entropy()))
    expansion, expected = loss.expand(f, y), dense.expand(f, y)
    assert isinstance(expansion.basis, PositionBlocks)
    assert loss.positions(f) == f[0, 0].numel()
    assert torch.equal(written_out(expansion.basis), expected.basis)
    for one, other in zip(expansion[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


def with_all_zeros(loss):
    """The same loss with a matrix for its basis."""

    def expand(f, y):
        expansion = loss.expand(f, y)
        return expansion._replace(basis=written_out(expansion.basis))

    return loss._replace(expand=expand, positions=None)


def test_fewer_columns_are_no_blocks():
    f = random(N, C, 5)
    drawn = as_loss(monte_carlo(cross_entropy(), 1, torch.Generator().manual_seed(0)))
    for loss in (drawn, empirical_fisher(cross_entropy())):
        assert loss.positions is None
        assert isinstance(loss.expand(f, labels(N, 5)).basis, torch.Tensor)
    # Another function in the place of the expansion may have no blocks either.
    replaced = as_loss(cross_entropy()._replace(expand=drawn.expand))
    assert replaced.positions is None


def test_blocks_are_what_memory_is_asked_for(monkeypatch):
    """As a matrix the basis of 2 · 6,400 outputs by 6,300 columns would take 0.6 GB."""
    monkeypatch.setattr(memory, "_limits", lambda: [(2**28 + 1000, 1000)])
    W, X = random(C, 64).float(), random(2, 100, C, seed=1).float()
    y = torch.randint(64, (2, 100), generator=torch.Generator().manual_seed(2))
    problem = (lambda p, x: (x @ p).mT, W, X, y)
    step = newton_step(*problem, nn.CrossEntropyLoss(), 0.1, gram="structured")
    assert step.isfinite().all()
    with pytest.raises(MemoryError, match="the basis of the loss"):
        newton_step(*problem, with_all_zeros(cross_entropy()), 0.1, gram="structured")
