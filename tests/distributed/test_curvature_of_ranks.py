"""Curvature and uncertainty of samples that are on several ranks are those of the whole batch."""

import pytest
import torch
from torch import nn

from ddnewton import (
    Group,
    covariance,
    directional_derivatives,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    monte_carlo,
    standard_errors,
    top_k,
)
from tests.distributed.split_problems import (
    assert_all_raise,
    assert_close,
    assert_same_bits,
    curve,
    group_of,
    inputs,
    jacobian,
    labels,
    normal,
    own,
    params,
    slope,
    targets,
)

WIDE = {"W": normal(1, 3, 40), "b": normal(2, 40), "V": normal(3, 40, 2)}
TERMS = {"values": inputs(), "slopes": inputs()[:13]}
OF_TERMS = {"values": targets(), "slopes": normal(9, 13, 3)}


def wide(p, x):
    return torch.tanh(x @ p["W"] + p["b"]) @ p["V"]


def of_terms(tree, rank, size):
    """One term on all ranks, the other one on the first alone."""
    whole = size == 1
    return {
        "values": own(tree["values"], rank, size),
        "slopes": tree["slopes"] if whole or rank == 0 else tree["slopes"][:0],
    }


def drawing():
    return monte_carlo(nn.CrossEntropyLoss(), 2, torch.Generator().manual_seed(3))


CASES = {
    "few parameters": lambda: ((curve, params(), inputs(), targets(), nn.MSELoss()), {}),
    "few samples": lambda: ((wide, WIDE, inputs(), labels(), nn.CrossEntropyLoss()), {}),
    "layers": lambda: (
        (wide, WIDE, inputs(), labels(), nn.CrossEntropyLoss()),
        {"gram": "structured"},
    ),
    "dense": lambda: (
        (wide, WIDE, inputs(), targets(), nn.HuberLoss()),
        {"gram": "dense", "chunk_size": 2},
    ),
    "some samples": lambda: (
        (wide, WIDE, inputs(), targets(), nn.MSELoss()),
        {"subsampling_ggn": [20, 3, 11, 4, 19]},
    ),
    "groups": lambda: (
        (wide, WIDE, inputs(), labels(), nn.CrossEntropyLoss()),
        {"groups": [Group(["V"]), Group(["W", "b"])]},
    ),
    "draws": lambda: ((wide, WIDE, inputs(), labels(), drawing()), {}),
    "two terms": lambda: (
        (
            {"values": curve, "slopes": slope},
            params(),
            TERMS,
            OF_TERMS,
            nn.MSELoss(),
        ),
        {},
    ),
}


def curvature(rank, name, size):
    """The four computations, on the samples of a rank."""
    (model_fn, p, X, y, _), options = CASES[name]()
    split = of_terms if isinstance(X, dict) else own
    X, y = split(X, rank, size), split(y, rank, size)
    options |= {"process_group": group_of(size)}

    def results(function, **more):
        # A new generator for each of them, where there is one.
        criterion = CASES[name]()[0][4]
        return function(model_fn, p, X, y, criterion, **options, **more)

    return {
        "evals": results(ggn_eigvalsh),
        "gram": results(gram_matrix),
        "pairs": results(ggn_eigh, select=top_k(3)),
        "derivatives": results(directional_derivatives, select=top_k(3)),
    }


def without_signs(results):
    """Eigenvectors and slopes along them have an arbitrary sign."""
    pairs, derivatives = results["pairs"], results["derivatives"]
    if not isinstance(pairs[0], tuple):
        pairs, derivatives = (pairs,), (derivatives,)
    vectors = [{key: part.abs() for key, part in evecs.items()} for _, evecs in pairs]
    gammas = [of_block.gammas.abs() for of_block in derivatives]
    lambdas = [of_block.lambdas for of_block in derivatives]
    evals = [of_block for of_block, _ in pairs]
    return results["evals"], results["gram"], evals, vectors, gammas, lambdas


@pytest.mark.parametrize("name", CASES)
def test_curvature_is_that_of_the_whole_batch(name, four):
    results = four.results(curvature, name, 4)
    assert_same_bits(results)
    assert_close(without_signs(results[0]), without_signs(curvature(0, name, 1)), 1e-11)


def test_eigenvalues_and_gram_matrix_are_those_of_the_jacobian(two):
    results = two.results(curvature, "few parameters", 2)[0]
    # Mean squared errors of two outputs: their Hessian is the identity.
    columns = jacobian(params()).transpose(0, 1).flatten(0, 1) / 24**0.5
    torch.testing.assert_close(results["gram"], columns @ columns.mT, rtol=0, atol=1e-14)
    evals = torch.linalg.eigvalsh(columns.mT @ columns)
    torch.testing.assert_close(results["evals"][-8:], evals, rtol=0, atol=1e-14)


def uncertain(rank, size, function, redundant=False, **options):
    """The covariance or the standard errors of parameters, on the samples of a rank."""
    p = params() | ({"idle": torch.ones(1, dtype=torch.float64)} if redundant else {})
    of_rank = own(inputs(), rank, size), own(targets(), rank, size)
    return function(curve, p, *of_rank, process_group=group_of(size), **options)


@pytest.mark.parametrize("absolute_sigma", [False, True])
def test_covariance_is_that_of_the_jacobian(absolute_sigma, four):
    results = four.results(with_sigma, absolute_sigma, covariance)
    assert_same_bits(results)
    # s² (JᵀJ)⁻¹ of all residuals; with weights of one the mean of two squares has half of them.
    p, J = params(), jacobian(params()).flatten(0, 1)
    squares = (curve(p, inputs()) - targets()).square().sum()
    reference = torch.linalg.inv(J.mT @ J) * (1 if absolute_sigma else squares / (48 - 8))
    rows = [[results[0][a][b].reshape(p[a].numel(), -1) for b in p] for a in p]
    computed = torch.cat([torch.cat(row, 1) for row in rows])
    torch.testing.assert_close(computed, reference, rtol=1e-11, atol=1e-14)
    errors = four.results(with_sigma, absolute_sigma, standard_errors)
    assert_same_bits(errors)
    flat = torch.cat([errors[0][name].flatten() for name in p])
    torch.testing.assert_close(flat, reference.diagonal().sqrt(), rtol=1e-11, atol=0)


def with_sigma(rank, absolute_sigma, function):
    return uncertain(rank, 4, function, absolute_sigma=absolute_sigma)


def infinite(rank):
    return uncertain(rank, 2, standard_errors, redundant=True)


def test_an_infinite_covariance_is_said_by_the_first_rank(two):
    outcomes = two.run(infinite)
    assert_same_bits([outcome.value for outcome in outcomes])
    assert all(part.isinf().all() for part in outcomes[0].value.values())
    assert "data do not determine params['idle'][0]" in outcomes[0].warnings[0]
    assert outcomes[1].warnings == ()


def with_bad_sigma(rank, values):
    return uncertain(rank, 2, covariance, absolute_sigma=values[rank])


def freely(rank):
    return uncertain(rank, 2, covariance, gram="free")


def test_what_one_rank_refuses_all_refuse(two):
    rule = "absolute_sigma must be True or False"
    outcomes = two.run(with_bad_sigma, [True, 1])
    assert_all_raise(outcomes, "BadType", "covariance: rank 1: ", rule)
    outcomes = two.run(with_bad_sigma, [True, False])
    rule = "absolute_sigma must be the same on all ranks; got True on rank 0, False on rank 1"
    assert_all_raise(outcomes, "BadValue", rule)
    assert_all_raise(two.run(freely), "BadValue", "a covariance needs the matrix itself")
