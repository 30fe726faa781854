"""With gram="auto", what does not fit is done by products, and that is said."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from ddnewton import (
    covariance,
    directional_derivatives,
    directional_newton,
    fit,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    levenberg_marquardt,
    newton_step,
    newton_step_and_info,
    top_k,
)
from ddnewton.damping import signal_to_noise
from ddnewton.inputs import memory
from ddnewton.optim import DirectionalNewton
from ddnewton.quadratic import gauss_newton
from tests.methods import seeded
from tests.models import problem
from tests.reference import error

FREE = 2**17
GOING_ON = r'going on with gram="free", by products to tol=0.01 of the decrease, as a step must fit'


def small_net(width=24, n=120):
    """A net of 243 parameters with 240 columns: matrices of half of a megabyte."""
    net = untrained(width)
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    return (lambda p, x: functional_call(net, p, (x,))), params, *batch(n), nn.MSELoss()


def untrained(width=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 2)).double()


def batch(n=120):
    X = torch.randn(n, 7, generator=seeded(), dtype=torch.float64)
    return X, X[:, :2].sin()


@pytest.fixture
def little_memory(monkeypatch):
    """Of which everything is asked."""
    for module in (memory, gauss_newton):
        monkeypatch.setattr(module, "NEVER_ASKED_BYTES", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: FREE)


@pytest.fixture
def exact():
    """What is expected, before memory is short."""
    return {
        "step": newton_step(*small_net(), 0.1),
        "selected": newton_step(*small_net(), 0.1, select=top_k(2), complement=0.5),
        "pairs": ggn_eigh(*small_net(), select=top_k(2))[0],
        "derivatives": directional_derivatives(*small_net(), select=top_k(2)),
    }


def test_steps_and_directions_go_on_by_products(exact, little_memory):
    for way in ("dense", "structured"):
        with pytest.raises(MemoryError, match="a step must fit into the memory at hand"):
            newton_step(*small_net(), 0.1, gram=way)
    with pytest.warns(UserWarning, match=GOING_ON):
        step = newton_step(*small_net(), 0.1)
    # ‖s − s*‖² in the norm of G + δI is at most tol; in that of I it is some more.
    assert 0 < error(step, exact["step"]) < 0.3
    with pytest.warns(UserWarning, match="by products to tol=1e-12 "):
        step, info = newton_step_and_info(*small_net(), 0.1, tol=1e-12)
    assert error(step, exact["step"]) < 1e-5
    assert float(info.lost) <= 1e-12
    with pytest.warns(UserWarning, match=GOING_ON):
        step = newton_step(*small_net(), 0.1, select=top_k(2), complement=0.5)
    assert error(step, exact["selected"]) < 1e-3
    with pytest.warns(UserWarning, match=GOING_ON):
        evals, _ = ggn_eigh(*small_net(), select=top_k(2))
    assert error(evals, exact["pairs"]) < 1e-5
    with pytest.warns(UserWarning, match=GOING_ON):
        gammas, lambdas = directional_derivatives(*small_net(), select=top_k(2))
    assert error(gammas.abs(), exact["derivatives"].gammas.abs()) < 1e-3
    assert error(lambdas, exact["derivatives"].lambdas) < 1e-3


def test_the_warning_points_at_the_caller(little_memory):
    with pytest.warns(UserWarning, match=GOING_ON) as caught:
        newton_step(*small_net(), 0.1)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_an_optimizer_says_so_once(little_memory):
    model_fn, params, X, y, criterion = small_net()
    optimizer = directional_newton(model_fn, criterion, levenberg_marquardt())
    state, losses = optimizer.init(params), []

    def train(params, state):
        for _ in range(4):
            params, state, info = optimizer.update(params, state, X, y)
            losses.append(float(info.loss))

    with pytest.warns(UserWarning, match=GOING_ON) as caught:
        train(params, state)
    assert len(caught) == 1
    assert losses == sorted(losses, reverse=True)
    net = untrained()
    trained = DirectionalNewton(net, criterion)
    with pytest.warns(UserWarning, match=GOING_ON) as caught:
        losses = [float(trained.step(X, y)) for _ in range(4)]
    assert len(caught) == 1
    assert losses == sorted(losses, reverse=True)


def test_a_fit_goes_on_by_products(little_memory):
    model_fn, params, X, y, criterion = small_net()
    with pytest.warns(UserWarning, match=GOING_ON) as caught:
        result = fit(model_fn, params, X, y, criterion, max_updates=5)
    assert len(caught) == 1
    assert float(result.loss) < float(criterion(model_fn(params, X), y)) / 2


def test_what_products_do_not_give_is_refused_as_before(little_memory):
    match = r"a step must fit .* gram=\"free\" is no way out: .*scale=\"jac\""
    with pytest.raises(MemoryError, match=match):
        newton_step(*small_net(), 0.1, scale="jac")
    for function in (ggn_eigvalsh, gram_matrix):
        with pytest.raises(MemoryError, match="a step must fit into the memory at hand"):
            function(*small_net())
    # All eigenpairs do not fit either way.
    refused = pytest.raises(MemoryError, match="a basis for 240 eigenpairs of side 240")
    with pytest.warns(UserWarning, match=GOING_ON), refused:
        newton_step(*small_net(), signal_to_noise())


# --- what is refused by name ---------------------------------------------------------------------


def test_refused_by_name():
    many = problem("relu_mlp")
    for function, what in ((ggn_eigvalsh, "all eigenvalues"), (gram_matrix, "the Gram matrix")):
        match = rf'{function.__name__}: {what} needs the matrix itself; got gram="free". .*top_k'
        with pytest.raises(ValueError, match=match):
            function(*many, gram="free")
    with pytest.raises(ValueError, match=r"covariance: a covariance needs the matrix itself; got"):
        covariance(*many, gram="free")
    with pytest.raises(ValueError, match=r'gram="free" must have a scale that is given; got'):
        newton_step(*many, 0.1, gram="free", scale="jac")
    for ways in ({"a": "free", "b": "auto"}, {"a": "dense", "b": "free"}):
        terms = [{"a": part, "b": part} for part in (many.model_fn, many.X, many.y, many.criterion)]
        arguments = (terms[0], many.params, *terms[1:], 0.1)
        with pytest.raises(ValueError, match=r'gram must be "free" for all terms or for none; got'):
            newton_step(*arguments, gram=ways)
    both = newton_step(*arguments, gram={"a": "free", "b": "free"}, tol=1e-18)
    assert error(both, newton_step(*arguments)) < 1e-8


@pytest.mark.parametrize("tol", [0, -1e-3, 1, 2.0, float("nan"), float("inf")])
def test_tolerances_are_shares(tol):
    many = problem("relu_mlp")
    for function in (newton_step, newton_step_and_info):
        with pytest.raises(ValueError, match=f"{function.__name__}: tol must be"):
            function(*many, 0.1, gram="free", tol=tol)
    with pytest.raises(ValueError, match="ggn_eigh: tol must be"):
        ggn_eigh(*many, tol=tol)
    with pytest.raises(ValueError, match="directional_newton: tol must be"):
        directional_newton(many.model_fn, many.criterion, gram="free", tol=tol)
    for wrong in ("1e-2", None, [0.1]):
        with pytest.raises(TypeError, match="newton_step: tol must be"):
            newton_step(*many, 0.1, tol=wrong)


def test_ensembles_are_refused():
    many = problem("relu_mlp")
    stacked = {name: torch.stack([p, p]) for name, p in many.params.items()}

    def step(params):
        return newton_step(many.model_fn, params, *many[2:], 0.1, gram="free")

    match = r'gram="free" must be outside of torch.func and torch.compile; got .* Loop over'
    with pytest.raises(ValueError, match=match):
        vmap(step)(stacked)
    with pytest.raises(ValueError, match=match):
        torch.compile(step, backend="eager", fullgraph=False)(many.params)


def test_a_rule_along_all_directions_of_a_large_side():
    model_fn, params, _, _, criterion = small_net(width=300)
    X, y = batch(1100)
    match = r'with gram="free" all of the 2200 eigenpairs .* at most 2048; .* Pass select=top_k'
    for damping in (signal_to_noise(), lambda evals, *_: evals):
        with pytest.raises(ValueError, match=match):
            newton_step(model_fn, params, X, y, criterion, damping, gram="free")
    with pytest.raises(ValueError, match=match):
        newton_step(
            *(model_fn, params, X, y, criterion, 0.1),
            select=lambda evals: [0],
            gram="free",
        )
    # One number needs none of them.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newton_step(model_fn, params, X, y, criterion, 0.1, gram="free")["0.bias"].any()
