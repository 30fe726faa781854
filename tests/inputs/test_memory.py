"""Steps that do not fit into the memory at hand are refused before the work, with the figures."""

import pytest
import torch
from torch import nn

from ddnewton import (
    Group,
    empirical_fisher,
    ggn_eigvalsh,
    monte_carlo,
    newton_step,
    newton_step_and_info,
)
from ddnewton.inputs import memory

FREE = 2**27
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setattr(memory, "_limits", lambda: [(FREE + 1000, 1000)])


def case(n, classes, positions=()):
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(4, classes, generator=generator)
    X = torch.randn(n, *positions, 4, generator=generator)
    y = torch.randint(0, classes, (n, *positions), generator=generator)
    return (lambda p, x: (x @ p).movedim(-1, 1)), params, X, y


def test_a_basis_that_does_not_fit_is_refused_with_its_figures():
    # 2 · 8 B · 2 · 6,400 outputs · 6,400 columns
    match = "6400 columns for each of 2 samples of 6400 outputs: 1.31 GB, where 0.134 GB are free"
    for gram in ("dense", "structured"):
        with pytest.raises(MemoryError, match=match):
            newton_step(*case(2, 6400), nn.CrossEntropyLoss(), 0.1, gram=gram)


def test_of_positions_only_blocks_are_counted_and_columns_as_they_are():
    # 2 · 8 B · 6,300 columns · 256 parameters would be 26 MB for a sample, the blocks 13 MB.
    for gram in ("dense", "structured"):
        step = newton_step(*case(2, 64, (100,)), nn.CrossEntropyLoss(), 0.1, gram=gram)
        assert step.isfinite().all()


def wide_case(n, halves, width=1200):
    """Logits of 5 classes that depend on 2,400 parameters, in two leaves, or on more."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(4, width // 4, generator=generator) for name in halves}

    def model_fn(p, x):
        hidden = torch.tanh(torch.cat([x @ weight for weight in p.values()], 1))
        return hidden.unflatten(1, (5, -1)).sum(2)

    X = torch.randn(n, 4, generator=generator)
    return model_fn, params, X, torch.randint(0, 5, (n,), generator=generator)


def test_a_matrix_that_does_not_fit_is_refused_with_its_figures():
    # 2 · 8 B · 3,000²
    problem = (*wide_case(1200, ("left", "right"), 1500), nn.CrossEntropyLoss())
    match = r"side 3000, factorized, of N·M = 1200·4 .* 3000 parameters: 0.144 GB"
    for gram in ("dense", "structured"):
        with pytest.raises(ValueError, match=match):
            newton_step(*problem, 0.1, gram=gram)


def test_eigenpairs_that_do_not_fit_are_refused_with_their_figures():
    # (4 + 2 · 4,800 / 2,400) · 8 B · 2,400²
    problem = (*wide_case(1200, ("left", "right")), nn.CrossEntropyLoss())
    match = r"side 2400, with copies and eigenvectors .* 1200·4 columns .*: 0.369 GB.* One number"
    for damping in (0.0, lambda evals, *_: evals):
        with pytest.raises(ValueError, match=match):
            newton_step(*problem, damping, gram="dense")
    with pytest.raises(MemoryError, match=match):
        ggn_eigvalsh(*problem)
    # With a number, no sooner than they are asked for.
    match = "copies and eigenvectors of a Gauss-Newton matrix of side 2400: 0.323 GB"
    with pytest.raises(MemoryError, match=match):
        newton_step_and_info(*problem, 0.1, gram="dense")
    assert newton_step(*problem, 0.1)["left"].isfinite().all()


def test_the_ways_out_do_fit():
    model_fn, params, X, y = case(2, 64, (100,))
    for criterion in (
        monte_carlo(nn.CrossEntropyLoss(), 1, torch.Generator().manual_seed(0)),
        empirical_fisher(nn.CrossEntropyLoss()),
    ):
        assert newton_step(model_fn, params, X, y, criterion, 0.1).isfinite().all()
    problem = (*wide_case(1200, ("left", "right")), nn.CrossEntropyLoss())
    step = newton_step(*problem, 0.1, groups=[Group(["left"]), Group(["right"])])
    assert step["right"].isfinite().all()
    few = newton_step(*problem, 0.1, subsampling_ggn=torch.arange(100))
    assert few["left"].isfinite().all()


def test_one_basis_for_all_samples_is_counted_once():
    # As n bases it would be 2 · 8 B · 1,000 · 300 · 300.
    generator = torch.Generator().manual_seed(0)
    params, X = torch.randn(2, 300, generator=generator), torch.randn(1000, 2, generator=generator)
    problem = (lambda p, x: x @ p, params, X, torch.zeros(1000, 300))
    step = newton_step(*problem, nn.MSELoss(reduction="sum"), 10.0)
    curvature = 2 * X.double().T @ X.double()
    damped = curvature + 10 * torch.eye(2, dtype=torch.float64)
    expected = -torch.linalg.solve(damped, curvature @ params.double())
    torch.testing.assert_close(step, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_basis_of_the_whole_batch_is_estimated_where_that_cannot_be_parted():
    # As n bases it would be 2 · 8 B · 1,000 · 300 · 300.
    generator = torch.Generator().manual_seed(0)
    params, X = torch.randn(2, 300, generator=generator), torch.randn(1000, 2, generator=generator)
    mask = torch.rand(1000, 300, generator=generator) < 0.9

    def criterion(outputs, y):
        return (outputs - y).square()[mask].mean()

    problem = (lambda p, x: x @ p, params, X, torch.zeros(1000, 300))
    step = newton_step(*problem, criterion, 1e-5)
    torch.testing.assert_close(step, -params, rtol=1e-2, atol=0)


def test_what_is_free_is_what_the_smallest_limit_leaves(monkeypatch):
    assert memory.free_bytes(CPU) <= FREE
    monkeypatch.setattr(memory, "_limits", list)
    assert FREE < memory.free_bytes(CPU) <= memory.memory_bytes(CPU)
