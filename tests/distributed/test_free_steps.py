"""By products, samples on several ranks give what they give on one, the same on all ranks."""

from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from ddnewton import (
    Group,
    above,
    held_out,
    levenberg_marquardt,
    spring,
    top_k,
)
from ddnewton.damping import signal_to_noise
from ddnewton.quadratic.matrix_free.free_model import FreeModel
from ddnewton.trees import as_real, tree_map
from tests.distributed.free_cases import (
    CASES,
    LABELS,
    MISSING,
    PARAMS,
    REAL,
    SAMPLES,
    Given,
    N,
    X,
    bent_squares,
    by_products_alone,
    complex_squares,
    constant_net,
    cut,
    drawn,
    fails_on_one,
    log_coshes,
    net,
    observed,
    of_complex,
    once,
    pairs_told,
    parts_of,
    refined,
    squared,
    told,
    updated,
    valid_mean,
    valid_squares,
    weighted_squares,
    where_nothing_fits,
    with_layers,
)
from tests.reference import dense, error, solve

BOUNDS = {"one": [0, N], "two": [0, 7, N], "four": [0, 0, 5, 6, N]}
"""No sample on the rank that leads four, and one on a rank."""

SMALL = 1e-12
FREE = {"gram": "free", "tol": 1e-20}


def bits(tree):
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return [x.resolve_conj().numpy().tobytes() for x in tensors]


def on_ranks(pool, function, *args, X=X, y=REAL, bounds=None):
    """The result of a function on all ranks, which is the same to the bit."""
    name = {1: "one", 2: "two", 4: "four"}[pool.size]
    bounds = BOUNDS[name] if bounds is None else bounds
    parts = zip(cut(X, bounds), cut(y, bounds), strict=True)
    results = pool.results(function, *args, each=list(parts))
    assert all(bits(result) == bits(results[0]) for result in results)
    return results[0]


def check_observed(pool, name, options, bounds):
    """Compare what ranks make of a case with what one process makes of it."""
    (numbers, facts), _ = observed(0, name, options, X, CASES[name].y, alone=True)
    results = pool.results(observed, name, options, each=parts_of(name, bounds))
    found, _ = results[0][0]
    assert all(bits(of_rank) == bits(found) for (of_rank, _), _ in results)
    assert all(of_rank == facts for (_, of_rank), _ in results)
    assert found.keys() == numbers.keys()
    for key, number in numbers.items():
        if bool(number.isfinite().all()):
            assert error(found[key], number) < SMALL, key
        else:
            assert torch.equal(found[key], number), key
    return [sent for _, sent in results]


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_products_of_every_criterion(name, four):
    sent = check_observed(four, name, {}, BOUNDS["four"])
    # What has an entry for every output does not travel but where it has to.
    assert any("outputs" in of_rank for of_rank in sent) != CASES[name].there


@pytest.mark.parametrize("name", ["squares", "weighted mean", "drawn sequences"])
@pytest.mark.parametrize("size", ["one", "two"])
def test_products_of_other_numbers_of_ranks(name, size, request):
    check_observed(request.getfixturevalue(size), name, {}, BOUNDS[size])


@pytest.mark.parametrize("name", ["classes", "weighted mean", "drawn classes"])
@pytest.mark.parametrize("samples", [samples for samples in SAMPLES if samples != "all"])
def test_products_of_parts_of_the_samples(name, samples, four):
    check_observed(four, name, SAMPLES[samples], BOUNDS["four"])


@settings(max_examples=10, deadline=None)
@given(
    cuts=st.lists(st.integers(0, N), min_size=3, max_size=3),
    name=st.sampled_from(["classes", "drawn squares", "valid mean"]),
    samples=st.sampled_from(list(SAMPLES)),
    chunk_size=st.sampled_from([None, 2]),
)
def test_any_split_is_the_whole_batch(four, cuts, name, samples, chunk_size):
    options = SAMPLES[samples] | {"chunk_size": chunk_size}
    check_observed(four, name, options, [0, *sorted(cuts), N])


