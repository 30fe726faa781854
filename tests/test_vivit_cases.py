"""ViViT's own test problems, with its tolerances, against the dense reference."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddnewton import newton_step_and_info
from models import Problem, of_module
from reference import clusters, dense, directions, flat, step

FLOAT32, FLOAT64 = torch.float32, torch.float64


class PaddedSkip(nn.Module):
    """Constant padding, then a skip connection around a slice of a wider layer."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.head = nn.Linear(7, 4), nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, x):
        x = F.pad(self.narrow(x).relu(), (1, 1), value=0.5)
        return self.head((x + self.wide(x)[:, :6]).sigmoid())


def random_norm(norm: nn.Module) -> nn.Module:
    """Batch normalisation with random statistics and a random affine map."""
    norm.running_mean.data.uniform_()
    norm.running_var.data.uniform_()
    norm.weight.data.uniform_()
    norm.bias.data.uniform_()
    return norm


class Case(NamedTuple):
    shape: tuple
    layers: object
    classes: int | None
    columns: int
    parameters: int


CASES = {
    "V1": Case((3, 7), lambda: [nn.Linear(7, 6), nn.Linear(6, 5), nn.ReLU()], 5, 15, 83),
    "V3": Case(
        (4, 3, 6, 6),
        lambda: [
            nn.Conv2d(3, 2, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
            nn.Linear(8, 5), nn.Sigmoid(),
        ],
        5, 20, 101,
    ),
    "V4": Case(
        (3, 7), lambda: [nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Sigmoid()], None, 15, 83
    ),
    "V5": Case(
        (3, 4, 5),
        lambda: [nn.Linear(5, 3), nn.Sigmoid(), nn.Linear(3, 2), nn.Sigmoid(), nn.Flatten()],
        None, 24, 26,
    ),
    "V6": Case(
        (3, 4, 2, 5),
        lambda: [nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Flatten()],
        None, 48, 26,
    ),
    "V8": Case(
        (2, 3, 4),
        lambda: [random_norm(nn.BatchNorm1d(3)), nn.Flatten(), nn.Linear(12, 3), nn.Sigmoid()],
        None, 6, 45,
    ),
    "V9": Case(
        (3, 2, 4, 3),
        lambda: [random_norm(nn.BatchNorm2d(2)), nn.Flatten(), nn.Linear(24, 3)],
        3, 9, 79,
    ),
    "V12": Case((3, 7), lambda: [PaddedSkip()], 4, 12, 116),
}  # fmt: skip


def problem(name: str, dtype: torch.dtype) -> Problem:
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        X = torch.rand(case.shape)
        model = nn.Sequential(*case.layers()).eval()
        if case.classes:
            return of_module(
                model, X, torch.randint(case.classes, (len(X),)), nn.CrossEntropyLoss(), dtype
            )
        return of_module(model, X, torch.rand(model(X).shape), nn.MSELoss(), dtype)


@cache
def truth(name: str):
    return dense(*problem(name, FLOAT64))


def leading(most: int):
    """The largest eigenvalues above 1e-5, ``most`` of them or fewer, in ascending order."""

    def select(evals):
        above = [k for k in range(len(evals)) if evals[k] > 1e-5]
        return above[-most:]

    return select


@pytest.mark.parametrize("name", CASES)
def test_the_problem_is_the_one_in_the_table(name):
    N, C, D = truth(name).jacobians.shape
    assert CASES[name].columns == N * C
    assert CASES[name].parameters == D


@pytest.mark.parametrize("most", [1, 10])
@pytest.mark.parametrize("name", CASES)
def test_vivits_quantities(name, most):
    select = leading(most)
    s, info = newton_step_and_info(*problem(name, FLOAT32), 1.0, select=select)
    expected = directions(truth(name), select)

    def close(result, truth, rtol, atol):
        torch.testing.assert_close(result.double(), truth, rtol=rtol, atol=atol)

    close(flat(s), step(truth(name), 1.0, select), 1e-5, 1e-5)
    close(info.evals, expected.evals, 1e-4, 5e-6)
    for cluster in clusters(expected.evals, gap=1e-4):
        found, kept = (
            (d.gammas[:, cluster].double(), d.lambdas[:, cluster].double())
            for d in (info, expected)
        )
        if cluster.stop - cluster.start == 1:
            close(found[0].abs(), kept[0].abs(), 1e-5, 1e-4)
        else:
            close(found[0] @ found[0].T, kept[0] @ kept[0].T, 1e-5, 1e-4)
        close(found[1].sum(1), kept[1].sum(1), 1e-5, 1e-5)
