"""A step changes nothing outside, and an ensemble's is a loop over its members."""

import contextlib

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import newton_step, newton_step_and_info, top_k
from tests.methods import DTYPES, FLOAT32, FLOAT64, READY_MADE, REDUCTIONS, truth
from tests.models import problem
from tests.reference import error, flat, solve
from tests.whole.dense_steps import CALLABLES, TOLERANCE, curvature_damping, ensemble, with_callable

# --- purity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"complement": 0.1, "select": top_k(2), "chunk_size": 2}])
def test_nothing_outside_changes(options):
    module = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )
    module.eval()
    module[1].train()
    module[3].bias.requires_grad_(False)
    flags = [m.training for m in module.modules()]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    params = dict(module.named_parameters())
    X, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    x_before, y_before = X.detach().clone(), y.clone()
    random_state, default = torch.get_rng_state(), torch.get_default_dtype()
    threads, fastpath = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()

    result = newton_step(
        lambda p, x: functional_call(module, p, (x,)),
        params,
        X,
        y,
        nn.CrossEntropyLoss(),
        0.1,
        **options,
    )

    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert [p.requires_grad for p in params.values()] == [True] * 5 + [False]
    assert all(p.grad is None for p in params.values())
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert torch.equal(X.detach(), x_before)
    assert X.grad is None
    assert X.requires_grad
    assert torch.equal(y, y_before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_default_dtype() == default
    assert torch.get_num_threads() == threads
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.is_grad_enabled()
    # Parameters that require a gradient take the same step, and carry no graph away.
    plain = newton_step(
        lambda p, x: functional_call(module, p, (x,)),
        {k: p.detach() for k, p in params.items()},
        X.detach(),
        y,
        nn.CrossEntropyLoss(),
        0.1,
        **options,
    )
    assert error(result, plain) < 1e-6
    assert not any(leaf.requires_grad for leaf in tree_leaves(result))


@pytest.mark.parametrize("target", ["params", "X", "y"])
def test_a_model_that_writes_to_its_inputs_does_not_reach_them(target):
    """Refused or not, what the caller passed is as it was."""

    def write(name, tensor):
        return tensor.mul_(2) if name == target else tensor

    def model_fn(W, X):
        return write("X", X) @ write("params", W)

    def criterion(f, y):
        return (f - write("y", y)).square().mean()

    W, X, y = torch.randn(3, 2), torch.randn(5, 3), torch.randn(5, 2)
    before = [leaf.clone() for leaf in (W, X, y)]
    with contextlib.suppress(RuntimeError, ValueError):
        newton_step(model_fn, W, X, y, criterion, 0.1)
    for leaf, old in zip((W, X, y), before, strict=True):
        assert torch.equal(leaf, old)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["relu_mlp", "lstm", "poisson", "encoder_layer"])
def test_without_gradients(name, context):
    given = problem(name)
    expected = newton_step(*given, 0.1)
    with context():
        result = newton_step(*given, 0.1)
        assert not torch.is_grad_enabled()
    assert error(result, expected) < 1e-13


def test_the_same_call_twice_gives_the_same_bits():
    first, second = (newton_step(*problem("convolution", FLOAT32), 0.1) for _ in range(2))
    assert torch.equal(flat(first), flat(second))


# --- ensembles ------------------------------------------------------------------------------


ENSEMBLE_OPTIONS = {
    "float": (0.1, {}),
    "function": (curvature_damping, {}),
    **{name: (0.1, {"select": select}) for name, select in READY_MADE.items()},
    "complement": (0.1, {"complement": 0.5}),
    "top_k_complement_function": (curvature_damping, {"select": top_k(3), "complement": 0.5}),
    "chunked": (0.1, {"chunk_size": 2}),
}


@DTYPES
@pytest.mark.parametrize("options", ENSEMBLE_OPTIONS)
@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "tanh_mlp", "many_points"])
def test_an_ensemble_is_a_loop(name, options, dtype):
    damping, keywords = ENSEMBLE_OPTIONS[options]
    first, stacked, apart = ensemble(name, dtype)

    def one(params):
        return newton_step(*first._replace(params=params), damping, **keywords)

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        result = tree_map(lambda leaf, i=i: leaf[i], together)
        assert error(result, one(params)) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["attention", "encoder_layer", "poisson", "tied_autoencoder"])
def test_an_ensemble_of_other_models(name):
    first, stacked, apart = ensemble(name, FLOAT64, members=2)
    together = vmap(lambda params: newton_step(*first._replace(params=params), 0.1))(stacked)
    for i, params in enumerate(apart):
        result = tree_map(lambda leaf, i=i: leaf[i], together)
        assert error(result, newton_step(*first._replace(params=params), 0.1)) < 1e-11


@REDUCTIONS
@pytest.mark.parametrize("function", CALLABLES)
def test_an_ensemble_with_a_callable(function, reduction):
    given = with_callable(function, reduction, FLOAT64)
    _, stacked, apart = ensemble("relu_mlp", FLOAT64)

    def one(params):
        return newton_step(*given._replace(params=params), 0.1, complement=0.3)

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        assert error(tree_map(lambda leaf, i=i: leaf[i], together), one(params)) < 1e-11


def test_an_ensemble_of_info():
    first, stacked, apart = ensemble("relu_mlp", FLOAT64)

    def one(params):
        return newton_step_and_info(*first._replace(params=params), 0.1, select=top_k(3))[1]

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        alone = one(params)
        for field in ("loss", "evals", "lambdas", "dampings", "predicted_decrease", "rank"):
            assert error(getattr(together, field)[i], getattr(alone, field)) < 1e-10, field
        assert error(together.gammas[i].abs(), alone.gammas.abs()) < 1e-10
        assert error(together.gradient_norm[i], alone.gradient_norm) < 1e-12
        assert error(together.gradient_share[i], alone.gradient_share) < 1e-12


def test_an_ensemble_of_modules_with_its_own_data_each():
    modules = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(3)]
    params, _ = stack_module_state(modules)
    X, y = torch.randn(3, 5, 3), torch.randn(3, 5, 2)

    def one(params, X, y):
        return newton_step(
            lambda p, x: functional_call(modules[0], p, (x,)), params, X, y, nn.MSELoss(), 0.1
        )

    together = vmap(one)(params, X, y)
    for i in range(3):
        alone = one({k: p[i] for k, p in params.items()}, X[i], y[i])
        assert error({k: s[i] for k, s in together.items()}, alone) < 1e-5


def test_a_batch_of_dampings():
    given = problem("relu_mlp")
    deltas = torch.tensor([0.01, 0.1, 1.0], dtype=FLOAT64)
    together = vmap(lambda delta: newton_step(*given, lambda evals, *_: delta + 0 * evals))(deltas)
    for i, delta in enumerate(deltas.tolist()):
        result = {k: s[i] for k, s in together.items()}
        assert error(result, solve(truth("relu_mlp"), delta)) < 1e-11