def test_a_product_is_one_sum_of_vectors_as_long_as_the_parameters(four):
    (*_, sent), d = check_observed(four, "squares", {}, BOUNDS["four"]), 28
    # Three vectors twice, the gradient, curvatures, and two vectors of columns twice: with each a
    # number that tells of failures.
    counts = 3 * d + 1, 3 * d + 1, d + 1, 3 + 1, 3 * d + 1, 2 * d + 1
    assert sent["products"] == 8 * sum(counts)


# --- steps ---------------------------------------------------------------------------------------

OPTIONS = {
    "number": {"damping": 0.1, "complement": 0.1},
    "undamped": {"damping": 0.0, "tol": 1e-13},
    "leading": {"damping": 0.1, "select": top_k(3)},
    "leading and others": {"damping": 0.1, "select": top_k(3), "complement": 0.3},
    "above": {"damping": 0.1, "select": above(1e-2)},
    "rule": {"damping": signal_to_noise()},
    "groups": {
        "damping": 0.1,
        "groups": [Group(["a"], damping=0.2), Group(["b"], select=top_k(2))],
    },
    "one scale": {"damping": 0.1, "scale": 3.0},
    "scales": {"damping": 0.1, "scale": {"a": 2.0, "b": drawn(4, 4, seed=9).abs() + 0.1}},
    "chunks": {"damping": 0.1, "chunk_size": 2},
    "samples": {"damping": 0.1, "complement": 0.1, **SAMPLES["gradient"]},
    "curvatures": {"damping": 0.1, "select": top_k(2), **SAMPLES["curvatures"]},
}


def check_told(pool, given, options, X=X, y=REAL, tolerance=1e-9):
    """Compare a step and its record with those of one process."""
    expected = told(0, given, FREE | options, X, y, alone=True)
    step, info = on_ranks(pool, told, given, FREE | options, X=X, y=y)
    assert error(as_real(step), as_real(expected[0])) < tolerance
    records = zip(info, expected[1], strict=True) if "groups" in options else [(info, expected[1])]
    for record, other in records:
        for field in ("loss", "losses", "evals", "gradient_norm", "dampings", "rank", "flat_share"):
            # Dampings may be infinite.
            parts = (getattr(x, field) for x in (record, other))
            parts = (
                part if isinstance(part, dict) else part.nan_to_num(posinf=-1) for part in parts
            )
            assert error(*parts) < tolerance, field
        assert record.evals.dtype == other.evals.dtype
        assert error(record.gammas.square(), other.gammas.square()) < 1e2 * tolerance
        assert error(record.lambdas, other.lambdas) < 1e2 * tolerance
        assert bool(record.lost.isnan()) == bool(other.lost.isnan())
    return step


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_with_every_option(name, four):
    given = Given(net, PARAMS, nn.CrossEntropyLoss)
    check_told(four, given, OPTIONS[name], y=LABELS, tolerance=1e-5 if name == "undamped" else 1e-8)


@pytest.mark.parametrize("size", ["one", "two", "four"])
def test_the_step_is_the_textbooks(size, request):
    step = check_told(
        request.getfixturevalue(size), Given(net, PARAMS, nn.MSELoss), {"damping": 0.1}
    )
    assert error(step, solve(dense(net, PARAMS, X, REAL, nn.MSELoss()), 0.1)) < 1e-10


TERMS = {"there": net, "here": squared}


@pytest.mark.parametrize("select", [None, top_k(4)], ids=["number", "leading"])
def test_terms_whose_losses_are_there_and_here(select, four):
    """Other numbers of samples, on other ranks, and columns of one beside those of the other."""
    both = {"there": X, "here": X[:7]}, {"there": REAL, "here": MISSING[2:9]}
    make = partial(dict, there=nn.MSELoss(), here=valid_mean)
    bounds = {"there": [0, 0, 5, 6, N], "here": [0, 3, 3, 7, 7]}
    parts = [
        tuple({name: of[name][slice(*bounds[name][rank : rank + 2])] for name in of} for of in both)
        for rank in range(4)
    ]
    given = Given(TERMS, PARAMS, make)
    options = FREE | {"damping": 0.1, "complement": 0.1, "select": select}
    options["subsampling_grad"] = {"there": [11, 2], "here": [6, 0, 3]}
    step, info = told(0, given, options, *both, alone=True)
    for result, record in four.results(told, given, options, each=parts):
        assert error(result, step) < 1e-9
        assert record.losses.keys() == info.losses.keys()
        assert error(record.losses, info.losses) < SMALL
        assert error(record.gammas.square(), info.gammas.square()) < 1e-8


