"""Eigenvalues, eigenvectors, derivatives along them and the Gram matrix, against the textbook."""

import copy
import math
from functools import cache, partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddnewton import (
    above,
    criteria,
    directional_derivatives,
    energy,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    newton_step_and_info,
    prepare,
    top_k,
)
from models import PROBLEMS, Problem, cast, normal, problem
from reference import (
    Dense,
    clusters,
    dense,
    directions,
    eigenpairs,
    error,
    rank,
    softmax_derivatives,
)

FLOAT32, FLOAT64 = torch.float32, torch.float64
TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
ALL_MODELS = pytest.mark.parametrize("name", PROBLEMS)
FUNCTIONS = (ggn_eigvalsh, ggn_eigh, directional_derivatives, gram_matrix)
EACH = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)

SMALL_AND_LARGE = ["relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points"]
"""Problems with fewer and with more columns NM than parameters D, with both kinds of M."""

SQUARED = ["eval_batch_norm", "tanh_mlp", "tied_autoencoder", "tuple_of_two", "poisson"]
SQUARED += ["written_in_place", "many_points"]
"""Problems with a squared error, whose root L is the identity."""

SELECTS = {
    "all": None,
    "permuted": lambda evals: [len(evals) - 2, len(evals) - 1, len(evals) - 3],
    "negative": lambda evals: torch.tensor([-1, -3]),
    "mask": lambda evals: torch.arange(len(evals)) >= len(evals) - 3,
    "top_k": top_k(2),
    "above": above(0.1),
    "energy": energy(0.9),
    "none": lambda evals: [],
    "no mask": lambda evals: torch.zeros(len(evals), dtype=torch.bool),
}


@cache
def truth(name: str) -> Dense:
    """The dense reference of a problem."""
    return dense(*problem(name))


def rows(evecs) -> torch.Tensor:
    """The vectors of a pytree with K in front, [D, K] in float64."""
    flat = [leaf.double().reshape(len(leaf), leaf.sum(0).numel()) for leaf in tree_leaves(evecs)]
    return torch.cat(flat, 1).mT


def top(evals, count: int) -> torch.Tensor:
    """The largest eigenvalues, as many as there are to be compared, zeros in front."""
    return F.pad(evals, (max(0, count - len(evals)), 0))[-count:]


def check_eigenpairs(reference: Dense, evals, E, tolerance: float) -> None:
    """Orthonormal, and G E = E diag(λ) relative to the largest eigenvalue."""
    G = reference.ggn
    scale = torch.linalg.matrix_norm(G, 2)
    assert error(E.mT @ E, torch.eye(E.shape[1], dtype=FLOAT64)) < tolerance
    assert float((G @ E - E * evals.double()).norm()) < tolerance * scale


def check_derivatives(reference: Dense, E, derivatives, tolerance: float) -> None:
    """γ = e_kᵀ∇ℓ_n and λ = e_kᵀ J_nᵀ H_n J_n e_k along the given vectors, sign and all."""
    gammas, lambdas = derivatives
    changes = reference.jacobians @ E
    expected = torch.einsum("nck,nc->nk", changes, reference.slopes)
    assert error(gammas, expected) < tolerance
    expected = torch.einsum("nck,ncd,ndk->nk", changes, reference.hessians, changes)
    assert error(lambdas, expected) < tolerance


# --- the Gram matrix ------------------------------------------------------------------------


@DTYPES
@ALL_MODELS
def test_the_gram_matrix_has_the_eigenvalues_of_the_ggn(name, dtype):
    gram = gram_matrix(*problem(name, dtype))
    assert gram.dtype == dtype
    assert gram.shape == (gram.shape[0], gram.shape[0])
    evals = torch.linalg.eigvalsh(gram.double())
    assert error(evals, top(eigenpairs(truth(name))[0], len(evals))) < TOLERANCE[dtype]
    assert float((gram - gram.mT).abs().max()) <= torch.finfo(dtype).eps * gram.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", SQUARED)
def test_the_gram_matrix_of_a_squared_error_entry_by_entry(name, reduction):
    """V's column m·N + n is J_nm √(h/N), of a loss N/(N C) (f - y)² or N (f - y)²."""
    given = problem(name)._replace(criterion=nn.MSELoss(reduction=reduction))
    reference = dense(*given)
    J = reference.jacobians
    h = 2 * len(J) if reduction == "sum" else 2 / J.shape[1]
    V = J.transpose(0, 1).flatten(0, 1) * math.sqrt(h / len(J))
    assert error(gram_matrix(*given), V @ V.mT) < 1e-12


