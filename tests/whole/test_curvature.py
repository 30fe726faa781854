"""Eigenvalues, eigenvectors, derivatives and Gram matrices against the dense reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddnewton import (
    above,
    criteria,
    directional_derivatives,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    newton_step_and_info,
    prepare,
    top_k,
)
from tests.methods import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    REDUCTIONS,
    SELECTIONS,
    SMALL_AND_LARGE,
    TORCH_LOSSES,
    truth,
)
from tests.models import Problem, cast, normal, problem
from tests.reference import (
    clusters,
    dense,
    directions,
    eigenpairs,
    error,
    rank,
    softmax_derivatives,
)
from tests.whole.eigenpairs import (
    ALL_MODELS,
    SQUARED,
    TOLERANCE,
    check_derivatives,
    check_eigenpairs,
    picked,
    rows,
    top,
)

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


@pytest.mark.parametrize("samples", [4, 28], ids=["NM<D", "NM>D"])
@REDUCTIONS
@pytest.mark.parametrize("loss", TORCH_LOSSES)
def test_eigenvalues_of_every_loss(loss, reduction, samples):
    case = TORCH_LOSSES[loss]
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()  # D = 27
    params = {name: p.detach() for name, p in net.named_parameters()}
    y = tree_map(lambda y: y[:4].repeat(samples // 4, *(1,) * (y.ndim - 1)), case.y)
    given = Problem(
        lambda p, x: functional_call(net, p, (x,)),
        params,
        normal(samples, 2).double(),
        cast(y, FLOAT64),
        case.module(reduction=reduction),
    )
    reference = dense(*given._replace(criterion=case.plain(reduction)))
    evals = ggn_eigvalsh(*given)
    assert len(evals) == samples * case.columns
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


@pytest.mark.parametrize("choice", SELECTIONS)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_the_selection_is_followed_in_its_order(name, choice):
    given, select, reference = problem(name), SELECTIONS[choice].select, truth(name)
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


@pytest.mark.parametrize("select", [None, top_k(3), above(0.01)], ids=["all", "top_k", "above"])
@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "many_points"])
def test_large_models_in_float32_stay_in_float32(name, select, monkeypatch):
    """Their columns are rounded, the sums of products are not."""
    monkeypatch.setattr("ddnewton.linearize.precision.CHEAP_FLOPS", 0)
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
    for select in (None, top_k(2), SELECTIONS["permuted"].select if name != "one_sample" else None):
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
