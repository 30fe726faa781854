"""Steps by layers of every problem, with every option, and without a Jacobian in memory."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddnewton import newton_step, newton_step_and_info, prepare, top_k
from tests.linearize.layer_cases import TOLERANCE, before_the_widest_gap, compare, prepared_problem
from tests.methods import DTYPES, FLOAT32, FLOAT64, SELECTIONS, SMALL_AND_LARGE, from_noise, truth
from tests.models import PROBLEMS, Problem, cast, normal
from tests.reference import dense, directions, error, solve, step

# --- every problem, every option ------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("trained", ["0", "2"])
def test_a_module_of_which_a_part_is_trained(trained, dtype):
    """The others are the module's own, and stay as they are."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def part(dtype):
        whole = copy.deepcopy(net).to(dtype)
        params = {k: p.detach() for k, p in whole.named_parameters() if k.startswith(trained)}
        X, y = cast(given, dtype)
        return Problem(lambda p, x: functional_call(whole, p, (x,)), params, X, y, nn.MSELoss())

    given = normal(5, 3), normal(5, 2)
    problem = part(dtype)
    compare(prepare(*problem[:3]), problem, dense(*part(FLOAT64)), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem(name, dtype):
    compare(*prepared_problem(name, dtype), truth(name), TOLERANCE[dtype])


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_in_float32_itself(name, monkeypatch):
    """Large problems are not evaluated in float64: their columns are wrong by eps or so.

    With λ up to 3 and δ = 0.1 the step is wrong by about thirty times that.
    """
    monkeypatch.setattr("ddnewton.linearize.precision.CHEAP_FLOPS", 0)
    prepared, given = prepared_problem(name, FLOAT32)
    result, info = newton_step_and_info(prepared, *given[1:], 0.1)
    assert error(result, solve(truth(name), 0.1)) < 1e-5
    kept = directions(truth(name)).evals
    large = kept > 1e-3 * kept[-1]
    assert error(info.evals[-int(large.sum()) :], kept[large]) < 1e-6


def test_a_large_problem_in_float32():
    """5 GFLOP: more than is done in float64 for float32's sake."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    X, y, criterion = normal(64, 3, 24, 24), torch.arange(64) % 10, nn.CrossEntropyLoss()
    exact = copy.deepcopy(net).double()

    def by(net, gram, X):
        params = {name: p.detach() for name, p in net.named_parameters()}
        model_fn = lambda p, x: functional_call(net, p, (x,))  # noqa: E731 - of this net
        return newton_step(model_fn, params, X, y, criterion, 0.01, gram=gram)

    expected = by(exact, "dense", X.double())
    assert error(by(net, "structured", X), expected) < 1e-5
    assert error(by(exact, "structured", X.double()), expected) < 1e-11


@pytest.mark.parametrize("name", PROBLEMS)
def test_chunks_change_nothing(name):
    prepared, given = prepared_problem(name)
    top = before_the_widest_gap(directions(truth(name)).evals)
    options = {"select": top_k(top), "complement": 0.2}
    whole, info = newton_step_and_info(prepared, *given[1:], 0.1, **options)
    for chunk_size in (1, 2, 3):
        parts, other = newton_step_and_info(
            prepared, *given[1:], 0.1, chunk_size=chunk_size, **options
        )
        assert error(parts, whole) < 1e-11
        for field in ("loss", "evals", "gradient_norm", "gradient_share", "rank"):
            assert error(getattr(other, field), getattr(info, field)) < 1e-11, field
        assert error(other.lambdas, info.lambdas) < 1e-9


@DTYPES
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_every_choice_of_directions_and_dampings(name, dtype):
    prepared, given = prepared_problem(name, dtype)
    for theirs, ours, _ in SELECTIONS.values():
        for damping in (0.05, from_noise):
            for complement in (None, 0.5):
                expected = step(truth(name), damping, ours, complement)
                options = {"select": theirs, "complement": complement}
                result = newton_step(prepared, *given[1:], damping, **options)
                assert error(result, expected) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["convolution", "attention", "tied_autoencoder", "poisson"])
def test_unprepared_it_is_the_same(name):
    prepared, given = prepared_problem(name)
    unprepared = newton_step(*given, 0.1, gram="structured")
    assert error(unprepared, newton_step(prepared, *given[1:], 0.1)) < 1e-13


# --- memory ---------------------------------------------------------------------------------


PEAKS = """
import torch
from ddnewton import newton_step, prepare, top_k
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)


def step(net, *shape):
    params = {name: p.detach() for name, p in net.named_parameters()}
    model_fn = prepare(lambda p, x: functional_call(net, p, (x,)), params, torch.randn(1, *shape))

    def peak(n, **options):
        X, y = torch.randn(n, *shape), torch.arange(n) % 10
        newton_step(model_fn, params, X, y, nn.CrossEntropyLoss(), 0.1, select=top_k(5), **options)
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        return int(status["VmHWM"].split()[0]) / 2**10

    return peak


mlp = step(nn.Sequential(nn.Linear(400, 600), nn.ReLU(), nn.Linear(600, 10)), 400)
pool = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
convolutions = step(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *pool), 3, 32, 32)
print(mlp(1), convolutions(1), mlp(64), convolutions(64, chunk_size=4), convolutions(64))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_jacobian_is_ever_in_memory():
    """The peaks of a process, in MiB; the Jacobian of the MLP alone would have 540."""
    # Freed at once, or peaks depend on what the allocator happens to keep.
    plain = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=True,
    )
    _, before, mlp, in_chunks, whole = map(float, done.stdout.split())
    assert mlp - before < 60
    assert in_chunks - before < 0.5 * (whole - before)