@ALL_MODELS
def test_a_permuted_batch_permutes_rows(name):
    given, whole = problem(name), gram_matrix(*problem(name))
    n = len(tree_leaves(given.X)[0])
    order = torch.randperm(n)
    X, y = (tree_map(lambda x: x[order], tree) for tree in (given.X, given.y))
    index = (torch.arange(len(whole) // n)[:, None] * n + order).flatten()
    expected = whole[index][:, index]
    assert error(gram_matrix(*given._replace(X=X, y=y)), expected) < 1e-12
    # Sub-sampled, the mean is over fewer, and nothing else changes.
    some = order[: max(1, n // 2)]
    index = (torch.arange(len(whole) // n)[:, None] * n + some).flatten()
    sampled = gram_matrix(*given, subsampling_ggn=some)
    assert error(sampled, n / len(some) * whole[index][:, index]) < 1e-12


@ALL_MODELS
def test_ways_to_the_gram_matrix_agree(name):
    given = problem(name)
    whole = gram_matrix(*given, gram="dense")
    ways = [{"chunk_size": 2, "gram": "dense"}]
    if name != "lstm":
        ways += [{"gram": "structured"}, {"chunk_size": 3}]
        given = given._replace(model_fn=prepare(*given[:3]))
    for way in ways:
        assert error(gram_matrix(*given, **way), whole) < 1e-11, way


# --- eigenvalues ----------------------------------------------------------------------------


@DTYPES
@ALL_MODELS
def test_eigenvalues_of_every_model(name, dtype):
    given = problem(name, dtype)
    evals = ggn_eigvalsh(*given)
    assert evals.dtype == dtype
    assert len(evals) == len(gram_matrix(*given))
    assert (evals >= 0).all()
    assert (evals.diff() >= 0).all()
    assert error(evals, top(eigenpairs(truth(name))[0], len(evals))) < TOLERANCE[dtype]


LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss, torch.tensor([0, 2, 1, 1]), 2),
    "mse": (nn.MSELoss, torch.linspace(-1, 2, 12).reshape(4, 3), 3),
    "bce": (nn.BCEWithLogitsLoss, torch.linspace(0, 1, 12).reshape(4, 3), 3),
}


@pytest.mark.parametrize("samples", [4, 28], ids=["NM<D", "NM>D"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_eigenvalues_of_every_loss(loss, reduction, samples):
    module, y, M = LOSSES[loss]
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()  # D = 27
    params = {name: p.detach() for name, p in net.named_parameters()}
    y = y.repeat(samples // 4, *(1,) * (y.ndim - 1))
    given = Problem(
        lambda p, x: functional_call(net, p, (x,)),
        params,
        normal(samples, 2).double(),
        cast(y, FLOAT64),
        module(reduction=reduction),
    )
    reference = dense(*given)
    evals = ggn_eigvalsh(*given)
    assert len(evals) == samples * M
    assert error(evals, top(torch.linalg.eigvalsh(reference.ggn), len(evals))) < 1e-12
    _, info = newton_step_and_info(*given, 0.1)
    above_tolerance, E = ggn_eigh(*given)
    assert len(above_tolerance) == info.rank == rank(eigenpairs(reference)[0])
    assert error(info.evals, evals[-len(info.evals) :]) < 1e-12
    assert error(above_tolerance, info.evals) < 1e-12
    check_eigenpairs(reference, above_tolerance, rows(E), 1e-12)


# --- eigenvectors ---------------------------------------------------------------------------


@DTYPES
@ALL_MODELS
def test_eigenvectors_of_every_model(name, dtype):
    given = problem(name, dtype)
    evals, evecs = ggn_eigh(*given)
    leaves, structure = tree_flatten(given.params)
    found, found_structure = tree_flatten(evecs)
    assert structure == found_structure
    assert type(evecs) is type(given.params)
    for leaf, e in zip(leaves, found, strict=True):
        assert (e.shape, e.dtype) == ((len(evals), *leaf.shape), leaf.dtype)
    assert evals.dtype == dtype
    assert (evals.diff() >= 0).all()
    if dtype == FLOAT64:
        assert len(evals) == rank(eigenpairs(truth(name))[0])
    check_eigenpairs(truth(name), evals, rows(evecs), TOLERANCE[dtype])


def picked(select, evals) -> torch.Tensor:
    """The eigenvalues that a rule asks for, in its order."""
    choice = torch.as_tensor(select(evals))
    return evals[choice if choice.dtype == torch.bool else choice.long()]


@pytest.mark.parametrize("choice", SELECTS)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_the_selection_is_followed_in_its_order(name, choice):
    given, select, reference = problem(name), SELECTS[choice], truth(name)
    every = ggn_eigvalsh(*given)
    wanted = picked(select or above(1e-12), every)
    evals, evecs = ggn_eigh(*given, select=select)
    E = rows(evecs)
    assert error(evals, wanted) < 1e-11
    assert E.shape == (reference.jacobians.shape[2], len(wanted))
    check_eigenpairs(reference, evals, E, 1e-11)
    pair = directional_derivatives(*given, select=select, gram="dense")
    assert pair.gammas.shape == pair.lambdas.shape == (len(reference.slopes), len(wanted))
    check_derivatives(reference, E, pair, 1e-10)


ZEROS = {
    "more columns than parameters": (normal(9, 2), 3),  # NM = 9, D = 6, rank 6
    "rank below the parameters": (normal(9, 1) * torch.ones(2), 3),
    "fewer columns than parameters": (normal(1, 1) * torch.ones(3, 5), 5),  # NM = 3, D = 10
}


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("case", ZEROS)
def test_an_eigenvalue_of_zero_has_no_vector(case, order):
    X, D = ZEROS[case]
    X = X.double()
    given = Problem(
        lambda w, x: torch.tanh(x @ w[: x.shape[1]]) + 0 * w.sum(),
        normal(D if X.shape[1] == 2 else 10).double(),
        X,
        X[:, 0].sin(),
        nn.MSELoss(),
    )
    reference = dense(*given)
    step = 1 if order == "ascending" else -1
    evals, E = ggn_eigh(*given, select=lambda evals: list(range(len(evals)))[::step])
    E, alive = rows(E), rank(eigenpairs(reference)[0])
    if step == -1:
        evals, E = evals.flip(0), E.flip(1)
    assert len(evals) == len(X)
    assert error(evals, top(eigenpairs(reference)[0], len(X))) < 1e-12
    assert not E[:, :-alive].any()
    check_eigenpairs(reference, evals[-alive:], E[:, -alive:], 1e-12)
    pair = directional_derivatives(*given, select=lambda evals: list(range(len(evals))))
    check_derivatives(reference, E, pair, 1e-11)


def scaled(samples: int, features: int, decades: float, layers: str) -> Problem:
    """A spectrum over twice as many decades as the inputs' scales; softmax of sure logits too."""
    X = normal(samples, features).double() * torch.logspace(0, -decades, features, dtype=FLOAT64)
    params = {"w": normal(features, 2).double(), "b": normal(2).double()}
    if layers == "tanh":

        def model_fn(p, x):
            return torch.tanh(x @ p["w"] + p["b"])

        return Problem(model_fn, params, X, X[:, :2], nn.MSELoss())

    def model_fn(p, x):
        return 9 * (x @ p["w"]) + p["b"]

    return Problem(model_fn, params, X, torch.arange(samples) % 2, nn.CrossEntropyLoss())


@pytest.mark.parametrize("decades", [0, 3, 6, 9])
@pytest.mark.parametrize("samples", [4, 10, 40])
@pytest.mark.parametrize("layers", ["tanh", "softmax"])
def test_vectors_are_orthonormal_over_many_decades(layers, samples, decades):
    """Also where the eigenvalues reach down into the rounding of the largest."""
    given = scaled(samples, 12, decades, layers)
    reference = dense(*given, *([softmax_derivatives] if layers == "softmax" else []))
    evals, evecs = ggn_eigh(*given)
    check_eigenpairs(reference, evals, rows(evecs), 1e-12)
    assert error(ggn_eigvalsh(*given)[-len(evals) :], evals) < 1e-12


def test_vectors_of_a_trained_net_are_orthonormal():
    """What remains is curvature of very different sizes, small columns beside large ones."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    X, y = normal(12, 3).double(), torch.arange(12) % 3
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    params = {name: p.detach() for name, p in net.named_parameters()}
    given = Problem(lambda p, x: functional_call(net, p, (x,)), params, X, y, nn.CrossEntropyLoss())
    reference = dense(*given, softmax_derivatives)
    evals, evecs = ggn_eigh(*given)
    assert len(evals) > 12
    assert evals[0] < 1e-8 * evals[-1]
    E = rows(evecs)
    check_eigenpairs(reference, evals, E, 1e-10)
    check_derivatives(reference, E, directional_derivatives(*given), 1e-9)


@cache
def many_samples(samples: int) -> tuple[Problem, Dense]:
    """NM = 300 columns where SciPy's partial solver is worth its while, and D = 361 or 61."""
    width = 30 if samples == 300 else 5
    net = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    X = normal(samples, 10).double()
    given = Problem(
        lambda p, x: functional_call(net, p, (x,)), params, X, X[:, :1].sin(), nn.MSELoss()
    )
    return given, dense(*given)


@pytest.mark.parametrize("samples", [300, 310])
@pytest.mark.parametrize("k", [1, 5, 37, 38])
def test_leading_eigenpairs_of_many_samples(samples, k, monkeypatch):
    given, reference = many_samples(samples)
    calls = []
    if find_spec("scipy") and find_spec("threadpoolctl"):
        from ddnewton.quadratic import spectrum

        subset = spectrum._subset
        monkeypatch.setattr(
            spectrum, "_subset", lambda *args: calls.append(args[1]) or subset(*args)
        )
        few = samples == 300 and k <= 37
    else:
        few = False
    evals, evecs = ggn_eigh(*given, select=top_k(k))
    pair = directional_derivatives(*given, select=top_k(k))
    assert len(calls) == 2 * few
    assert error(evals, torch.linalg.eigvalsh(reference.ggn)[-k:]) < 1e-12
    check_eigenpairs(reference, evals, rows(evecs), 1e-12)
    check_derivatives(reference, rows(evecs), pair, 1e-11)
    in_full, vectors = ggn_eigh(*given, select=lambda evals: range(len(evals) - k, len(evals)))
    assert error(evals, in_full) < 1e-12
    E = rows(vectors)
    assert error(rows(evecs) @ rows(evecs).mT, E @ E.mT) < 1e-9


@pytest.mark.parametrize("select", [None, top_k(3), above(0.01)], ids=["all", "top_k", "above"])
@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "many_points"])
def test_large_models_in_float32_stay_in_float32(name, select, monkeypatch):
    """Their columns are rounded, the sums of products are not."""
    monkeypatch.setattr("ddnewton.linearize.linearization.CHEAP_FLOPS", 0)
    given, options = problem(name, FLOAT32), {"select": select, "gram": "structured"}
    evals, evecs = ggn_eigh(*given, **options)
    assert error(evals, ggn_eigvalsh(*given)[-len(evals) :]) < 1e-5
    check_eigenpairs(truth(name), evals, rows(evecs), 1e-5)
    pair = directional_derivatives(*given, **options)
    check_derivatives(truth(name), rows(evecs), pair, 1e-5)
    assert error(ggn_eigvalsh(*given, gram="structured"), ggn_eigvalsh(*given)) < 1e-5
    assert error(gram_matrix(*given, gram="structured"), gram_matrix(*given)) < 1e-5


# --- derivatives along the directions -------------------------------------------------------


@DTYPES
@ALL_MODELS
def test_derivatives_of_every_model_along_its_own_eigenvectors(name, dtype):
    """The same arguments have the same directions, to the sign."""
    given = problem(name, dtype)
    for select in (None, top_k(3)):
        evals, evecs = ggn_eigh(*given, select=select)
        pair = directional_derivatives(*given, select=select)
        assert pair.gammas.dtype == pair.lambdas.dtype == dtype
        check_derivatives(truth(name), rows(evecs), pair, 10 * TOLERANCE[dtype])
        slopes = rows(evecs).mT @ truth(name).gradient
        assert error(pair.gammas.mean(0), slopes) < 10 * TOLERANCE[dtype]
        assert error(pair.lambdas.mean(0), evals) < 10 * TOLERANCE[dtype]


@ALL_MODELS
def test_derivatives_of_every_model_whatever_the_basis(name):
    """Within equal eigenvalues only sums over them mean something."""
    expected = directions(truth(name))
    gammas, lambdas = directional_derivatives(*problem(name))
    assert gammas.shape == expected.gammas.shape
    for run in clusters(expected.evals):
        inner = gammas[:, run] @ gammas[:, run].mT
        assert error(inner, expected.gammas[:, run] @ expected.gammas[:, run].mT) < 1e-9
        assert error(lambdas[:, run].sum(1), expected.lambdas[:, run].sum(1)) < 1e-9


@ALL_MODELS
def test_what_a_step_says_of_its_directions(name):
    given = problem(name)
    for select in (None, top_k(2), SELECTS["permuted"] if name != "one_sample" else None):
        _, info = newton_step_and_info(*given, 0.1, select=select)
        gammas, lambdas = directional_derivatives(*given, select=select)
        assert error(info.evals, ggn_eigh(*given, select=select)[0]) < 1e-12
        assert error(info.gammas, gammas) < 1e-10
        assert error(info.lambdas, lambdas) < 1e-10


def test_the_empirical_fisher_matrix():
    """Its columns are the gradients, its eigenvalues those of their mean outer product."""
    for name in SMALL_AND_LARGE:
        given = problem(name)._replace(
            criterion=(fisher := criteria.empirical_fisher(problem(name).criterion))
        )
        outputs = given.model_fn(given.params, given.X)
        factor = float(torch.as_tensor(fisher.denominator(outputs, given.y)))
        factor /= len(outputs)
        g = truth(name).gradients
        expected = factor * g @ g.mT / len(g)
        assert error(gram_matrix(*given), expected) < 1e-11
        evals = ggn_eigvalsh(*given)
        assert error(evals, torch.linalg.eigvalsh(expected)) < 1e-11
        E = rows(ggn_eigh(*given, select=top_k(3))[1])
        pair = directional_derivatives(*given, select=top_k(3))
        assert error(pair.gammas, g @ E) < 1e-10
        assert error(pair.lambdas, factor * (g @ E).square()) < 1e-10


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
