"""ViViT's own test problems, with its tolerances, against the dense reference."""

from functools import cache
from typing import NamedTuple, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddnewton import Group, directional_derivatives, ggn_eigvalsh, newton_step_and_info
from tests.models import Problem, of_module
from tests.reference import Dense, Directions, clusters, dense, directions, eigenpairs, flat

FLOAT32, FLOAT64 = torch.float32, torch.float64
DELTA = 1.0
GAP = 1e-4
"""Up to which distance, relative to the largest, eigenvalues are equal in float32."""

Chosen: TypeAlias = list[int] | None
"""A sub-sample, or all samples."""


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


class Expected(NamedTuple):
    """A block of the problem: its gradient, and what its curvature is, in the textbook's words."""

    ggn: Tensor  # [D, D]
    gradient: Tensor  # [D]
    slopes: tuple[Tensor, Tensor]  # J_n [N, C, D] and r_n [N, C] of the gradient's samples
    evals: Tensor  # [NM], all of them
    kept: Directions


def expected(name: str, leaves: list[int], select, slopes: Chosen, ggn: Chosen) -> Expected:
    """Cut the dense problem to a block's parameters and to the samples that are asked for."""
    whole, sizes = truth(name), [x.numel() for x in problem(name, FLOAT64).params.values()]
    places = torch.arange(sum(sizes)).split(sizes)
    own = torch.cat([places[i] for i in leaves])
    cut = whole._replace(jacobians=whole.jacobians[:, :, own])

    def of(samples: Chosen):
        some = slice(None) if samples is None else samples
        return Dense(cut.loss, *(part[some] for part in cut[1:]))

    curvature, gradient = of(ggn), of(slopes)
    return Expected(
        ggn=curvature.ggn,
        gradient=gradient.gradient,
        slopes=gradient[1:3],
        evals=eigenpairs(curvature)[0],
        kept=directions(curvature, select),
    )


def blocks(name: str, apart: bool) -> tuple[list[Group] | None, list[list[int]]]:
    """One group of all parameters, or the weights in one and the biases in another."""
    names = list(problem(name, FLOAT64).params)
    if not apart:
        return None, [list(range(len(names)))]
    kinds = ("weight", "bias")
    groups = [Group(lambda path, kind=kind: path.endswith(kind)) for kind in kinds]
    return groups, [[i for i, each in enumerate(names) if each.endswith(kind)] for kind in kinds]


def close(result: Tensor, true: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(result.double(), true.double(), rtol=rtol, atol=atol)


def check_run(s: Tensor, gammas: Tensor, lambdas: Tensor, run: slice, block: Expected) -> Tensor:
    """Check what is known along equal eigenvalues, and return the step along them.

    Of all directions the step, Σ_k γ_k γ_kᵀ and Σ_k λ_k are known. Where the selection cuts
    through them, the kept ones span some part of their eigenspace: along it the step is
    s = −Pg / (λ + δ), so that sᵀg = −(λ + δ)‖s‖², whichever part that is.
    """
    evals, kept = block.evals, block.kept
    first = len(evals) - len(kept.evals)
    (whole,) = [
        each for each in clusters(evals, GAP) if each.start <= first + run.start < each.stop
    ]
    every = eigenspace(block, whole)
    own = kept.vectors[:, run]
    J, r = block.slopes
    mean, curvature = gammas.mean(0), lambdas.mean(0)
    close(curvature, kept.evals[run], 1e-5, 1e-5)
    if whole.stop - whole.start == run.stop - run.start:
        slopes = torch.einsum("ncd,nc,dk->nk", J, r, own)
        if run.stop - run.start == 1:
            close(gammas.abs(), slopes.abs(), 1e-5, 1e-4)
        close(gammas @ gammas.T, slopes @ slopes.T, 1e-5, 1e-4)
        close(lambdas.sum(1), kept.lambdas[:, run].sum(1), 1e-5, 1e-5)
        return own @ (own.T @ (-block.gradient)) / (kept.evals[run].mean() + DELTA)
    slopes = torch.einsum("ncd,nc,dk->nk", J, r, every)
    assert torch.linalg.eigvalsh(slopes @ slopes.T - (gammas @ gammas.T).double())[0] > -1e-4
    along = every @ (every.T @ s)
    size = along.square().sum()
    damped = kept.evals[run].mean() + DELTA
    close(along @ block.gradient, -damped * size, 1e-5, 1e-5)
    close(mean.square().sum(), damped**2 * size, 1e-5, 1e-5)
    return along


def eigenspace(block: Expected, run: slice) -> Tensor:
    """An orthonormal basis of the eigenspace of equal eigenvalues, whatever of it is kept."""
    _, vectors = torch.linalg.eigh(block.ggn)
    last = vectors.shape[1] - (len(block.evals) - run.stop)
    return vectors[:, last - (run.stop - run.start) : last]


@pytest.mark.parametrize("ggn", [None, [0, 1]], ids=["ggn of all", "ggn of two"])
@pytest.mark.parametrize("slopes", [None, [0, 1]], ids=["gradient of all", "gradient of two"])
@pytest.mark.parametrize("apart", [False, True], ids=["one group", "weights and biases"])
@pytest.mark.parametrize("most", [1, 10])
@pytest.mark.parametrize("name", CASES)
def test_vivits_quantities(name, most, apart, slopes, ggn):
    groups, leaves = blocks(name, apart)
    select = leading(most)
    made = problem(name, FLOAT32)
    options = {"groups": groups, "subsampling_grad": slopes, "subsampling_ggn": ggn}
    s, infos = newton_step_and_info(*made, DELTA, select=select, **options)
    infos = infos if apart else (infos,)
    alongs = directional_derivatives(*made, select=select, **options)
    every = ggn_eigvalsh(*made, groups=groups, subsampling_ggn=ggn)
    for mine, info, along, evals in zip(
        leaves, infos, alongs if apart else [alongs], every if apart else [every], strict=True
    ):
        block = expected(name, mine, select, slopes, ggn)
        step = flat([list(s.values())[i] for i in mine])
        close(info.evals, block.kept.evals, 1e-4, 5e-6)
        close(evals, block.evals[len(block.evals) - len(evals) :], 1e-4, 5e-6)
        for gammas, lambdas in (along, (info.gammas, info.lambdas)):
            assert len(gammas) == len(block.slopes[0])
            whole = torch.zeros_like(step)
            for run in clusters(block.kept.evals, GAP):
                whole += check_run(step, gammas[:, run].double(), lambdas[:, run], run, block)
            close(step, whole, 1e-5, 1e-5)


def test_some_selections_of_the_grid_cut_through_equal_eigenvalues_and_most_do_not():
    cut = []
    for name in CASES:
        for apart in (False, True):
            for mine in blocks(name, apart)[1]:
                block = expected(name, mine, leading(10), None, None)
                first = len(block.evals) - len(block.kept.evals)
                cut.append(first not in {run.start for run in clusters(block.evals, GAP)})
    assert 0 < sum(cut) < len(cut) / 2
