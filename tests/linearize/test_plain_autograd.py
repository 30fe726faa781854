"""Models that autograd differentiates and torch.func refuses: steps, spectra, slopes, training."""

import copy
import logging
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from ddnewton import (
    directional_derivatives,
    directional_newton,
    ggn_eigh,
    ggn_eigvalsh,
    newton_step,
    prepare,
)
from ddnewton.linearize.sample_columns import ways
from ddnewton.optim import DirectionalNewton
from tests.linearize.autograd_cases import (
    CASES,
    UNTRACEABLE,
    Checkpointed,
    Recurrent,
    given_and_truth,
    hidden,
    value,
    weights,
)
from tests.methods import FLOAT32, FLOAT64
from tests.models import normal
from tests.reference import Dense, dense, directions, error, solve

MSE = nn.MSELoss()


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32])
@pytest.mark.parametrize("name", CASES)
def test_steps(name, dtype):
    given, truth = given_and_truth(name, dtype)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    for options in ({}, {"chunk_size": 1}, {"chunk_size": 2}, {"gram": "dense"}):
        assert error(newton_step(*given, 0.1, **options), solve(truth, 0.1)) < tolerance, options


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32])
@pytest.mark.parametrize("name", [name for name in CASES if name not in UNTRACEABLE])
def test_steps_by_layers(name, dtype):
    given, truth = given_and_truth(name, dtype)
    prepared = prepare(*given[:3])
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    assert error(newton_step(prepared, *given[1:], 0.1), solve(truth, 0.1)) < tolerance
    if dtype == torch.float64:
        assert error(prepared(*given[1:3]), value(*given[:3])) < tolerance


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32])
@pytest.mark.parametrize("name", ["physics-informed", "ambient autograd", "stop-gradient"])
def test_many_samples_are_differentiated_by_a_trace(name, dtype, caplog):
    model_fn, params, X, reference = CASES[name](dtype)
    X = normal(120, *X.shape[1:]).to(dtype)
    y = torch.cos(value(model_fn, params, X))
    with caplog.at_level(logging.INFO, logger="ddnewton"):
        step = newton_step(model_fn, params, X, y, MSE, 0.1)
    assert "Jacobian columns by a trace of one sample" in caplog.text
    assert "by plain autograd" not in caplog.text
    truth = solve(dense(reference, params, X, y, MSE), 0.1)
    assert error(step, truth) < (1e-11 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_steps_in_inference_mode(name):
    given, truth = given_and_truth(name, torch.float64)
    with torch.inference_mode():
        assert error(newton_step(*given, 0.1), solve(truth, 0.1)) < 1e-11
        copies = torch.utils._pytree.tree_map(torch.clone, given[1:4])
        if name != "samples with gradients":  # copies in inference mode have no gradient
            assert error(newton_step(given[0], *copies, MSE, 0.1), solve(truth, 0.1)) < 1e-11


@pytest.mark.parametrize("name", CASES)
def test_spectra_and_slopes(name):
    given, truth = given_and_truth(name, torch.float64)
    expected = directions(truth)
    evals, evecs = ggn_eigh(*given)
    assert error(evals[-len(expected.evals) :], expected.evals) < 1e-10
    vectors = torch.cat([leaf.flatten(1) for leaf in torch.utils._pytree.tree_leaves(evecs)], 1)
    assert error(vectors.T @ (evals[:, None] * vectors), truth.ggn) < 1e-10
    gammas, lambdas = directional_derivatives(*given)
    J = torch.einsum("ncd,kd->nkc", truth.jacobians, vectors)
    assert error(gammas, torch.einsum("nkc,nc->nk", J, truth.slopes)) < 1e-9
    assert error(lambdas, torch.einsum("nkc,nce,nke->nk", J, truth.hessians, J)) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_sub_samples(name):
    given, truth = given_and_truth(name, torch.float64)
    of_gradient, of_ggn = [0, 2], [1, 3, 4]
    result = newton_step(
        *given, 0.1, complement=0.1, subsampling_grad=of_gradient, subsampling_ggn=of_ggn
    )
    gradient = Dense(truth.loss, *(part[of_gradient] for part in truth[1:])).gradient
    ggn = Dense(truth.loss, *(part[of_ggn] for part in truth[1:])).ggn
    damped = ggn + 0.1 * torch.eye(len(ggn), dtype=torch.float64)
    assert error(result, -torch.linalg.solve(damped, gradient)) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_updates(name):
    """A functional optimizer's losses are those of the model at the parameters that it returns."""
    given, _ = given_and_truth(name, torch.float64)
    model_fn, params, X, y, _ = given
    optimizer = directional_newton(model_fn, MSE)
    state, losses = optimizer.init(params), []
    for _ in range(3):
        params, state, info = optimizer.update(params, state, X, y)
        losses.append(float(info.loss_after))
        assert losses[-1] == pytest.approx(float(MSE(value(model_fn, params, X), y)), rel=1e-9)
    assert losses[2] < losses[0]


MODULES = {
    "packed": (
        lambda: Recurrent(nn.LSTM),
        (torch.arange(40.0).sin().reshape(5, 4, 2), torch.tensor([4, 1, 3, 2, 4])),
    ),
    "checkpoint": (
        lambda: Checkpointed(use_reentrant=False),
        torch.arange(15.0).sin().reshape(5, 3),
    ),
    "sparse": (
        lambda: nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)),
        torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1], [3, 4]]),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_in_training(name):
    torch.manual_seed(0)
    make, X = MODULES[name]
    net, y = make(), normal(5, 2)
    optimizer = DirectionalNewton(net, MSE)
    losses = [float(optimizer.step(X, y)) for _ in range(4)]
    assert losses[3] < losses[2] < losses[1] < losses[0]
    assert all(p.grad is None for p in net.parameters())


