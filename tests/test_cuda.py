"""On CUDA everything is what it is on the CPU, and stays there.

``python -m benchmarks.gpu`` runs these tests on a machine with a GPU; ``pytest --device cpu`` shows
without one that they hold together.
"""

import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import recipes
from ddnewton import (
    Group,
    covariance,
    directional_derivatives,
    directional_newton,
    fit,
    ggn_eigh,
    ggn_eigvalsh,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
)
from ddnewton.optim import DirectionalNewton
from tests.models import PROBLEMS, Problem, problem
from tests.reference import dense, error, solve

pytestmark = pytest.mark.cuda

FLOAT32, FLOAT64 = torch.float32, torch.float64
TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
# cuDNN differentiates no LSTM in eval mode; the buffers of eval_batch_norm stay on the CPU.
NAMES = pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - {"lstm", "eval_batch_norm"}))
LAYERED = pytest.mark.parametrize("name", ["relu_mlp", "convolution", "attention", "poisson"])
GRAMS = pytest.mark.parametrize("gram", ["auto", "dense", "structured"])


def moved(tree, device):
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def on(device, given: Problem) -> Problem:
    params, X, y = (moved(tree, device) for tree in given[1:4])
    return given._replace(params=params, X=X, y=y)


def devices(tree) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree)}


def on_cpu(tree):
    return moved(tree, "cpu")


# --- steps ----------------------------------------------------------------------------------


@DTYPES
@NAMES
def test_a_step_is_that_of_the_cpu(name, dtype, device):
    given = problem(name, dtype)
    result, info = newton_step_and_info(*on(device, given), 0.1)
    assert devices(result) == devices(tuple(info)) == {device.type}
    assert {leaf.dtype for leaf in tree_leaves(result)} == {dtype}
    assert error(on_cpu(result), newton_step(*given, 0.1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "many_points", "poisson"])
def test_a_step_is_that_of_the_reference(name, device):
    result = newton_step(*on(device, problem(name)), 0.1)
    assert error(on_cpu(result), solve(dense(*problem(name)), 0.1)) < 1e-11


@DTYPES
@GRAMS
@LAYERED
def test_every_gram_matrix(name, gram, dtype, device):
    given = problem(name, dtype)
    options = {"select": top_k(3), "complement": 0.5, "gram": gram}
    result = newton_step(*on(device, given), 0.1, **options)
    assert error(on_cpu(result), newton_step(*given, 0.1, **options)) < TOLERANCE[dtype]


