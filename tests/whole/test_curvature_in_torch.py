"""Eigenpairs, derivatives and Gram matrices under torch's transforms and contexts; refusals."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import (
    above,
    directional_derivatives,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    prepare,
    top_k,
)
from tests.methods import FLOAT32, FLOAT64, SMALL_AND_LARGE
from tests.models import problem
from tests.reference import error
from tests.whole.eigenpairs import EACH, rows

# --- among torch's own ----------------------------------------------------------------------


def invariant(result) -> list[torch.Tensor]:
    """What of a result does not depend on signs."""
    return [leaf.abs() for leaf in tree_leaves(result)]


OPTIONS = {ggn_eigh: {"select": top_k(2)}, directional_derivatives: {"select": top_k(2)}}


@EACH
@pytest.mark.parametrize("name", [*SMALL_AND_LARGE, "attention", "poisson"])
def test_prepared_models_give_the_same(name, function):
    given = problem(name)
    prepared = given._replace(model_fn=prepare(*given[:3]))
    expected = function(*given, **OPTIONS.get(function, {}))
    for chunk_size in (None, 2):
        result = function(*prepared, **OPTIONS.get(function, {}), chunk_size=chunk_size)
        assert error(invariant(result), invariant(expected)) < 1e-9


@EACH
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "many_points"])
def test_an_ensemble_is_a_loop(name, function):
    given = problem(name)
    apart = [problem(name, seed=seed).params for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *apart)

    def one(params):
        return function(*given._replace(params=params), **OPTIONS.get(function, {}))

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        mine = tree_map(lambda leaf, i=i: leaf[i], together)
        assert error(invariant(mine), invariant(one(params))) < 1e-9


@pytest.mark.parametrize("select", [None, above(0.3)], ids=["all", "mask"])
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_in_an_ensemble_directions_that_are_not_kept_are_zero(name, select):
    """How many are kept is not known: there are NM of them, and vectors of K."""
    given = problem(name)
    apart = [problem(name, seed=seed).params for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *apart)

    def one(params):
        arguments = given._replace(params=params)
        vectors = ggn_eigh(*arguments, select=select)[1]
        return vectors, directional_derivatives(*arguments, select=select)

    vectors, pairs = vmap(one)(stacked)
    for i, params in enumerate(apart):
        expected, pair = one(params)
        expected, K = rows(expected), len(pair.lambdas[0])
        E = rows(tree_map(lambda leaf, i=i: leaf[i], vectors))
        assert error(E[:, -K:].abs(), expected.abs()) < 1e-9
        assert not E[:, :-K].any()
        assert error(pairs.lambdas[i][:, -K:], pair.lambdas) < 1e-9
        assert not pairs.lambdas[i][:, :-K].any()
        assert not pairs.gammas[i][:, :-K].any()


@EACH
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_under_every_context_nothing_is_recorded_or_changed(context, function):
    for name in ("relu_mlp", "tanh_mlp", "many_points"):
        given = problem(name)
        for leaf in tree_leaves(given.params):
            leaf.requires_grad_()
        before = copy.deepcopy((given.params, given.X, given.y))
        expected = function(*given, **OPTIONS.get(function, {}))
        with context():
            result = function(*given, **OPTIONS.get(function, {}))
        assert not any(leaf.requires_grad for leaf in tree_leaves(result))
        assert error(invariant(result), invariant(expected)) < 1e-11
        for x, y in zip(tree_leaves(before), tree_leaves(given[1:4]), strict=True):
            assert torch.equal(x, y)
        assert all(leaf.grad is None for leaf in tree_leaves(given.params))


def test_an_ensemble_of_modules():
    modules = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(3)]
    params, _ = stack_module_state(modules)
    X, y = torch.randn(5, 3), torch.randn(5, 2)

    def one(params):
        return ggn_eigvalsh(
            lambda p, x: functional_call(modules[0], p, (x,)), params, X, y, nn.MSELoss()
        )

    together = vmap(one)(params)
    for i in range(3):
        assert error(together[i], one({k: p[i] for k, p in params.items()})) < 1e-5


def test_the_callers_rule_may_do_what_it_likes_with_the_eigenvalues():
    def select(evals):
        evals.zero_()
        return [len(evals) - 1]

    given = problem("relu_mlp")
    assert error(ggn_eigh(*given, select=select)[0], ggn_eigvalsh(*given)[-1:]) < 1e-12


def test_a_flat_loss_has_no_directions():
    """Huber's loss far from the target."""
    given = problem("relu_mlp")._replace(
        y=torch.full((5, 3), 1e3, dtype=FLOAT64), criterion=nn.HuberLoss()
    )
    assert not ggn_eigvalsh(*given).any()
    assert not gram_matrix(*given).any()
    evals, evecs = ggn_eigh(*given)
    assert evals.shape == (0,)
    assert [tuple(e.shape) for e in evecs.values()] == [
        (0, *p.shape) for p in given.params.values()
    ]
    gammas, lambdas = directional_derivatives(*given)
    assert gammas.shape == lambdas.shape == (5, 0)
    evals, evecs = ggn_eigh(*given, select=top_k(2))
    assert not any(leaf.any() for leaf in tree_leaves((evals, evecs)))


