"""Complex parameters and outputs, as the pairs of reals that they stand for."""

import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from ddnewton import (
    Group,
    directional_derivatives,
    directional_newton,
    ggn_eigh,
    ggn_eigvalsh,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
)
from ddnewton.criteria import mse
from ddnewton.optim import DirectionalNewton
from tests.methods import DTYPES, FLOAT32, FLOAT64, seeded
from tests.reference import dense, error, flat

MSE = nn.MSELoss()


def damped_waves(p, x):
    """Real outputs of complex amplitudes and rates, and of a real offset."""
    waves = (p["c"] * torch.exp(p["s"] * x)).sum(1, keepdim=True)
    return torch.cat([waves.real + p["offset"], waves.imag], 1)


def fit(dtype=FLOAT64):
    generator = seeded()

    def complex_numbers(*shape):
        pairs = torch.randn(*shape, 2, generator=generator, dtype=FLOAT64).to(dtype)
        return torch.view_as_complex(pairs)

    params = {
        "c": complex_numbers(3),
        "offset": torch.ones(1, dtype=dtype),
        "s": 0.5 * complex_numbers(3),
    }
    x = torch.linspace(0, 1, 9, dtype=dtype)[:, None]
    return params, x, torch.cat([x.cos(), x.sin()], 1)


def pairs(tree):
    return tree_map(lambda x: torch.view_as_real(x) if x.is_complex() else x, tree)


def numbers(tree, like):
    """Pairs as complex numbers, where ``like`` has them."""
    return tree_map(lambda x, y: torch.view_as_complex(x) if y.is_complex() else x, tree, like)


def on_pairs(model_fn, like):
    return lambda p, x: model_fn(numbers(p, like), x)


def reference(model_fn, params, X, y, criterion):
    """The dense one in float64, of pairs."""
    return dense(on_pairs(model_fn, params), pairs(params), X, y, criterion)


def solved(truth, delta):
    identity = torch.eye(len(truth.gradient), dtype=FLOAT64)
    return -torch.linalg.solve(truth.ggn + delta * identity, truth.gradient)


@DTYPES
@pytest.mark.parametrize("way", ["auto", "structured", "dense", "prepared"])
def test_a_step(way, dtype):
    params, X, y = fit(dtype)
    model_fn, options = damped_waves, {"gram": way}
    if way == "prepared":
        model_fn, options = prepare(damped_waves, params, X), {}
        torch.testing.assert_close(model_fn(params, X), damped_waves(params, X))
        model_fn = pickle.loads(pickle.dumps(model_fn))
    step = newton_step(model_fn, params, X, y, MSE, 0.1, **options)
    assert tree_map(lambda x: (x.dtype, x.shape), step) == tree_map(
        lambda x: (x.dtype, x.shape), params
    )
    expected = solved(reference(damped_waves, params, X, y, MSE), 0.1)
    assert error(flat(pairs(step)), expected) < (1e-5 if dtype == FLOAT32 else 1e-10)


def test_the_record_and_the_spectrum():
    params, X, y = fit()
    truth = reference(damped_waves, params, X, y, MSE)
    evals = torch.linalg.eigvalsh(truth.ggn)
    _, info = newton_step_and_info(damped_waves, params, X, y, MSE, 0.1)
    assert error(info.gradient_norm, truth.gradient.norm()) < 1e-10
    found = ggn_eigvalsh(damped_waves, params, X, y, MSE)
    assert error(found[-len(evals) :], evals) < 1e-10
    leading, vectors = ggn_eigh(damped_waves, params, X, y, MSE, select=top_k(3))
    assert vectors["c"].shape == (3, 3)
    assert vectors["c"].is_complex()
    E = torch.stack([flat(pairs(tree_map(lambda x, k=k: x[k], vectors))) for k in range(3)])
    assert error(E @ E.T, torch.eye(3, dtype=FLOAT64)) < 1e-10
    assert error(truth.ggn @ E.T, E.T * leading) < 1e-9
    _, lambdas = directional_derivatives(damped_waves, params, X, y, MSE, select=top_k(3))
    assert error(lambdas.mean(0), leading) < 1e-10


def test_blocks_by_the_names_of_the_leaves():
    params, X, y = fit()
    step = newton_step(damped_waves, params, X, y, MSE, 0.1, groups=[Group(["c"])])
    truth = reference(damped_waves, params, X, y, MSE)
    identity = torch.eye(6, dtype=FLOAT64)
    expected = -torch.linalg.solve(truth.ggn[:6, :6] + 0.1 * identity, truth.gradient[:6])
    assert error(torch.view_as_real(step["c"]).flatten(), expected) < 1e-10
    assert not step["s"].any()