@DTYPES
@LAYERED
def test_prepared(name, dtype, device):
    given = problem(name, dtype)
    there = on(device, given)
    prepared = prepare(there.model_fn, there.params, there.X)
    result = newton_step(*there._replace(model_fn=prepared), 0.1)
    assert devices(result) == {device.type}
    assert error(on_cpu(result), newton_step(*given, 0.1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["mlp", "2c2d-32"])
@pytest.mark.parametrize("select", [None, top_k(10)], ids=["all", "top_10"])
def test_a_net_of_useful_size_in_float32(name, select, device, monkeypatch):
    """Large enough to stay in float32; rounding to TF32 would be the user's wish."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    case = recipes.build(name, device.type, samples=8)
    narrow, wide = case.problem, recipes.build(name, "cpu", FLOAT64, samples=8).problem
    result = newton_step(*narrow, case.damping, select=select)
    assert error(on_cpu(result), newton_step(*wide, case.damping, select=select)) < 1e-4


def test_chunks_of_samples(device):
    given = problem("convolution", FLOAT64)
    result = newton_step(*on(device, given), 0.1, gram="dense", chunk_size=1)
    assert error(on_cpu(result), newton_step(*given, 0.1)) < 1e-10


def test_blocks(device):
    given = problem("relu_mlp")
    groups = [
        Group(["0.weight", "0.bias"], damping=0.1),
        Group(["2.weight"], damping=lambda evals, *_: 0.1 + evals, select=top_k(2)),
    ]
    result, info = newton_step_and_info(*on(device, given), 0.1, groups=groups)
    assert devices((result, *map(tuple, info))) == {device.type}
    assert error(on_cpu(result), newton_step(*given, 0.1, groups=groups)) < 1e-10


# --- spectra --------------------------------------------------------------------------------


@LAYERED
def test_spectra_and_derivatives(name, device):
    given = problem(name)
    there = on(device, given)
    evals = ggn_eigvalsh(*there)
    gammas, lambdas = directional_derivatives(*there, select=top_k(3))
    leading, directions = ggn_eigh(*there, select=top_k(3))
    assert devices((evals, gammas, lambdas, leading, directions)) == {device.type}
    assert error(on_cpu(evals), ggn_eigvalsh(*given)) < 1e-10
    expected_gammas, expected_lambdas = directional_derivatives(*given, select=top_k(3))
    assert error(on_cpu(gammas.abs()), expected_gammas.abs()) < 1e-8
    assert error(on_cpu(lambdas), expected_lambdas) < 1e-8


@DTYPES
def test_an_ensemble_under_vmap(dtype, device):
    given = problem("relu_mlp", dtype)
    there = on(device, given)
    members = {k: torch.stack([p, 0.5 * p, -p]) for k, p in there.params.items()}
    steps = vmap(lambda params: newton_step(*there._replace(params=params), 0.1))(members)
    assert devices(steps) == {device.type}
    for i in range(3):
        params = {k: p[i] for k, p in on_cpu(members).items()}
        expected = newton_step(*given._replace(params=params), 0.1)
        assert error({k: s[i].cpu() for k, s in steps.items()}, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp"])
def test_monte_carlo_draws_the_same_numbers(name, device):
    given = problem(name)

    def drawn(given: Problem):
        generator = torch.Generator().manual_seed(7)
        return newton_step(*given._replace(criterion=monte_carlo(given.criterion, 2, generator)), 1)

    result = drawn(on(device, given))
    assert devices(result) == {device.type}
    assert error(on_cpu(result), drawn(given)) < 1e-10


def test_monte_carlo_by_a_generator_of_the_device(device):
    given = on(device, problem("relu_mlp"))
    criterion = monte_carlo(given.criterion, 2, torch.Generator(device).manual_seed(7))
    result = newton_step(*given._replace(criterion=criterion), 0.1)
    assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(result))


# --- training -------------------------------------------------------------------------------

ADAPTATIONS = pytest.mark.parametrize(
    "damping", [0.1, levenberg_marquardt(), held_out()], ids=["constant", "LM", "held_out"]
)


def train(given: Problem, damping, updates: int = 3, state=None):
    optimizer = directional_newton(given.model_fn, given.criterion, damping, momentum=0.5)
    params, info = given.params, None
    state = optimizer.init(params) if state is None else state
    for _ in range(updates):
        params, state, info = optimizer.update(params, state, given.X, given.y)
    return params, state, info


@DTYPES
@ADAPTATIONS
def test_updates_are_those_of_the_cpu(damping, dtype, device):
    given = problem("relu_mlp", dtype)
    params, state, info = train(on(device, given), damping)
    expected, _, expected_info = train(given, damping)
    assert devices((params, tuple(state), tuple(info))) == {device.type}
    assert error(on_cpu(params), expected) < 10 * TOLERANCE[dtype]
    assert error(info.loss_after.cpu(), expected_info.loss_after) < 10 * TOLERANCE[dtype]


@ADAPTATIONS
def test_a_state_that_was_pickled_goes_on(damping, device):
    given = on(device, problem("relu_mlp"))
    params, state, _ = train(given, damping, updates=2)
    restored, restored_state = pickle.loads(pickle.dumps((params, state)))
    assert devices((restored, tuple(restored_state))) == {device.type}
    result, *_ = train(given._replace(params=restored), damping, 1, restored_state)
    expected, *_ = train(given, damping)
    assert error(on_cpu(result), on_cpu(expected)) < 1e-10


def net(device) -> nn.Module:
    """Buffers and a convolution, on a device; the same numbers on all of them."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(2)
    norm.running_mean.normal_()
    module = nn.Sequential(norm, nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    return module.double().eval().to(device)


def images(device):
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(6, 2, 3, 3, generator=generator, dtype=FLOAT64)
    return X.to(device), (torch.arange(6) % 2).to(device)


def losses(module: nn.Module, device, optimizer=None) -> list[float]:
    optimizer = optimizer or DirectionalNewton(module, nn.CrossEntropyLoss())
    X, y = images(device)
    return [float(optimizer.step(X, y)) for _ in range(4)]


def test_the_form_of_torch_optim(device):
    module, expected = net(device), net("cpu")
    torch.testing.assert_close(losses(module, device), losses(expected, "cpu"), rtol=1e-8, atol=0)
    assert devices(dict(module.state_dict())) == {device.type}
    assert error(on_cpu(list(module.parameters())), list(expected.parameters())) < 1e-8


def test_a_state_dict_goes_through_a_file(device):
    module = net(device)
    optimizer = DirectionalNewton(module, nn.CrossEntropyLoss())
    losses(module, device, optimizer)
    file = io.BytesIO()
    torch.save((module.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, map_location="cpu", weights_only=False)

    # Stored here, continued there: on the device, whatever the state lies on.
    copied = net(device)
    copied.load_state_dict(weights)
    continued = DirectionalNewton(copied, nn.CrossEntropyLoss())
    continued.load_state_dict(state)
    torch.testing.assert_close(
        losses(copied, device, continued), losses(module, device, optimizer), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("bounds", [None, (-1.0, {"height": 2.4, "rate": 2.0})], ids=str)
def test_a_fit_and_its_covariance(device, bounds):
    def decay(p, x):
        return p["height"] * torch.exp(-p["rate"] * x)

    x = torch.linspace(0, 4, 30, dtype=FLOAT64)
    y = 2.5 * torch.exp(-1.3 * x) + 0.01 * torch.sin(9 * x)
    start = {name: torch.ones((), dtype=FLOAT64) for name in ("height", "rate")}
    expected = fit(decay, start, x, y, bounds=bounds)
    here = moved((start, x, y), device)
    result = fit(decay, *here, bounds=bounds)
    assert devices((result.params, result.loss, tuple(result.state))) == {device.type}
    assert devices(tuple(result.history)) == {"cpu"}
    assert result.reason.startswith("converged")
    for name, value in on_cpu(result.params).items():
        torch.testing.assert_close(value, expected.params[name], rtol=1e-6, atol=0.0)
    cov = covariance(decay, result.params, *here[1:], nn.MSELoss())
    assert devices(cov) == {device.type}
    whole = covariance(decay, expected.params, x, y, nn.MSELoss())
    for ours, theirs in zip(tree_leaves(on_cpu(cov)), tree_leaves(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
