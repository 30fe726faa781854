"""A loss of several terms, against sums of dense matrices that are made without ddnewton."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

from ddnewton import (
    Group,
    directional_derivatives,
    empirical_fisher,
    energy,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
    weighted,
)
from ddnewton.damping import signal_to_noise
from tests import reference
from tests.reference import error, flat

GRAM_WAYS = pytest.mark.parametrize("gram", ["dense", "structured", "prepared"])


class Problem(NamedTuple):
    """The terms of a loss, each with its own function, samples and criterion."""

    model_fn: dict[str, Any]
    params: dict[str, Tensor]
    X: dict[str, Any]
    y: dict[str, Any]
    criterion: dict[str, Any]


def net(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()


def physics(width: int = 16) -> Problem:
    """A Laplacian inside, the value on the edge, with an unknown constant that one term reads."""
    module = net(width)
    params = {name: p.detach() for name, p in module.named_parameters()}
    params["strength"] = torch.tensor(0.7).double()

    def u(p, x):
        weights = {name: value for name, value in p.items() if name != "strength"}
        return functional_call(module, weights, (x,))

    def residual(p, x):
        at = lambda z: u(p, z[None])[0, 0]  # noqa: E731
        return p["strength"] * vmap(lambda z: hessian(at)(z).trace())(x)[:, None]

    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.rand(*shape, generator=g).double()  # noqa: E731
    return Problem(
        model_fn={"inside": residual, "edge": u, "data": u},
        params=params,
        X={"inside": rand(20, 2), "edge": rand(9, 2), "data": rand(4, 2)},
        y={"inside": rand(20, 1), "edge": rand(9, 1), "data": rand(4, 1)},
        criterion={
            "inside": nn.MSELoss(),
            "edge": weighted(nn.MSELoss(), 10.0),
            "data": nn.MSELoss(reduction="sum"),
        },
    )


def mixed() -> Problem:
    """Two heads on one trunk: classes and a regression of two outputs, of different samples."""
    torch.manual_seed(2)
    params = {
        "trunk": torch.randn(5, 3).double(),
        "classes": torch.randn(5, 4).double(),
        "values": torch.randn(2, 5).double(),
    }
    trunk = lambda p, x: torch.tanh(x @ p["trunk"].T)  # noqa: E731
    return Problem(
        model_fn={
            "classes": lambda p, x: trunk(p, x) @ p["classes"],
            "values": lambda p, x: trunk(p, x) @ p["values"].T,
        },
        params=params,
        X={"classes": torch.randn(6, 3).double(), "values": torch.randn(8, 3).double()},
        y={"classes": torch.randint(4, (6,)), "values": torch.randn(8, 2).double()},
        criterion={"classes": nn.CrossEntropyLoss(), "values": nn.HuberLoss(delta=10.0)},
    )


FACTORS = {"edge": 10.0}
"""By what the criterion of a term multiplies a loss of torch's."""

PROBLEMS = {"more_columns": physics(4), "more_parameters": physics(16), "two_losses": mixed()}
EVERY_PROBLEM = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def torch_loss(problem: Problem, name: str) -> Any:
    """The criterion of a term as a function of torch's."""
    plain = {"edge": nn.MSELoss(), "inside": nn.MSELoss()}.get(name, problem.criterion[name])
    return lambda f, y: FACTORS.get(name, 1.0) * plain(f, y)


def dense_terms(problem: Problem, samples: dict[str, Any] | None = None) -> dict[str, Any]:
    """The dense matrices of every term, or of some of its samples, each a mean over these."""
    terms = {}
    for name, function in problem.model_fn.items():
        X, y = problem.X[name], problem.y[name]
        terms[name] = reference.dense(function, problem.params, X, y, torch_loss(problem, name))
        if samples is not None:
            chosen = samples[name]
            per_sample = (terms[name].jacobians, terms[name].slopes, terms[name].hessians)
            parts = [part[chosen] for part in per_sample]
            terms[name] = reference.Dense(terms[name].loss, *parts)
    return terms