def test_a_checkpoint_trains_like_the_net_without_it():
    torch.manual_seed(0)
    plain, net = Checkpointed(), Checkpointed(use_reentrant=False)
    net.load_state_dict(plain.state_dict())
    X, y = normal(5, 3), normal(5, 2)
    optimizers = [DirectionalNewton(module, MSE) for module in (plain, net)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step(X, y)
    assert error(dict(net.named_parameters()), dict(plain.named_parameters())) < 1e-5


class Counting(nn.Module):
    """A net with a buffer that it uses, and one that every call makes anew."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        h = torch.tanh(self.hidden(x * self.scale))
        self.last = self.last + 0.0
        return self.out(h) if self.training else 2 * self.out(h)


@pytest.mark.parametrize("forward", [None, lambda module, X: module(X)])
def test_a_scripted_module_trains_like_the_module_itself(forward):
    torch.manual_seed(0)
    plain = Counting().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is to be compiled instead
        scripted = torch.jit.script(copy.deepcopy(plain))
    last = scripted.last
    X, y = normal(5, 3).double(), normal(5, 2).double()
    modules = (plain.eval(), scripted.eval())
    optimizers = [
        DirectionalNewton(module, MSE, forward=forward, gram=gram)
        for module, gram in zip(modules, ("dense", "auto"), strict=True)
    ]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step(X, y)
    assert error(dict(scripted.named_parameters()), dict(plain.named_parameters())) < 1e-10
    assert scripted.last is last
    # And as a part of another module.
    before = float(MSE(scripted(X), y).detach())
    loss = DirectionalNewton(nn.Sequential(scripted), MSE).step(X, y)
    assert float(loss) == pytest.approx(before)
    assert float(MSE(scripted(X), y).detach()) < before


def test_a_scripted_module_is_traced_anew_in_another_mode():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is to be compiled instead
        scripted = torch.jit.script(Counting().double())
    X, y = normal(5, 3).double(), normal(5, 2).double()
    optimizer = DirectionalNewton(scripted, MSE, gram="structured")
    for module in (scripted, scripted.eval()):
        expected = float(MSE(module(X), y).detach())
        assert float(optimizer.step(X, y)) == pytest.approx(expected)


def test_ways_to_the_columns_agree():
    """Where torch.func and autograd both take a model, to rounding."""
    params, X, basis = weights(3, 4), normal(5, 3).double(), normal(5, 4, 3).double()
    results = [way(hidden, params, X, basis) for way, _ in ways(1000, 1000, 1)]
    assert len(results) == 5
    for outputs, columns in results[1:]:
        assert error(outputs, results[0][0]) < 1e-14
        pairs = zip(columns, results[0][1], strict=True)
        assert all(error(a.reshape(b.shape), b) < 1e-13 for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "cost"),
    [("force field", "per sample"), ("sparse bag", "per sample and column")],
)
def test_the_way_and_its_cost_are_logged(name, cost, caplog):
    given, _ = given_and_truth(name, torch.float64)
    with caplog.at_level(logging.INFO, logger="ddnewton"):
        newton_step(*given, 0.1, gram="dense")
    assert f"by plain autograd, one backward pass {cost}: " in caplog.text


def test_nothing_of_the_callers_is_changed():
    given, _ = given_and_truth("samples with gradients", torch.float64)
    _, params, X, _, _ = given
    leaves = [X, *params.values()]
    before = [(leaf.requires_grad, leaf._version, leaf.clone()) for leaf in leaves]
    newton_step(*given, 0.1)
    assert [leaf.requires_grad for leaf in leaves] == [flag for flag, _, _ in before]
    assert [leaf._version for leaf in leaves] == [version for _, version, _ in before]
    assert all(leaf.grad is None for leaf in leaves)


def test_an_ensemble_is_refused_by_name():
    given, _ = given_and_truth("force field", torch.float64)
    model_fn, params, *batch = given
    members = {name: torch.stack([p, p + 0.1]) for name, p in params.items()}
    step = vmap(lambda p: newton_step(model_fn, p, *batch, 0.1))
    with pytest.raises(ValueError, match=r"under torch\.func\.vmap, .* Pass prepare") as caught:
        step(members)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_ensemble_of_prepared_models():
    given, _ = given_and_truth("force field", torch.float64)
    model_fn, params, *batch = given
    members = {name: torch.stack([p, p + 0.1]) for name, p in params.items()}
    prepared = prepare(model_fn, params, batch[0])
    steps = vmap(lambda p: newton_step(prepared, p, *batch, 0.1))(members)
    for k in range(2):
        params = {name: p[k] for name, p in members.items()}
        truth = solve(dense(model_fn, params, *batch), 0.1)
        assert error({name: p[k] for name, p in steps.items()}, truth) < 1e-11


def test_a_reentrant_checkpoint_is_refused_by_name():
    net = Checkpointed(use_reentrant=True)
    params = {name: p.detach() for name, p in net.named_parameters()}
    model_fn = lambda p, x: functional_call(net, p, (x,))  # noqa: E731
    rule = r"newton_step: model_fn must be differentiable by .*; got .* takes use_reentrant=False"
    with pytest.raises(ValueError, match=rule) as caught:
        newton_step(model_fn, params, normal(5, 3), normal(5, 2), MSE, 0.1)
    assert isinstance(caught.value.__cause__, RuntimeError)


ADJACENCY = torch.arange(36.0).sin().abs().reshape(6, 6)


def graph(p, x):
    """Nodes on axis 0, joined by a matrix of all of them."""
    return torch.tanh(ADJACENCY.to(x) @ x @ p["W"] + p["b"]) @ p["v"]


def fixed_batch(p, x):
    return hidden(p, x.view(6, 3))


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32])
@pytest.mark.parametrize("gram", ["auto", "dense", "structured"])
@pytest.mark.parametrize("model_fn", [graph, fixed_batch])
def test_a_model_that_takes_no_single_sample_is_told_so(model_fn, gram, dtype):
    X, y = normal(6, 3).to(dtype), normal(6, 2).to(dtype)
    rule = r"model_fn must take a batch of any size, one sample included; got RuntimeError .*edges"
    with pytest.raises(ValueError, match=f"newton_step: {rule}") as caught:
        newton_step(model_fn, weights(3, 2, dtype), X, y, MSE, 0.1, gram=gram)
    assert isinstance(caught.value.__cause__, RuntimeError)
    for refused in (
        partial(prepare, model_fn, weights(3, 2, dtype), X),
        partial(ggn_eigvalsh, model_fn, weights(3, 2, dtype), X, y, MSE),
        partial(
            directional_newton(model_fn, MSE).update,
            weights(3, 2, dtype),
            directional_newton(model_fn, MSE).init(weights(3, 2, dtype)),
            X,
            y,
        ),
    ):
        with pytest.raises(ValueError, match=rule):
            refused()


def test_a_graph_with_its_edges_in_the_model_is_one_sample():
    params, X, y = weights(3, 2), normal(1, 6, 3).double(), normal(1, 6, 2).double()
    step = newton_step(graph, params, X, y, MSE, 0.1)
    assert error(step, solve(dense(graph, params, X, y, MSE), 0.1)) < 1e-12


class Bug(Exception):
    pass


def broken(p, x):
    raise Bug("of the user")


def broken_by_shape(p, x):
    return hidden(p, x[:, :2])


def misspelt(p, x):
    return x @ p["weight"]


@pytest.mark.parametrize(
    ("model_fn", "kind", "message"),
    [
        (broken, Bug, "of the user"),
        (broken_by_shape, RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (misspelt, KeyError, "weight"),
    ],
)
def test_a_model_that_fails_on_the_batch_fails_with_its_own_error(model_fn, kind, message):
    with pytest.raises(kind, match=message) as caught:
        newton_step(model_fn, weights(3, 2), normal(6, 3).double(), normal(6, 2).double(), MSE, 0.1)
    assert type(caught.value) is kind