@pytest.mark.parametrize("name", ["classes", "weighted mean"])
def test_eigenpairs_and_derivatives(name, four):
    given, y = Given(net, PARAMS, CASES[name].make), CASES[name].y
    if name == "weighted mean":
        given = given._replace(make=weighted_squares)
    groups = [Group(["a"], select=top_k(2)), Group(["b"], select=top_k(3))]
    options = {"tol": 1e-8, "groups": groups}
    eigenpairs, derivatives = on_ranks(four, pairs_told, given, options, y=y)
    others, expected = pairs_told(0, given, options, X, y, alone=True)
    for (evals, vectors), (of_one, vectors_of_one) in zip(eigenpairs, others, strict=True):
        assert error(evals, of_one) < 1e-9
        assert error(tree_map(torch.abs, vectors), tree_map(torch.abs, vectors_of_one)) < 1e-7
    for (gammas, lambdas), (gammas_of_one, lambdas_of_one) in zip(
        derivatives, expected, strict=True
    ):
        assert error(gammas.abs(), gammas_of_one.abs()) < 1e-7
        assert error(lambdas, lambdas_of_one) < 1e-7


def test_complex_parameters_and_outputs(four):
    params = {"c": torch.complex(drawn(3, 2, seed=1), drawn(3, 2, seed=2)), "r": drawn(2, seed=3)}
    y = torch.complex(drawn(N, 2, seed=4), drawn(N, 2, seed=5))
    check_told(four, Given(of_complex, params, complex_squares), {"damping": 0.1}, y=y)


@pytest.mark.parametrize("make", [nn.MSELoss, valid_squares], ids=["there", "here"])
def test_narrow_products_are_refined_on_all_ranks(make, two):
    """To more digits than float32 has, at a damping that needs them."""
    narrow = tree_map(torch.Tensor.float, (PARAMS, X, REAL if make is nn.MSELoss else MISSING))
    params, inputs, y = narrow
    given, options = Given(net, params, make), {"gram": "free", "tol": 1e-10, "damping": 1e-4}
    step, info = on_ranks(two, refined, given, options, X=inputs, y=y)
    assert float(info.lost) <= 1e-10
    wide = tree_map(torch.Tensor.double, narrow)
    options["tol"] = 1e-20
    exact = told(0, Given(net, wide[0], make), options, *wide[1:], alone=True)[0]
    assert error(step, exact) < 1e-3
    # Without it there is no such step.
    options["tol"] = 1e-10
    with mock.patch.object(FreeModel, "in_float64", return_value=None):  # noqa: SIM117
        with pytest.warns(UserWarning, match="the step has not converged"):
            _, coarse = refined(0, given, options, inputs, y, alone=True)
    assert float(coarse.lost) > 1e-10


def test_a_prepared_model(four):
    given, options = Given(net, PARAMS, nn.MSELoss), FREE | {"damping": 0.1}
    step, _ = on_ranks(four, with_layers, given, options)
    assert error(step, told(0, given, options, X, REAL, alone=True)[0]) < 1e-9


def test_hessians_that_are_known_by_products(four):
    given, options = Given(net, PARAMS, CASES["function"].make), FREE | {"damping": 0.1}
    given = given._replace(make=log_coshes)
    step, _ = on_ranks(four, by_products_alone, given, options)
    assert error(step, told(0, given, options, X, REAL, alone=True)[0]) < 1e-9


def test_what_does_not_fit_goes_on_by_products(four):
    given, options = Given(net, PARAMS, nn.MSELoss), {"damping": 0.1, "tol": 1e-20}
    parts = zip(cut(X, BOUNDS["four"]), cut(REAL, BOUNDS["four"]), strict=True)
    outcomes = four.run(where_nothing_fits, given, options, each=list(parts))
    assert [outcome.error for outcome in outcomes] == [None] * 4
    # One rank says so.
    said = [[text for text in outcome.warnings if "going on" in text] for outcome in outcomes]
    assert [len(texts) for texts in said] == [1, 0, 0, 0]
    expected, _ = told(0, given, FREE | options, X, REAL, alone=True)
    assert all(error(outcome.value[0], expected) < 1e-9 for outcome in outcomes)
    assert all(int(outcome.value[1].products) > 0 for outcome in outcomes)