def ggn(terms: dict[str, Any]) -> Tensor:
    return sum(term.ggn for term in terms.values())


def gradient(terms: dict[str, Any]) -> Tensor:
    return sum(term.gradient for term in terms.values())


def solved(G: Tensor, g: Tensor, delta: float) -> Tensor:
    return -torch.linalg.solve(G + delta * torch.eye(len(g)).double(), g)


def formed(problem: Problem, gram: str) -> tuple[Problem, dict[str, Any]]:
    """The problem and the options of a way to form the columns."""
    if gram != "prepared":
        return problem, {"gram": gram}
    return problem._replace(model_fn=prepare(*problem[:3])), {}


# --- steps ---------------------------------------------------------------------------------------


@EVERY_PROBLEM
@GRAM_WAYS
@pytest.mark.parametrize("delta", [10.0, 0.1, 1e-4])
def test_the_step_is_that_of_the_sum_of_the_terms(problem, gram, delta):
    terms = dense_terms(problem)
    truth = solved(ggn(terms), gradient(terms), delta)
    problem, options = formed(problem, gram)
    assert error(newton_step(*problem, delta, **options), truth) < 1e-10
    step, info = newton_step_and_info(*problem, delta, **options)
    assert error(step, truth) < 1e-10
    for name, term in terms.items():
        assert error(info.losses[name], term.loss) < 1e-12
    assert error(info.loss, sum(term.loss for term in terms.values())) < 1e-12
    assert error(info.gradient_norm, gradient(terms).norm()) < 1e-10


@EVERY_PROBLEM
@GRAM_WAYS
def test_means_over_the_samples_of_all_terms_are_slopes_and_curvatures(problem, gram):
    terms = dense_terms(problem)
    G, g = ggn(terms), gradient(terms)
    problem, options = formed(problem, gram)
    gammas, lambdas = directional_derivatives(*problem, select=top_k(3), **options)
    evals, evecs = ggn_eigh(*problem, select=top_k(3), **options)
    n = sum(len(term.slopes) for term in terms.values())
    assert gammas.shape == lambdas.shape == (n, 3)
    vectors = torch.stack([flat({name: e[k] for name, e in evecs.items()}) for k in range(3)])
    assert error(evals, torch.linalg.eigvalsh(G)[-3:]) < 1e-9
    assert error(vectors @ G @ vectors.T, torch.diag(evals)) < 1e-9
    assert error(lambdas.mean(0), evals) < 1e-9
    assert error(gammas.mean(0), vectors @ g) < 1e-10
    # Every sample's own, in the order of the terms.
    rows = [term.gradients * (n / len(term.slopes)) for term in terms.values()]
    assert error(gammas, torch.cat(rows) @ vectors.T) < 1e-10


@EVERY_PROBLEM
def test_the_gram_matrix_has_the_columns_of_the_terms_one_after_the_other(problem):
    terms = dense_terms(problem)
    evals = torch.linalg.eigvalsh(ggn(terms)).clamp(min=0)
    matrix = gram_matrix(*problem)
    count = min(len(evals), len(matrix))
    assert error(torch.linalg.eigvalsh(matrix)[-count:].clamp(min=0), evals[-count:]) < 1e-9
    assert error(ggn_eigvalsh(*problem)[-count:], evals[-count:]) < 1e-9
    # A term by itself is a block on the diagonal.
    start = 0
    for name in problem.model_fn:
        parts = (problem.X[name], problem.y[name], problem.criterion[name])
        block = gram_matrix(problem.model_fn[name], problem.params, *parts)
        assert error(matrix[start:, start:][: len(block), : len(block)], block) < 1e-10
        start += len(block)
    assert start == len(matrix)


@EVERY_PROBLEM
@pytest.mark.parametrize("select", [top_k(2), energy(0.9)], ids=["top_k", "energy"])
def test_kept_directions_and_the_complement(problem, select):
    terms = dense_terms(problem)
    G, g = ggn(terms), gradient(terms)
    evals, vectors = torch.linalg.eigh(G)
    kept = vectors[:, select(evals)]
    lam, gamma = kept.T @ G @ kept, kept.T @ g
    truth = -kept @ torch.linalg.solve(lam + 0.1 * torch.eye(len(lam)).double(), gamma)
    assert error(newton_step(*problem, 0.1, select=select), truth) < 1e-10
    whole = truth - (g - kept @ gamma) / 2.0
    assert error(newton_step(*problem, 0.1, select=select, complement=2.0), whole) < 1e-10


