"""A gradient that the columns of the curvature do not span, by its sum and by its samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from ddnewton import (
    Group,
    directional_newton,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
)
from ddnewton.criteria import with_curvature
from ddnewton.damping import relative
from ddnewton.linearize import by_program
from tests.reference import error, flat

FLOAT64 = torch.float64
N, CLASSES = 128, 8
DAMPINGS = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)
CRITERION = with_curvature(nn.CrossEntropyLoss(), lambda outputs, y: 0.5 * outputs.square().mean())


class Dense:
    """A small convolutional net in float64 with J, all at once, and the gradient by autograd."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(4, 32, 3), nn.Tanh(), nn.Flatten(), nn.Linear(512, CLASSES)
        )
        self.params = {name: p.detach() for name, p in self.net.named_parameters()}
        self.X, self.y = torch.randn(N, 4, 6, 6), torch.randint(CLASSES, (N,))
        wide = {name: p.double() for name, p in self.params.items()}
        J = jacrev(lambda p: self.model_fn(p, self.X.double()).flatten())(wide)
        self.J = torch.cat([leaf.flatten(1) for leaf in J.values()], 1)
        self.g = flat(
            torch.func.grad(lambda p: F.cross_entropy(self.model_fn(p, self.X.double()), self.y))(
                wide
            )
        )

        self.prepared = {
            torch.float32: prepare(self.model_fn, self.params, self.X),
            FLOAT64: prepare(self.model_fn, wide, self.X.double()),
        }

    def model_fn(self, params, X):
        return functional_call(self.net, params, (X,))

    def step(self, delta, kept=slice(None)):
        """−(G + δI)⁻¹ g of the parameters that are kept, with G = JᵀJ / (N c)."""
        rows, g = self.J[:, kept] / (N * CLASSES) ** 0.5, self.g[kept]
        gram = rows @ rows.T + delta * torch.eye(len(rows), dtype=FLOAT64)
        return (rows.T @ torch.linalg.solve(gram, rows @ g) - g) / delta


@pytest.fixture(scope="module")
def problem():
    return Dense()


@pytest.fixture
def sums(monkeypatch):
    """The Jacobians whose columns are summed up."""
    summed, sum_of_columns = [], by_program.sum_of_columns

    def noted(jacobian):
        summed.append(jacobian)
        return sum_of_columns(jacobian)

    monkeypatch.setattr(by_program, "sum_of_columns", noted)
    return summed


def call(problem, dtype, function=newton_step, damping=1e-2, **options):
    params = {name: p.to(dtype) for name, p in problem.params.items()}
    X = problem.X.to(dtype)
    return function(problem.prepared[dtype], params, X, problem.y, CRITERION, damping, **options)


@pytest.mark.parametrize("chunk_size", [None, 50], ids=["one chunk", "three chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("delta", DAMPINGS)
def test_steps_by_the_sum(problem, sums, delta, dtype, chunk_size):
    step = call(problem, dtype, damping=delta, complement=delta, chunk_size=chunk_size)
    assert sums
    assert error(flat(step), problem.step(delta)) < 1e-5


def test_groups(problem, sums):
    groups = [Group("0", damping=1e-2), Group("3", damping=1e-1)]
    step = call(problem, FLOAT64, damping=1e-1, complement=1e-1, groups=groups)
    assert len(sums) == 1
    d = sum(p.numel() for name, p in problem.params.items() if name.startswith("3"))
    of_linear = slice(len(problem.g) - d, None)
    assert error(flat(step)[of_linear], problem.step(1e-1, of_linear)) < 1e-8


@pytest.mark.parametrize("complement", [None, 0.3])
def test_along_directions_the_sum_has_the_slopes_of_its_samples(problem, sums, complement):
    options = {"select": top_k(5), "complement": complement}
    step = call(problem, FLOAT64, **options)
    assert len(sums) == 1
    by_samples, info = call(problem, FLOAT64, newton_step_and_info, **options)
    assert len(sums) == 1
    assert info.gammas.shape[0] == N
    assert error(flat(step), flat(by_samples)) < 1e-10


def test_a_rule_gets_the_slopes_of_samples(problem, sums):
    seen = []

    def rule(evals, evecs, gammas, lambdas):
        seen.append(gammas.shape[0])
        return relative(0.1)(evals, evecs, gammas, lambdas)

    call(problem, FLOAT64, damping=rule)
    assert (sums, seen) == ([], [N])


def test_some_samples(problem, sums):
    """The gradient of a quarter of the batch, the curvature of the rest."""
    quarter, rest = torch.arange(32), torch.arange(32, N)
    options = {"subsampling_grad": quarter, "subsampling_ggn": rest}
    step = call(problem, FLOAT64, damping=1e-2, complement=1e-2, **options)
    assert len(sums) == 1
    by_samples, _ = call(
        problem, FLOAT64, newton_step_and_info, damping=1e-2, complement=1e-2, **options
    )
    assert error(flat(step), flat(by_samples)) < 1e-8


def test_updates(problem, sums):
    params = {name: p.double() for name, p in problem.params.items()}
    options = {"damping": 1e-2, "complement": "damping", "learning_rate": 1.0}
    optimizer = directional_newton(problem.prepared[FLOAT64], CRITERION, **options)
    state = optimizer.init(params)
    moved, _, info = optimizer.update(params, state, problem.X.double(), problem.y)
    assert len(sums) == 1
    assert bool(info.accepted)
    assert error(flat(moved) - flat(params), problem.step(1e-2)) < 1e-8
    assert error(info.gradient_norm, problem.g.norm()) < 1e-10