def test_updates_with_momentum_and_weight_decay():
    params, X, y = fit()
    decays = {"c": 0.1, "offset": 0.0, "s": 0.02}
    options = {"momentum": 0.5, "weight_decay": decays}
    results = []
    for model_fn, start in (
        (damped_waves, params),
        (on_pairs(damped_waves, params), pairs(params)),
        (prepare(damped_waves, params, X), params),
    ):
        optimizer = directional_newton(model_fn, MSE, **options)
        moved, state = start, optimizer.init(start)
        for _ in range(4):
            moved, state, info = optimizer.update(moved, state, X, y)
        results.append((pairs(moved), pairs(state.previous), info.loss_after))
    assert error(results[0], results[1]) < 1e-9
    assert error(results[2], results[1]) < 1e-9


def test_members_of_an_ensemble():
    params, X, y = fit()
    stacked = tree_map(lambda x: torch.stack([x, 0.5 * x]), params)
    together = torch.func.vmap(lambda p: newton_step(damped_waves, p, X, y, MSE, 0.1))(stacked)
    for n in range(2):
        member = tree_map(lambda x, n=n: x[n], stacked)
        alone = newton_step(damped_waves, member, X, y, MSE, 0.1)
        one = tree_map(lambda x, n=n: x[n], together)
        assert error(flat(pairs(one)), flat(pairs(alone))) < 1e-9


class Spectral(nn.Module):
    """A layer in the Fourier domain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(4, dtype=torch.complex128))
        self.out = nn.Linear(8, 2, dtype=FLOAT64)

    def forward(self, x):
        modes = torch.fft.rfft(x)[..., :4] * self.weight
        return self.out(torch.tanh(torch.fft.irfft(modes, n=8)))


def test_modules():
    torch.manual_seed(0)
    net, X, y = Spectral(), torch.randn(6, 8, dtype=FLOAT64), torch.randn(6, 2, dtype=FLOAT64)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = [{"params": [net.weight], "lr": 0.5}, {"params": net.out.parameters()}]
    optimizer = DirectionalNewton(net, MSE, 0.1, params=groups, momentum=0.5)
    optimizer.step(X, y)
    truth = reference(lambda p, x: functional_call(net, p, (x,)), before, X, y, MSE)
    step = flat(pairs({name: p.detach() - before[name] for name, p in net.named_parameters()}))
    for block, rate in ((slice(0, 8), 0.5), (slice(8, None), 1.0)):
        G, g = truth.ggn[block, block], truth.gradient[block]
        expected = -rate * torch.linalg.solve(G + 0.1 * torch.eye(len(g), dtype=FLOAT64), g)
        assert error(step[block], expected) < 1e-10
    # Saved and loaded in between, it goes on the same.
    twin = Spectral()
    twin.load_state_dict(net.state_dict())
    groups = [{"params": [twin.weight]}, {"params": twin.out.parameters()}]
    other = DirectionalNewton(twin, MSE, 0.1, params=groups, momentum=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.step(X, y), optimizer.step(X, y))


# --- complex outputs ------------------------------------------------------------------------


def waves(p, x):
    return (p["c"] * torch.exp(p["s"] * x)).sum(1, keepdim=True)


def distance(outputs, y):
    return (outputs - y).abs().square().mean()


@pytest.mark.parametrize("way", ["auto", "structured", "dense", "prepared"])
def test_complex_outputs(way):
    params, X, _ = fit()
    del params["offset"]
    y = waves(params, X) + 0.3
    model_fn, options = waves, {"gram": way}
    if way == "prepared":
        model_fn, options = pickle.loads(pickle.dumps(prepare(waves, params, X))), {}
        torch.testing.assert_close(model_fn(params, X), waves(params, X))
    step = newton_step(model_fn, params, X, y, distance, 0.1, **options)
    truth = reference(
        lambda p, x: torch.view_as_real(waves(p, x)),
        params,
        X,
        torch.view_as_real(y),
        lambda f, t: (f - t).square().sum() / len(t),
    )
    assert error(flat(pairs(step)), solved(truth, 0.1)) < 1e-9
    optimizer = directional_newton(model_fn, distance)
    moved, state = params, optimizer.init(params)
    for _ in range(6):
        moved, state, info = optimizer.update(moved, state, X, y)
    assert info.loss_after < 1e-2 * distance(waves(params, X), y)
    assert error(info.loss_after, distance(waves(moved, X), y)) < 1e-9


@pytest.mark.parametrize(
    ("criterion", "got"),
    [
        (MSE, "MSELoss, which raises"),
        (mse(), "a record, which is of real outputs"),
        (monte_carlo(MSE, 1, seeded()), "a record"),
    ],
    ids=["module", "record", "drawn"],
)
def test_a_loss_of_real_outputs_is_refused(criterion, got):
    params, X, _ = fit()
    y = waves(params, X)
    with pytest.raises(TypeError, match=rf"function of complex outputs.*got {got}.*view_as_real"):
        newton_step(waves, params, X, y, criterion, 0.1)
