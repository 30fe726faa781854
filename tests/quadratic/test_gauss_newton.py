"""The Gauss-Newton matrix on both of its sides, against the dense one."""

import pytest
import torch

from ddnewton.quadratic.arguments import arguments_of
from ddnewton.quadratic.gauss_newton import GaussNewton
from ddnewton.quadratic.matrices import gauss_newton_matrices
from ddnewton.quadratic.quadratic_model import gradients, quadratic_model, to_parameters
from tests.models import PROBLEMS, problem
from tests.reference import dense, error

SIDES = {"relu_mlp": True, "tanh_mlp": True, "many_points": False, "one_tensor": True}


@torch.no_grad()
def matrix_of(name: str, **options) -> tuple[GaussNewton, list]:
    """The matrix of one block of all parameters, and its model."""
    with quadratic_model(arguments_of(*problem(name), **options)) as expanded:
        model, (matrix,) = gauss_newton_matrices(expanded)
        (gradient,) = gradients(model, [matrix])
    return matrix, [model, gradient]


@pytest.mark.parametrize("name", SIDES)
def test_side_is_the_shorter_one(name):
    matrix, _ = matrix_of(name)
    reference = dense(*problem(name))
    d = reference.jacobians.shape[2]
    assert matrix.on_columns == (matrix.weights.shape[0] <= d)
    assert matrix.on_columns == SIDES[name]
    assert matrix.matrix().shape == 2 * (min(len(matrix.weights), d),)


@pytest.mark.parametrize("name", PROBLEMS)
def test_matrix_has_the_eigenvalues_of_the_dense_one(name):
    matrix, _ = matrix_of(name)
    evals = torch.linalg.eigvalsh(matrix.matrix())
    truth = torch.linalg.eigvalsh(dense(*problem(name)).ggn)
    common = min(len(evals), len(truth))
    assert error(evals[-common:], truth[-common:]) < 1e-10
    assert evals[:-common].abs().sum() < 1e-10 * truth[-1]


@pytest.mark.parametrize("name", PROBLEMS)
def test_trace_and_diagonal(name):
    matrix, _ = matrix_of(name)
    assert error(matrix.trace(), dense(*problem(name)).ggn.trace()) < 1e-11
    assert torch.equal(matrix.diagonal().sum(), matrix.trace())
    assert error(matrix.diagonal(), matrix.matrix().diagonal()) < 1e-14


@pytest.mark.parametrize("name", PROBLEMS)
def test_matvec_is_the_product_with_the_matrix(name):
    matrix, _ = matrix_of(name)
    vector = torch.randn(len(matrix.diagonal()), dtype=torch.float64)
    assert error(matrix.matvec(vector), matrix.matrix() @ vector) < 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_vectors_of_parameters_see_the_dense_matrix(name):
    """G (A √w u) = A √w (K u) on the side of the columns, and G v itself on the other."""
    matrix, (model, _) = matrix_of(name)
    reference = dense(*problem(name))
    vector = torch.randn(len(matrix.diagonal()), dtype=torch.float64)
    root = matrix.weights.sqrt() if matrix.on_columns else torch.ones_like(vector)

    def parameters(x):
        return matrix.to_parameters((root * x)[None])[0]

    left = reference.ggn @ parameters(vector)
    assert error(left, parameters(matrix.matvec(vector))) < 1e-10
    (together,) = to_parameters(model, [matrix], [root * vector])
    assert torch.equal(together, parameters(vector))


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_is_the_dense_one(name):
    _, (_, gradient) = matrix_of(name)
    assert error(gradient, dense(*problem(name)).gradient) < 1e-11


def test_copies_may_be_written_to():
    matrix, _ = matrix_of("many_points")
    before = matrix.entries.clone()
    matrix.matrix().zero_()
    assert torch.equal(matrix.entries, before)