# --- updates -------------------------------------------------------------------------------------

UPDATES = {
    "number": {"damping": 0.1},
    "levenberg_marquardt": {"damping": levenberg_marquardt()},
    "spring": {"damping": spring()},
    "held_out": {"damping": held_out(every=2)},
    "exact momentum": {"damping": levenberg_marquardt(), "momentum": "exact"},
    "momentum and weight decay": {"damping": 0.1, "momentum": 0.5, "weight_decay": 0.01},
    "leading": {"damping": 0.1, "select": top_k(3), "complement": 0.5},
    "groups": {"damping": levenberg_marquardt(), "groups": [Group(["a"]), Group(["b"])]},
    "trust radius": {"damping": levenberg_marquardt(), "trust_radius": 0.05},
    "samples": {"damping": levenberg_marquardt(), **SAMPLES["gradient"]},
}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *(("squares", name) for name in UPDATES),
        ("valid mean", "samples"),
    ],
)
def test_updates(case, name, four):
    given = Given(net, PARAMS, nn.MSELoss if case == "squares" else valid_squares)
    y, options = CASES[case].y, UPDATES[name]
    params, infos = on_ranks(four, updated, given, options, y=y)
    others, expected = updated(0, given, options, X, y, alone=True)
    for info, other in zip(infos, expected, strict=True):
        for field in ("loss", "loss_after", "damping", "gradient_norm", "predicted_decrease"):
            assert error(info[field], other[field]) < 1e-5, field
        assert info["accepted"] == other["accepted"]
    assert error(params, others) < 1e-5


# --- what is refused -----------------------------------------------------------------------------


def errors(pool, function, given, options, X=X, y=REAL):
    parts = zip(cut(X, BOUNDS["four"]), cut(y, BOUNDS["four"]), strict=True)
    return [outcome.error for outcome in pool.run(function, given, options, each=list(parts))]


def check_refused(pool, function, given, kind, message, y=REAL):
    """One error on all ranks, which can make a step afterwards."""
    found = errors(pool, function, given, FREE | {"damping": 0.1}, y=y)
    assert len({text for _, text in found}) == 1
    assert message in found[0][1]
    assert {name for name, _ in found} <= {kind, "BadValue"}


def test_outputs_that_are_not_finite_on_one_rank(four):
    assert (X[:, 0] > 1.5).nonzero().tolist() == [[3]]
    check_refused(
        four, told, Given(fails_on_one, PARAMS, nn.MSELoss), "NotFinite", "rank 1: the outputs"
    )


def test_a_model_without_parameters(four):
    given = Given(constant_net, PARAMS, nn.MSELoss)
    check_refused(four, told, given, "Independent", "model_fn must use params", y=REAL[:, :1])


@pytest.mark.parametrize("make", [nn.MSELoss, valid_squares], ids=["there", "here"])
def test_a_model_that_is_differentiated_once(make, four):
    y = REAL if make is nn.MSELoss else MISSING
    given, message = Given(once, PARAMS, make), "rank 1: model_fn must be differentiable"
    check_refused(four, told, given, "BadValue", message, y=y)


def test_targets_that_fit_no_output(four):
    given = Given(net, PARAMS, nn.CrossEntropyLoss)
    check_refused(
        four, told, given, "BadValue", "must lie in 0 to 3", y=LABELS + (LABELS == 3).long()
    )


def test_no_target_that_counts_on_any_rank(four):
    given = Given(net, PARAMS, partial(nn.CrossEntropyLoss, ignore_index=0))
    check_refused(four, told, given, "NoTargets", "a weighted mean needs a target", y=0 * LABELS)


@pytest.mark.parametrize("function", [told, by_products_alone], ids=["matrices", "products"])
def test_a_loss_that_is_not_convex_on_one_rank(function, four):
    y = torch.where(torch.arange(N)[:, None] == 8, 2.0, 0.0).double()
    given = Given(net, PARAMS, bent_squares)
    check_refused(four, function, given, "NotConvex", "criterion must be convex", y=y)