@EVERY_PROBLEM
def test_a_rule_sees_the_samples_of_all_terms(problem):
    """A rule of γ and λ that depends on every row, through their variance."""
    seen = {}

    def rule(evals, evecs, gammas, lambdas):
        seen.update(evals=evals, evecs=evecs, gammas=gammas, lambdas=lambdas)
        return 0.1 + gammas.var(0) + lambdas.var(0)

    step, info = newton_step_and_info(*problem, rule)
    terms = dense_terms(problem)
    n = sum(len(term.slopes) for term in terms.values())
    assert seen["gammas"].shape[0] == seen["lambdas"].shape[0] == n
    assert seen["evecs"].shape[0] == len(gram_matrix(*problem))
    # Along the directions themselves: s = Σ −γ_k / (λ_k + δ_k) e_k.
    assert error(seen["lambdas"].mean(0), seen["evals"]) < 1e-10
    expected = -seen["gammas"].mean(0) / (seen["evals"] + info.dampings)
    assert error(info.coefficients, expected) < 1e-10
    assert error(flat(step).norm(), expected.norm()) < 1e-10
    assert newton_step(*problem, signal_to_noise()).keys() == problem.params.keys()


def test_groups_are_blocks_of_the_sum():
    problem = physics(16)
    terms = dense_terms(problem)
    G, g = ggn(terms), gradient(terms)
    d = len(g)
    first = torch.zeros(d, dtype=torch.bool)
    first[: 16 * 2 + 16] = True  # the first layer
    truth = torch.zeros(d).double()
    for block, delta in ((first, 0.1), (~first, 2.0)):
        truth[block] = solved(G[block][:, block], g[block], delta)
    rest = ("2", "strength")
    groups = [Group("0"), Group(rest, damping=2.0)]
    step, info = newton_step_and_info(*problem, 0.1, groups=groups)
    assert error(step, truth) < 1e-10
    assert len(info) == 2


@pytest.mark.parametrize("width", [4, 16])
def test_subsamples_are_dicts(width):
    problem = physics(width)
    grad = {"inside": [3, 1, 7], "edge": [0, 2], "data": [1, 3]}
    ggn_samples = {"inside": slice(0, 12), "edge": torch.arange(5), "data": [0, 1]}
    terms_grad, terms_ggn = dense_terms(problem, grad), dense_terms(problem, ggn_samples)
    G, g = ggn(terms_ggn), gradient(terms_grad)
    # Damped everywhere, the gradient need not lie in the range of G.
    truth = solved(G, g, 0.3)
    options = {"subsampling_grad": grad, "subsampling_ggn": ggn_samples}
    step = newton_step(*problem, 0.3, complement=0.3, **options)
    assert error(step, truth) < 1e-10
    step, info = newton_step_and_info(*problem, 0.3, complement=0.3, **options)
    assert error(step, truth) < 1e-10
    assert info.gammas.shape[0] == 7
    assert info.lambdas.shape[0] == 19
    # A term that is not named has all of its samples.
    some = newton_step(*problem, 0.3, subsampling_ggn={"inside": slice(0, 12)})
    every = {"inside": slice(0, 12), "edge": slice(None), "data": None}
    assert error(some, flat(newton_step(*problem, 0.3, subsampling_ggn=every))) < 1e-12