def test_half_precision_comes_out_in_single():
    for dtype in (torch.bfloat16, torch.float16):
        given = problem("relu_mlp", dtype)
        assert ggn_eigvalsh(*given).dtype == gram_matrix(*given).dtype == FLOAT32
        evals, evecs = ggn_eigh(*given, select=top_k(2))
        assert evals.dtype == FLOAT32
        assert {leaf.dtype for leaf in tree_leaves(evecs)} == {dtype}


# --- refusals -------------------------------------------------------------------------------


MODEL, PARAMS = problem("relu_mlp", FLOAT32)[:2]
REFUSED = {
    "model": ({"model_fn": "net"}, TypeError, "model_fn must be a function; got 'net'"),
    "params": ({"params": {}}, ValueError, "params must hold at least one tensor"),
    "counts": ({"y": torch.zeros(4, dtype=torch.long)}, ValueError, r"X: 5, y: 4\. Slice"),
    "criterion": ({"criterion": "mse"}, TypeError, "criterion must be a loss function"),
    "gram": ({"gram": "sparse"}, ValueError, "gram must be one of .*; got 'sparse'"),
    "chunk size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
    "chunk type": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer or None"),
    "chunk truth": ({"chunk_size": True}, TypeError, "chunk_size must be .*; got bool"),
    "not finite": (
        {"model_fn": lambda p, x: MODEL(p, x) / 0},
        ValueError,
        "outputs of model_fn must be finite",
    ),
    "mixed": (
        {"model_fn": lambda p, x: MODEL(p, x) - MODEL(p, x).mean(0)},
        ValueError,
        "must not depend on another's",
    ),
    "slope at zero": (
        {"model_fn": lambda p, x: MODEL(p, x) + (0 * p["0.weight"].sum()).sqrt()},
        ValueError,
        "derivatives of model_fn must be finite",
    ),
}
REFUSED_SELECTIONS = {
    "number": (3, TypeError, "select must be a function or None; got 3"),
    "beyond": (lambda evals: [10], ValueError, "indices from 10 to 10"),
    "repeats": (lambda evals: [1, -9], ValueError, "repeats in"),
    "floats": (lambda evals: [0.5], TypeError, "numbers of torch.float32"),
    "short mask": (lambda evals: evals[1:] > 0, ValueError, "a mask of length 9"),
    "strings": (lambda evals: "all", TypeError, "distinct indices .*; got 'all'"),
    "square": (lambda evals: [[0]], ValueError, r"shape \[1, 1\]"),
}


@EACH
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_begin_with_the_functions_own_name(case, function):
    changes, kind, message = REFUSED[case]
    arguments = problem("relu_mlp", FLOAT32)._asdict() | changes
    with pytest.raises(kind, match=f"^{function.__name__}: .*{message}"):
        function(**arguments)


@pytest.mark.parametrize("function", [ggn_eigh, directional_derivatives])
@pytest.mark.parametrize("case", REFUSED_SELECTIONS)
def test_selections_are_refused(case, function):
    select, kind, message = REFUSED_SELECTIONS[case]
    with pytest.raises(kind, match=f"^{function.__name__}: .*{message}"):
        function(*problem("relu_mlp", FLOAT32), select=select)


def test_functions_have_the_options_they_use_and_no_others():
    given = problem("relu_mlp", FLOAT32)
    for function in (ggn_eigvalsh, gram_matrix):
        with pytest.raises(TypeError, match="select"):
            function(*given, select=top_k(1))
    for function in (ggn_eigvalsh, gram_matrix, ggn_eigh):
        for option in ("subsampling_grad", "subsampling_curvature", "complement", "damping"):
            with pytest.raises(TypeError, match=option):
                partial(function, *given)(**{option: None})


@EACH
def test_derivatives_that_are_not_finite_are_refused_of_a_prepared_model(function):
    X, y = torch.randn(4, 2), torch.randn(4)
    root = prepare(lambda w, x: x @ w + w.square().sum().sqrt(), torch.ones(2), X)
    with pytest.raises(ValueError, match=f"^{function.__name__}: the derivatives .* be finite"):
        function(root, torch.zeros(2), X, y, nn.MSELoss())
