"""Samples on another device than the parameters: moved a chunk at a time, as they are visited.

Where there is no second device the moves are counted, from the CPU to itself.
"""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import (
    Batches,
    covariance,
    directional_derivatives,
    directional_newton,
    fit,
    ggn_eigh,
    held_out,
    levenberg_marquardt,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
)
from ddnewton.damping import signal_to_noise
from tests.models import Problem, problem
from tests.reference import error

FLOAT64 = torch.float64
CPU = torch.device("cpu")
GRAMS = pytest.mark.parametrize("gram", ["auto", "dense", "structured", "free"])
LAYERED = pytest.mark.parametrize("name", ["relu_mlp", "convolution", "attention", "poisson"])
USERS = (
    "ddnewton.quadratic.arguments",
    "ddnewton.quadratic.streams",
    "ddnewton.linearize.structured.prepare",
)


def samples_of(X) -> int:
    return len(tree_leaves(X)[0])


def problem_of(n: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    params = {
        "W": torch.randn(4, 3, generator=generator, dtype=FLOAT64),
        "b": torch.zeros(3, dtype=FLOAT64),
    }
    X = torch.randn(n, 4, generator=generator, dtype=FLOAT64)
    y = torch.randint(0, 3, (n,), generator=generator)
    return Problem(
        lambda p, x: torch.tanh(x @ p["W"] + p["b"]), params, X, y, nn.CrossEntropyLoss()
    )


@pytest.fixture
def moves(monkeypatch):
    """How many samples are moved at a time, as if the parameters were elsewhere."""
    counts = []

    def moved_to(X, device):
        if device is not None:
            counts.append(samples_of(X))
        return X

    monkeypatch.setattr("ddnewton.trees.moved_to", moved_to)
    for module in USERS:
        monkeypatch.setattr(f"{module}.device_to_go_to", lambda *_: CPU)
    return counts


@GRAMS
@pytest.mark.parametrize("damping", [0.1, signal_to_noise()], ids=["number", "rule"])
def test_inputs_are_moved_a_chunk_at_a_time(gram, damping, moves):
    given = problem_of(23)
    options = {"complement": 0.1, "gram": gram}
    newton_step(*given, damping, **options, chunk_size=5)
    assert moves
    assert max(moves) <= 5


def test_losses_of_trials_too(moves):
    given = problem_of(23)
    optimizer = directional_newton(given.model_fn, given.criterion, chunk_size=5)
    optimizer.update(given.params, optimizer.init(given.params), given.X, given.y)
    assert max(moves) <= 5


def test_nothing_is_moved_where_devices_agree(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr("ddnewton.trees._called_there", refuse)
    given = problem_of(23)
    newton_step(*given, 0.1)
    newton_step(*given._replace(model_fn=prepare(*given[:3])), 0.1, gram="free", complement=0.1)


# --- on a device -----------------------------------------------------------------------------


def there(given: Problem, device) -> Problem:
    """The parameters on a device, the samples left on the host."""
    return given._replace(params=tree_map(lambda leaf: leaf.to(device), given.params))


def here(tree):
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, tree)


@pytest.mark.cuda
@GRAMS
@LAYERED
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_step_is_that_of_the_host(name, gram, chunk_size, device):
    given = problem(name, FLOAT64)
    options = {"complement": 0.1, "gram": gram, "chunk_size": chunk_size, "tol": 1e-14}
    result, info = newton_step_and_info(*there(given, device), 0.1, **options)
    assert {leaf.device.type for leaf in tree_leaves((result, tuple(info)))} == {device.type}
    expected = newton_step(*given, 0.1, complement=0.1)
    assert error(here(result), expected) < (1e-6 if gram == "free" else 1e-10)


@pytest.mark.cuda
@LAYERED
@pytest.mark.parametrize("gram", ["auto", "free"])
def test_a_prepared_model(name, gram, device):
    given = problem(name, FLOAT64)
    on_device = there(given, device)
    inputs = given.X, tree_map(lambda leaf: leaf.to(device), given.X)
    expected = newton_step(*given, 0.1)
    for found_on in inputs:
        prepared = prepare(on_device.model_fn, on_device.params, found_on)
        for X in inputs:
            result = newton_step(
                *on_device._replace(model_fn=prepared, X=X), 0.1, gram=gram, tol=1e-14
            )
            assert error(here(result), expected) < (1e-6 if gram == "free" else 1e-10)
            torch.testing.assert_close(
                prepared(on_device.params, X).cpu(), given.model_fn(given.params, given.X)
            )


@pytest.mark.cuda
def test_sub_samples_directions_and_slopes(device):
    given = problem("relu_mlp")
    options = {"subsampling_grad": [0, 2, 3], "subsampling_ggn": [1, 2, 4], "select": top_k(3)}
    result = newton_step(*there(given, device), 0.1, subsampling_curvature=[0, 1], **options)
    expected = newton_step(*given, 0.1, subsampling_curvature=[0, 1], **options)
    assert error(here(result), expected) < 1e-10
    evals, _ = ggn_eigh(*there(given, device), select=top_k(3))
    assert error(here(evals), ggn_eigh(*given, select=top_k(3))[0]) < 1e-10
    gammas, lambdas = directional_derivatives(*there(given, device), select=top_k(3))
    slopes, curvatures = directional_derivatives(*given, select=top_k(3))
    assert error(here(gammas.abs()), slopes.abs()) < 1e-8
    assert error(here(lambdas), curvatures) < 1e-8


@pytest.mark.cuda
@pytest.mark.parametrize(
    "damping",
    [0.1, levenberg_marquardt(), held_out()],
    ids=["number", "levenberg_marquardt", "held_out"],
)
def test_training(damping, device):
    given = problem("relu_mlp", FLOAT64)

    def trained(given: Problem):
        optimizer = directional_newton(given.model_fn, given.criterion, damping)
        params, state = given.params, optimizer.init(given.params)
        for _ in range(3):
            params, state, _ = optimizer.update(params, state, given.X, given.y)
        return params

    assert error(here(trained(there(given, device))), trained(given)) < 1e-8


@pytest.mark.cuda
def test_a_fit_and_its_covariance(device):
    def decay(p, x):
        return p["height"] * torch.exp(-p["rate"] * x)

    x = torch.linspace(0, 4, 30, dtype=FLOAT64)
    y = 2.5 * torch.exp(-1.3 * x) + 0.01 * torch.sin(9 * x)
    start = {name: torch.ones((), dtype=FLOAT64) for name in ("height", "rate")}
    expected = fit(decay, start, x, y)
    result = fit(decay, tree_map(lambda leaf: leaf.to(device), start), x, y)
    assert error(here(result.params), expected.params) < 1e-6
    cov = covariance(decay, result.params, x, y, nn.MSELoss())
    assert error(here(cov), covariance(decay, expected.params, x, y, nn.MSELoss())) < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("gram", ["auto", "free"])
def test_batches_of_the_host(gram, device):
    given = problem_of(23)
    loader = [(given.X[:15], given.y[:15]), (given.X[15:], given.y[15:])]
    for damping in (0.1, signal_to_noise()):
        options = {"complement": 0.1, "gram": gram, "tol": 1e-14}
        in_batches = there(given, device)._replace(X=Batches(loader), y=None)
        result = newton_step(*in_batches, damping, **options)
        expected = newton_step(*given, damping, complement=0.1)
        assert error(here(result), expected) < (1e-6 if gram == "free" else 1e-10)