@pytest.mark.parametrize("width", [4, 16])
def test_curvatures_of_unseen_samples(width):
    problem = physics(width)
    seen = {"inside": [0, 1, 2], "edge": [4, 5], "data": [0]}
    unseen = {"inside": [2, 9, 10, 11], "edge": [4, 1], "data": [3, 2, 1]}
    _, info = newton_step_and_info(
        *problem, 0.1, select=top_k(2), subsampling_ggn=seen, subsampling_curvature=unseen
    )
    _, vectors = torch.linalg.eigh(ggn(dense_terms(problem, seen)))
    G = ggn(dense_terms(problem, unseen))
    expected = torch.einsum("dk,de,ek->k", vectors[:, -2:], G, vectors[:, -2:])
    assert info.lambdas.shape[0] == 9
    assert error(info.lambdas.mean(0), expected) < 1e-10


def test_curvature_of_single_terms_may_be_another():
    """One term's empirical Fisher matrix, another's sampled, the third's exact."""
    problem = mixed()
    fisher = problem._replace(
        criterion=problem.criterion | {"classes": empirical_fisher(nn.CrossEntropyLoss())}
    )
    terms = dense_terms(problem)
    rows = terms["classes"].gradients
    G = rows.T @ rows / len(rows) + terms["values"].ggn
    truth = solved(G, gradient(terms), 0.2)
    assert error(newton_step(*fisher, 0.2, complement=0.2), truth) < 1e-10
    # Many draws come near the exact matrix.
    draws = monte_carlo(nn.CrossEntropyLoss(), 4000, torch.Generator().manual_seed(0))
    drawn = problem._replace(criterion=problem.criterion | {"classes": draws})
    exact = solved(ggn(terms), gradient(terms), 0.2)
    assert error(newton_step(*drawn, 0.2, complement=0.2), exact) < 0.05


def test_one_criterion_may_serve_all():
    problem = physics(16)
    one = problem._replace(criterion=nn.MSELoss())
    several = problem._replace(criterion=dict.fromkeys(problem.model_fn, nn.MSELoss()))
    assert error(newton_step(*one, 0.1), flat(newton_step(*several, 0.1))) < 1e-12


def test_a_term_may_be_of_a_batch_that_divides_by_its_targets():
    """A criterion whose samples have no losses of their own, beside one whose samples do."""
    problem = physics(16)
    w = torch.linspace(1, 2, 9)[:, None].double()
    ratio = lambda f, y: (w * (f - y) ** 2).sum() / w.sum()  # noqa: E731
    terms = dense_terms(problem._replace(criterion=problem.criterion | {"edge": ratio}))
    edge = reference.dense(
        problem.model_fn["edge"], problem.params, problem.X["edge"], problem.y["edge"], ratio
    )
    terms["edge"] = edge
    joint = problem._replace(criterion=problem.criterion | {"edge": ratio})
    truth = solved(ggn(terms), gradient(terms), 0.1)
    assert error(newton_step(*joint, 0.1), truth) < 1e-10


def test_rows_of_one_term_are_the_same_loss():
    """Way (g): rows of a point, its kind and the root of its weight, without any dict."""
    problem = physics(16)
    numbers = {name: len(x) for name, x in problem.X.items()}
    total = sum(numbers.values())
    weights = {"inside": 1.0, "edge": 10.0, "data": 4.0}
    rows = []
    for kind, (name, x) in enumerate(problem.X.items()):
        root = (weights[name] * total / numbers[name]) ** 0.5
        extra = torch.tensor([kind, root], dtype=torch.float64).expand(len(x), 2)
        rows.append(torch.cat([x, extra, problem.y[name]], 1))

    def one_function(p, X):
        x, kind, root, y = X[:, :2], X[:, 2:3], X[:, 3:4], X[:, 4:]
        inside, value = problem.model_fn["inside"](p, x), problem.model_fn["edge"](p, x)
        return root * (torch.where(kind == 0, inside, value) - y)

    X = torch.cat(rows)
    step, info = newton_step_and_info(
        one_function, problem.params, X, torch.zeros(total, 1).double(), nn.MSELoss(), 0.1
    )
    of_terms, of_terms_info = newton_step_and_info(*problem, 0.1)
    assert error(of_terms, flat(step)) < 1e-9
    assert error(of_terms_info.loss, info.loss) < 1e-12
    assert error(of_terms_info.evals, info.evals) < 1e-9


# --- layers that two terms see in different ways --------------------------------------------------


