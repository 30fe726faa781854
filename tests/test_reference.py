"""The reference and the problems are themselves tested, against torch's own transforms."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import hessian, jacrev

from tests.models import PROBLEMS, Problem, problem
from tests.reference import (
    autograd_derivatives,
    clusters,
    dense,
    directions,
    eigenpairs,
    error,
    flat,
    logistic_derivatives,
    rank,
    softmax_derivatives,
    solve,
    solve_in_decimals,
    step,
)

LOSSES = {
    "mse": (F.mse_loss, torch.tensor([[0.3, -1.0], [2.0, 0.1], [0.5, 0.4]])),
    "cross_entropy": (F.cross_entropy, torch.tensor([1, 0, 1])),
    "bce": (F.binary_cross_entropy_with_logits, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.2, 0.0]])),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_of_a_linear_model_the_ggn_is_the_hessian(name, reduction):
    function, y = LOSSES[name]
    y = y.double() if y.is_floating_point() else y
    X = torch.tensor([[1.0, 2.0], [-0.5, 0.3], [0.7, -1.1]], dtype=torch.float64)
    W = torch.tensor([[0.1, 0.4], [-0.8, 0.2]], dtype=torch.float64)

    def loss(outputs, y):
        return function(outputs, y, reduction=reduction)

    def of_weights(W):
        return loss(X @ W, y)

    result = dense(lambda W, X: X @ W, W, X, y, loss)

    torch.testing.assert_close(result.loss, of_weights(W))
    torch.testing.assert_close(result.gradient, jacrev(of_weights)(W).flatten())
    torch.testing.assert_close(result.ggn, hessian(of_weights)(W).reshape(4, 4))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_autograds(name):
    model_fn, params, X, y, criterion = given = problem(name)
    leaves = torch.utils._pytree.tree_leaves(params)
    for leaf in leaves:
        leaf.requires_grad_()
    criterion(model_fn(params, X), y).backward()
    truth = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    assert error(dense(*given).gradient, truth) < 1e-14


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_eigenpairs_are_the_ggns(name):
    result = dense(*problem(name))
    evals, _ = eigenpairs(result)
    kept = directions(result)
    full = torch.linalg.eigvalsh(result.ggn)[-len(kept.evals) :]
    torch.testing.assert_close(kept.evals, full, rtol=1e-10, atol=1e-14 * float(full[-1]))
    torch.testing.assert_close(kept.lambdas.mean(0), kept.evals, rtol=1e-10, atol=0)
    assert error(result.ggn @ kept.vectors, kept.evals * kept.vectors) < 1e-13
    assert torch.linalg.matrix_rank(result.ggn, rtol=1e-11) == rank(evals)


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_directions_solve_the_damped_system(name):
    result = dense(*problem(name))
    assert error(step(result, 0.1), solve(result, 0.1)) < 1e-13


@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_all_solves_agree(name):
    result = dense(*problem(name))
    identity = torch.eye(len(result.gradient), dtype=torch.float64)
    truth = -torch.linalg.solve(result.ggn + 0.1 * identity, result.gradient)
    assert error(solve(result, 0.1), truth) < 1e-13
    assert error(solve_in_decimals(result, 0.1), truth) < 1e-13


def test_the_stable_derivatives_are_autograds_where_nothing_cancels():
    logits = torch.tensor([[0.3, -1.0, 0.2], [2.0, 0.1, 1.0]], dtype=torch.float64)
    cases = [
        (softmax_derivatives, F.cross_entropy, torch.tensor([2, 0])),
        (logistic_derivatives, F.binary_cross_entropy_with_logits, (logits > 0.2).double()),
    ]
    for derivatives, loss, y in cases:
        for result, truth in zip(
            derivatives(loss, logits, y), autograd_derivatives(loss, logits, y), strict=True
        ):
            torch.testing.assert_close(result, truth, rtol=1e-14, atol=1e-16)


def test_the_stable_derivatives_do_not_cancel():
    logits = torch.tensor([[200.0, -200.0]], dtype=torch.float64)
    slopes, hessians = softmax_derivatives(F.cross_entropy, logits, torch.tensor([0]))
    tiny = torch.exp(torch.tensor(-400.0, dtype=torch.float64))
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(slopes, tiny * signs[None], rtol=1e-12, atol=0)
    torch.testing.assert_close(hessians[0], tiny * torch.outer(signs, signs), rtol=1e-12, atol=0)


def test_a_loss_that_couples_samples_is_caught():
    outputs = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="couples"):
        autograd_derivatives(lambda f, y: f.mean().square(), outputs, None)


def test_error_is_relative_and_sees_shapes():
    assert error(torch.tensor([1.1, 0.0]), torch.tensor([1.0, 0.0])) == pytest.approx(0.1)
    assert error(torch.tensor([0.1]), torch.tensor([0.0])) == pytest.approx(0.1)
    with pytest.raises(AssertionError):
        error(torch.ones(2), torch.ones(3))


def test_clusters_group_equal_eigenvalues():
    evals = torch.tensor([0.1, 0.5, 0.5 + 1e-9, 0.7, 1.0, 1.0])
    assert clusters(evals) == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_the_same_in_both_dtypes(name):
    single, double = problem(name, torch.float32), problem(name, torch.float64)
    assert isinstance(single, Problem)
    assert torch.equal(flat(single.params), flat(double.params))
    assert torch.equal(flat(single.X), flat(double.X))
    outputs = single.model_fn(single.params, single.X)
    assert outputs.dtype == torch.float32
    assert error(outputs, double.model_fn(double.params, double.X)) < 2e-6