def seen_in_different_ways() -> dict[str, Any]:
    def transposed(p, x):
        return F.linear(F.linear(x, p["W"]).tanh(), p["V"]) + p["b"]

    def by_einsum(p, x):
        return torch.einsum("no,ko->nk", torch.tanh(x @ p["W"].mT), p["V"]) + p["b"]

    def twice(p, x):
        return torch.tanh(torch.tanh(x @ p["W"].T) @ p["W"][:, :3] + x @ p["W"].T[:, :3])

    def in_parts(p, x):
        top, bottom = p["W"].chunk(2)
        hidden = torch.cat([x @ top.T, x @ bottom.T], 1).tanh()
        return hidden @ p["V"].T * p["b"].exp()

    def columns(p, x):
        return (p["W"] @ x.T).T.tanh() @ p["V"].reshape(6, 2).T.reshape(6, 2)

    return {
        "transposed": transposed,
        "by_einsum": by_einsum,
        "twice": twice,
        "in_parts": in_parts,
        "columns": columns,
    }


@pytest.mark.parametrize("first", seen_in_different_ways())
@pytest.mark.parametrize("second", seen_in_different_ways())
def test_factors_of_two_models_are_lined_up(first, second):
    torch.manual_seed(3)
    params = {
        "W": torch.randn(6, 3).double(),
        "V": torch.randn(2, 6).double(),
        "b": torch.randn(2).double(),
    }
    ways = seen_in_different_ways()
    model_fn = {"first": ways[first], "second": ways[second]}
    X = {"first": torch.randn(3, 3).double(), "second": torch.randn(4, 3).double()}
    y = {name: torch.randn_like(f(params, X[name])) for name, f in model_fn.items()}
    problem = Problem(model_fn, params, X, y, dict.fromkeys(model_fn, nn.MSELoss()))
    terms = {
        name: reference.dense(f, params, X[name], y[name], nn.MSELoss())
        for name, f in model_fn.items()
    }
    rows = [
        (term.jacobians * (2 / y[name].shape[1] / len(term.jacobians)) ** 0.5)
        .transpose(0, 1)
        .flatten(0, 1)
        for name, term in terms.items()
    ]
    rows = torch.cat(rows)
    assert error(gram_matrix(*problem, gram="structured"), rows @ rows.T) < 1e-12
    truth = solved(ggn(terms), gradient(terms), 0.1)
    assert error(newton_step(*problem, 0.1, gram="structured"), truth) < 1e-9
    assert error(newton_step(*problem, 0.1, gram="structured", chunk_size=2), truth) < 1e-9
    ways = {"first": "dense", "second": "structured"}
    assert error(newton_step(*problem, 0.1, gram=ways), truth) < 1e-9


# --- what is composed with it ---------------------------------------------------------------------


def test_an_ensemble_under_vmap():
    problem = mixed()
    ensemble = {name: torch.stack([p, 0.5 * p, -p]) for name, p in problem.params.items()}
    step_of = lambda params: newton_step(*problem._replace(params=params), 0.1)  # noqa: E731
    steps = vmap(step_of)(ensemble)
    for member in range(3):
        own = {name: p[member] for name, p in ensemble.items()}
        truth = flat(step_of(own))
        assert error({name: s[member] for name, s in steps.items()}, truth) < 1e-9


def test_float32():
    problem = physics(16)
    terms = dense_terms(problem)
    narrow = Problem(
        problem.model_fn,
        *({name: leaf.float() for name, leaf in part.items()} for part in problem[1:4]),
        problem.criterion,
    )
    step = newton_step(*narrow, 0.1)
    assert error(step, solved(ggn(terms), gradient(terms), 0.1)) < 1e-5
    assert all(leaf.dtype == torch.float32 for leaf in step.values())


def test_a_prepared_dict_is_a_dict_of_prepared_models():
    problem = physics(16)
    prepared = prepare(*problem[:3])
    assert list(prepared) == list(problem.model_fn)
    again = prepare(prepared, problem.params, problem.X)
    assert all(again[name] is function for name, function in prepared.items())
