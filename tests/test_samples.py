"""Slopes, directions and curvatures from samples of the batch, against the textbook."""

import copy
import math
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import (
    above,
    directional_derivatives,
    empirical_fisher,
    energy,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
)
from models import PROBLEMS, Problem, cast, normal, problem
from reference import (
    Dense,
    dense,
    eigenpairs,
    error,
    flat,
    rank,
    softmax_derivatives,
    solve,
)

FLOAT32, FLOAT64 = torch.float32, torch.float64
TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
OPTIONS = ("subsampling_grad", "subsampling_ggn", "subsampling_curvature")

SMALL_AND_LARGE = ["relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points"]
"""Problems with fewer and with more columns NM than parameters D, with both kinds of M."""

SUBSETS = {
    "every": None,
    "two": [0, 1],
    "permuted": [3, 0, 4, 2, 1],
    "single": [2],
    "whole": "all of the batch, in order",
    "negative": [-1, -3],
}
"""Every problem below has at least five samples."""


class Choice(NamedTuple):
    """Samples for the slopes, the directions and the curvatures."""

    grad: object = None
    ggn: object = None
    curvature: object = None

    @property
    def options(self) -> dict:
        given = zip(OPTIONS, self, strict=True)
        return {name: subset for name, subset in given if subset is not None}

    @property
    def of_the_ggn(self) -> dict:
        return {} if self.ggn is None else {"subsampling_ggn": self.ggn}


class Truth(NamedTuple):
    """Along the vectors that `ggn_eigh` returns, which must be what they say they are."""

    evals: torch.Tensor
    vectors: torch.Tensor
    gammas: torch.Tensor
    lambdas: torch.Tensor
    gradient: torch.Tensor
    ggn: torch.Tensor

    def step(self, dampings, complement=None) -> torch.Tensor:
        c, P = self.coefficients(dampings), self.vectors @ self.vectors.mT
        rest = self.gradient - P @ self.gradient
        return self.vectors @ c - (0 if complement is None else rest / complement)

    def coefficients(self, dampings) -> torch.Tensor:
        damped = self.lambdas.mean(0) + dampings
        return torch.where(damped > 0, -self.gammas.mean(0) / damped, 0)


@cache
def whole(name: str) -> Dense:
    """The dense reference of a problem: N times the derivatives of the loss of the batch."""
    return dense(*problem(name))


def some(reference: Dense, subset) -> Dense:
    """The same samples' losses, at the scale they have in the whole batch, and no others."""
    if subset is None:
        return reference
    index = torch.as_tensor(subset)
    parts = (part[index] for part in reference[1:])
    return Dense(reference.loss, *parts)


def rows(evecs) -> torch.Tensor:
    """The vectors of a pytree with K in front, [D, K] in float64."""
    vectors = [leaf.double().reshape(len(leaf), leaf.sum(0).numel()) for leaf in tree_leaves(evecs)]
    return torch.cat(vectors, 1).mT


def along(reference: Dense, E, choice: Choice, evals) -> Truth:
    """What the textbook says of the samples along some vectors."""
    slopes, curved = some(reference, choice.grad), choice.curvature
    held = some(reference, choice.ggn if curved is None else curved)
    changes = held.jacobians @ E
    return Truth(
        evals=evals,
        vectors=E,
        gammas=slopes.gradients @ E,
        lambdas=torch.einsum("nck,ncd,ndk->nk", changes, held.hessians, changes),
        gradient=slopes.gradient,
        ggn=some(reference, choice.ggn).ggn,
    )


def truth_of(given: Problem, reference: Dense, choice: Choice, tolerance=1e-10, **options) -> Truth:
    """Check the vectors that ddnewton says it takes, and take them for the reference."""
    evals, evecs = ggn_eigh(*given, **choice.of_the_ggn, **options)
    E, mine = rows(evecs), some(reference, choice.ggn)
    if options.get("select") is None:
        assert len(evals) == rank(eigenpairs(mine)[0])
    assert error(E.mT @ E, torch.eye(E.shape[1], dtype=FLOAT64)) < tolerance
    assert error(mine.ggn @ E, E * evals.double()) < tolerance
    return along(reference, E, choice, evals)


def check_info(info, expected: Truth, delta: float, reference: Dense, tolerance: float) -> None:
    """Every field, from the textbook's numbers alone."""
    gamma, curvature = expected.gammas.mean(0), expected.lambdas.mean(0)
    c = expected.coefficients(delta)
    fields = {
        "loss": reference.loss,
        "evals": expected.evals,
        "gammas": expected.gammas,
        "lambdas": expected.lambdas,
        "dampings": torch.full_like(c, delta),
        "coefficients": c,
        "predicted_decrease": -c * gamma - curvature * c**2 / 2,
        "gradient_norm": expected.gradient.norm(),
        "gradient_share": gamma.square().sum() / expected.gradient.square().sum(),
    }
    for field, value in fields.items():
        assert error(getattr(info, field), value) < tolerance, field
    assert info.rank.dtype == torch.int64


def numbers(subset, name: str):
    """A subset with a word for all samples spelled out."""
    return list(range(len(whole(name).slopes))) if isinstance(subset, str) else subset


def refuse(*_):
    raise AssertionError("the other way was to be taken")


def no_forward_mode(*_):
    raise NotImplementedError("no forward mode")


# --- every choice of samples ----------------------------------------------------------------


@pytest.mark.parametrize("ggn", SUBSETS)
@pytest.mark.parametrize("grad", SUBSETS)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_every_choice_of_samples(name, grad, ggn):
    given, reference = problem(name), whole(name)
    order = list(SUBSETS)  # a Latin square: every pair of two options is there
    curvature = SUBSETS[order[(order.index(grad) + order.index(ggn)) % len(order)]]
    choice = Choice(*(numbers(x, name) for x in (SUBSETS[grad], SUBSETS[ggn], curvature)))
    expected = truth_of(given, reference, choice)
    step, info = newton_step_and_info(*given, 0.1, **choice.options)
    check_info(info, expected, 0.1, reference, 1e-9)
    assert error(step, expected.step(0.1)) < 1e-9
    assert error(newton_step(*given, 0.1, **choice.options), expected.step(0.1)) < 1e-9
    pair = directional_derivatives(*given, **choice.options)
    assert error(pair.gammas, expected.gammas) < 1e-9
    assert error(pair.lambdas, expected.lambdas) < 1e-9
    both = newton_step(*given, 0.1, complement=0.3, **choice.options)
    assert error(both, expected.step(0.1, complement=0.3)) < 1e-9


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_exact_solution_of_every_model(name, dtype):
    """With one damping everywhere, −(G + δI)⁻¹g with the G of some samples and the g of others."""
    given, reference = problem(name, dtype), whole(name)
    choices = [(None, [0, 2]), ([-1, 0], [-1]), ([0], [2])]
    for grad, ggn in choices if name != "one_sample" else [([0], [0])]:
        G, g = some(reference, ggn).ggn, some(reference, grad).gradient
        expected = -torch.linalg.solve(G + 0.1 * torch.eye(len(g), dtype=FLOAT64), g)
        options = Choice(grad, ggn).options
        result = newton_step(*given, 0.1, complement=0.1, **options)
        assert error(result, expected) < TOLERANCE[dtype]
        for leaf, s in zip(tree_leaves(given.params), tree_leaves(result), strict=True):
            assert (s.shape, s.dtype) == (leaf.shape, leaf.dtype)
        if dtype == FLOAT64 and name in SMALL_AND_LARGE:
            for way in ({"gram": "structured"}, {"gram": "dense", "chunk_size": 1}):
                again = newton_step(*given, 0.1, complement=0.1, **options, **way)
                assert error(again, expected) < 1e-10, way


@pytest.mark.parametrize("name", PROBLEMS)
def test_held_out_curvature_of_every_model(name):
    """Few directions, many, and all of them; N, which is held out entirely, and some."""
    if name == "one_sample":
        return
    given, reference = problem(name), whole(name)
    for curvature, select in ((None, top_k(1)), ([1, 0], top_k(3)), ([-1], None)):
        choice = Choice([1], [0, 2], curvature)
        expected = truth_of(given, reference, choice, select=select)
        step, info = newton_step_and_info(*given, 0.1, select=select, **choice.options)
        check_info(info, expected, 0.1, reference, 1e-9)
        assert error(step, expected.step(0.1)) < 1e-9


LOSSES = {
    "cross-entropy": (F.cross_entropy, torch.tensor([0, 2, 1, 1, 0])),
    "ignored": (partial(F.cross_entropy, ignore_index=2), torch.tensor([0, 2, 1, 1, 0])),
    "probabilities": (F.cross_entropy, torch.full((5, 3), 1 / 3)),
    "mse": (F.mse_loss, torch.linspace(-1, 2, 15).reshape(5, 3)),
    "bce": (F.binary_cross_entropy_with_logits, torch.linspace(0, 1, 15).reshape(5, 3)),
    "huber": (partial(F.huber_loss, delta=4.0), torch.linspace(-1, 2, 15).reshape(5, 3)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_samples_keep_the_scale_they_have_in_the_whole_batch(loss, reduction):
    function, y = LOSSES[loss]
    criterion = partial(function, reduction=reduction)
    given = problem("relu_mlp")._replace(y=cast(y, FLOAT64), criterion=criterion)
    reference = dense(*given)
    for choice in (Choice([4, 1], [0, 3, 2], [1, 2]), Choice(None, [0, 2, 4]), Choice([2], [3])):
        for select in (None, top_k(2)):
            expected = truth_of(given, reference, choice, select=select)
            step, info = newton_step_and_info(*given, 0.1, select=select, **choice.options)
            check_info(info, expected, 0.1, reference, 1e-9)
            assert error(step, expected.step(0.1)) < 1e-9
        G = some(reference, choice.ggn).ggn
        evals = ggn_eigvalsh(*given, **choice.of_the_ggn)
        assert error(evals, torch.linalg.eigvalsh(G)[-len(evals) :]) < 1e-11
        gram = gram_matrix(*given, **choice.of_the_ggn)
        assert error(torch.linalg.eigvalsh(gram), evals) < 1e-11


@pytest.mark.parametrize("subset", [[0, 3], [2], [4, 1, 0]], ids=str)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_the_same_samples_everywhere_are_a_smaller_batch(name, subset):
    """A mean over some samples is the mean of the batch they make, for these losses."""
    given = problem(name)
    X, y = (tree_map(lambda x: x[subset], tree) for tree in (given.X, given.y))
    smaller = given._replace(X=X, y=y)
    options = dict.fromkeys(OPTIONS, subset)
    for keywords in ({}, {"select": top_k(1)}, {"complement": 0.2}):
        expected, info = newton_step_and_info(*smaller, 0.1, **keywords)
        for part in (options, dict(list(options.items())[:2])):
            step, mine = newton_step_and_info(*given, 0.1, **keywords, **part)
            assert error(step, expected) < 1e-11
            for field in ("evals", "lambdas", "predicted_decrease", "gradient_norm", "rank"):
                assert error(getattr(mine, field), getattr(info, field)) < 1e-10, field
    of_the_ggn = {"subsampling_ggn": subset}
    assert error(ggn_eigvalsh(*given, **of_the_ggn), ggn_eigvalsh(*smaller)) < 1e-11
    assert error(gram_matrix(*given, **of_the_ggn), gram_matrix(*smaller)) < 1e-11


@pytest.mark.parametrize("name", PROBLEMS)
def test_all_samples_by_number_are_all_samples(name):
    given = problem(name)
    everyone = range(len(whole(name).slopes))
    expected, info = newton_step_and_info(*given, 0.1)
    gammas, lambdas = directional_derivatives(*given)
    for option in OPTIONS:
        options = {option: everyone}
        step, mine = newton_step_and_info(*given, 0.1, **options)
        assert error(step, expected) < 1e-11
        assert error(newton_step(*given, 0.1, **options), expected) < 1e-11
        for field, found, value in zip(info._fields, mine, info, strict=True):
            assert error(found, value) < 1e-9, field
        pair = directional_derivatives(*given, **options)
        assert error(pair.gammas, gammas) < 1e-9
        assert error(pair.lambdas, lambdas) < 1e-9
    # In another order the rows are in that order, and nothing else changes.
    order = list(everyone)[::-1]
    for options in ({"subsampling_grad": order}, {"subsampling_curvature": order}):
        pair = directional_derivatives(*given, **options)
        turned = "subsampling_grad" in options
        assert error(pair.gammas, gammas.flip(0) if turned else gammas) < 1e-9
        assert error(pair.lambdas, lambdas if turned else lambdas.flip(0)) < 1e-9


FORMS = {
    "list": [3, 0],
    "tuple": (3, 0),
    "tensor": torch.tensor([3, 0]),
    "negative": torch.tensor([-2, -5]),
    "array": np.array([3, 0]),
    "numbers of an array": list(np.array([3, 0])),
    "tensors": [torch.tensor(3), torch.tensor(0)],
    "int32": torch.tensor([3, 0], dtype=torch.int32),
    "int8": torch.tensor([3, -5], dtype=torch.int8),
    "uint8": torch.tensor([3, 0], dtype=torch.uint8),
    "uint16 array": np.array([3, 0], dtype=np.uint16),
    "slice": slice(3, None, -3),
    "strided": torch.tensor([3, 9, 0])[::2],
}


@pytest.mark.parametrize("form", FORMS)
def test_indices_in_every_form(form):
    given = problem("relu_mlp")
    for option in OPTIONS:
        before = repr(FORMS[form])
        result = newton_step(*given, 0.1, **{option: FORMS[form]})
        assert error(result, newton_step(*given, 0.1, **{option: [3, 0]})) < 1e-13
        assert repr(FORMS[form]) == before
    for function in (ggn_eigvalsh, gram_matrix):
        result = function(*given, subsampling_ggn=FORMS[form])
        assert error(result, function(*given, subsampling_ggn=[3, 0])) < 1e-13
    ranged = directional_derivatives(*given, subsampling_grad=range(4, 0, -2))
    listed = directional_derivatives(*given, subsampling_grad=[4, 2])
    assert error(ranged, listed) < 1e-13


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8], ids=str)
def test_small_integers_index_a_large_batch(dtype):
    """From 128 samples on, N itself is no int8."""
    X = normal(300, 2).double()
    w = normal(2).double()
    given = Problem(lambda w, x: torch.tanh(x @ w), w, X, X[:, 0], nn.MSELoss())
    numbers = [100, 3] if dtype == torch.uint8 else [100, -3]
    subset = torch.tensor(numbers, dtype=dtype)
    for option in OPTIONS:
        expected = newton_step(*given, 0.1, **{option: numbers})
        assert error(newton_step(*given, 0.1, **{option: subset}), expected) < 1e-13


# --- steps with every other option ----------------------------------------------------------

KEYWORDS = {
    "top_k": {"select": top_k(3)},
    "permuted": {"select": lambda evals: [len(evals) - 2, len(evals) - 1]},
    "above": {"select": above(0.05)},
    "energy": {"select": energy(0.8)},
    "nothing": {"select": lambda evals: []},
    "complement": {"complement": 0.2},
    "both": {"select": top_k(2), "complement": 0.2},
}
CHOICES = {
    "grad": Choice(grad=[4, 1]),
    "ggn": Choice(ggn=[3, 0, 1]),
    "curvature": Choice(curvature=[2, 0]),
    "apart": Choice([1, 0], [2, 4], [3]),
    "overlapping": Choice([0, 1, 4], [1, 2, 0], [2, 3, 1]),
    "half unbiased": Choice([1, 4], [2, 0, 3], [1, 4]),
}


SELECTED = [("relu_mlp", FLOAT64), ("many_points", FLOAT64), ("relu_mlp", FLOAT32)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize(("name", "dtype"), SELECTED, ids=str)
def test_steps_along_selected_directions(name, dtype, keywords, choice):
    given, reference, options = problem(name, dtype), whole(name), KEYWORDS[keywords]
    chosen, tolerance = CHOICES[choice], 10 * TOLERANCE[dtype]
    select = options.get("select")
    expected = truth_of(given, reference, chosen, tolerance, select=select)
    step, info = newton_step_and_info(*given, 0.1, **options, **chosen.options)
    assert error(step, expected.step(0.1, options.get("complement"))) < tolerance
    check_info(info, expected, 0.1, reference, tolerance)
    assert {x.dtype for x in info} == {dtype, torch.int64}
    if "select" in options and "complement" not in options:
        alone = newton_step(*given, 0.1, **options, **chosen.options)
        assert error(alone, expected.step(0.1)) < tolerance


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_a_rule_gets_the_derivatives_of_the_samples(name, choice):
    given, reference, chosen = problem(name), whole(name), CHOICES[choice]
    seen = []

    def rule(evals, evecs, gammas, lambdas):
        seen.append((evals, evecs, gammas.clone(), lambdas.clone()))
        gammas.zero_()
        return 0.1 + lambdas.mean(0) + 0.2 * evals

    expected = truth_of(given, reference, chosen)
    step, info = newton_step_and_info(*given, rule, **chosen.options)
    evals, evecs, gammas, lambdas = seen[0]
    K, columns = len(expected.evals), len(ggn_eigvalsh(*given, **chosen.of_the_ggn))
    assert (evals.shape, evecs.shape) == ((K,), (columns, K))
    assert error(evecs.mT @ evecs, torch.eye(K, dtype=FLOAT64)) < 1e-10
    assert error(gammas, expected.gammas) < 1e-9
    assert error(lambdas, expected.lambdas) < 1e-9
    dampings = 0.1 + expected.lambdas.mean(0) + 0.2 * expected.evals
    assert error(info.dampings, dampings) < 1e-9
    assert error(info.gammas, expected.gammas) < 1e-9
    assert error(step, expected.step(dampings)) < 1e-9


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_identities_of_info(name):
    """With fresh curvature the predicted decrease is that of the model, direction by direction."""
    given, reference = problem(name), whole(name)
    for choice in CHOICES.values():
        step, info = newton_step_and_info(*given, 0.3, **choice.options)
        gamma, curvature, c = info.gammas.mean(0), info.lambdas.mean(0), info.coefficients
        assert error(c, -gamma / (curvature + info.dampings)) < 1e-11
        assert error(info.predicted_decrease, -gamma * c - curvature * c**2 / 2) < 1e-11
        assert error(c.square().sum().sqrt(), flat(step).norm()) < 1e-9
        gradient = some(reference, choice.grad).gradient
        assert error(info.gradient_norm, gradient.norm()) < 1e-11
        share = gamma.square().sum() / gradient.square().sum()
        assert error(info.gradient_share, share) < 1e-9
        assert info.gradient_share <= 1
        assert error(gamma @ c, gradient @ flat(step)) < 1e-9
        assert error(info.loss, reference.loss) < 1e-12
        if choice.curvature is None:
            assert error(curvature, info.evals) < 1e-11
        else:
            assert error(curvature, info.evals) > 1e-3


def test_undamped_directions_without_fresh_curvature_are_skipped():
    """The second input of the held-out sample is zero."""
    X = torch.tensor([[1.0, 2.0], [2.0, -1.0], [3.0, 0.0], [0.0, 0.0]], dtype=FLOAT64)
    w = torch.tensor([0.5, -0.2], dtype=FLOAT64)
    given = Problem(lambda w, x: x @ w, w, X, X.sum(1), nn.MSELoss(reduction="sum"))
    step, info = newton_step_and_info(*given, 0.0, subsampling_curvature=[3])
    assert not info.lambdas.any()
    assert not info.coefficients.any()
    assert not info.predicted_decrease.any()
    assert not step.any()
    damped = newton_step(*given, 0.5, subsampling_curvature=[3])
    assert error(damped, -whole_gradient(given) / 0.5) < 1e-12
    step = newton_step(*given, 0.0, subsampling_curvature=[2], subsampling_ggn=[0, 1])
    assert step.isfinite().all()
    infinite = newton_step(*given, lambda evals, *_: evals + math.inf, subsampling_curvature=[2])
    assert not infinite.any()


def whole_gradient(given: Problem) -> torch.Tensor:
    return dense(*given).gradient


# --- samples that the net is certain of ------------------------------------------------------


def certain() -> Problem:
    """Logits of up to 800: curvatures underflow, and some samples are wrong nonetheless."""
    X = torch.tensor(
        [[1, 0, 0.3, 1], [60, 2, 1, 0], [-0.5, 1, 0.2, 1], [2, -40, 1, 3], [0.1, 0.7, -1, 0]],
        dtype=FLOAT64,
    )
    W = torch.linspace(-1, 1.3, 12, dtype=FLOAT64).reshape(4, 3).sin() * 9
    y = torch.tensor([0, 0, 1, 0, 2])
    return Problem(lambda W, x: x @ W, W, X, y, nn.CrossEntropyLoss())


@pytest.mark.parametrize("delta", [1e-3, 1.0])
@pytest.mark.parametrize("choice", CHOICES)
def test_samples_that_the_net_is_certain_of(choice, delta):
    given, chosen = certain(), CHOICES[choice]
    reference = dense(*given, softmax_derivatives)
    G, g = some(reference, chosen.ggn).ggn, some(reference, chosen.grad).gradient
    if chosen.curvature is None:
        expected = -torch.linalg.solve(G + delta * torch.eye(len(g), dtype=FLOAT64), g)
        result = newton_step(*given, delta, complement=delta, **chosen.options)
        assert error(result, expected) < 1e-9
    gammas, lambdas = directional_derivatives(*given, select=top_k(3), **chosen.options)
    evals, E = ggn_eigh(*given, select=top_k(3), **chosen.of_the_ggn)
    expected = along(reference, rows(E), chosen, evals)
    assert error(gammas, expected.gammas) < 1e-9
    assert error(lambdas, expected.lambdas) < 1e-9


def test_a_flat_loss_of_some_samples():
    """Huber's loss: a slope of one and no curvature, on the samples of one option or another."""
    given = problem("relu_mlp")
    y = given.model_fn(given.params, given.X).detach()
    y[2:4] += 50
    y[:2] += 0.3
    given = given._replace(y=y, criterion=nn.HuberLoss())
    reference = dense(*given)
    for grad in (None, [2, 3], [0, 1], [1, 2]):
        for ggn in (None, [2, 3], [0, 1], [1, 2], [4]):
            G, g = some(reference, ggn).ggn, some(reference, grad).gradient
            expected = -torch.linalg.solve(G + 0.1 * torch.eye(len(g), dtype=FLOAT64), g)
            options = Choice(grad, ggn).options
            result, info = newton_step_and_info(*given, 0.1, complement=0.1, **options)
            assert error(result, expected) < 1e-10
            assert error(info.gradient_norm, g.norm()) < 1e-11
            for curvature in ([2, 3], [0, 4]):
                choice = Choice(grad, ggn, curvature)
                expected_along = truth_of(given, reference, choice)
                step, info = newton_step_and_info(*given, 0.1, **choice.options)
                check_info(info, expected_along, 0.1, reference, 1e-9)
                assert error(step, expected_along.step(0.1)) < 1e-9


# --- held-out samples, pushed forward or multiplied ------------------------------------------


PUSHED = [(name, "dense") for name in PROBLEMS if name != "one_sample"]
PUSHED += [(name, "structured") for name in ("relu_mlp", "many_points")]


@pytest.mark.parametrize(("name", "gram"), PUSHED)
def test_pushed_and_multiplied_slopes_agree(name, gram, monkeypatch):
    """The one is taken where directions are fewer than columns of a sample, the other elsewhere."""
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    given, reference = problem(name), whole(name)
    M = len(gram_matrix(*given)) // len(reference.slopes)
    for held, ggn in (([0, 1, 2], [2, 1]), ([2, 1], [0])):
        options = {"subsampling_ggn": ggn, "subsampling_curvature": held, "gram": gram}
        for k, chunk_size in ((1, None), (M, 1)):
            options |= {"select": top_k(k), "chunk_size": chunk_size}
            found = directional_derivatives(*given, **options)
            with monkeypatch.context() as patch:
                patch.setattr("ddnewton.quadratic.unseen_samples._pushed", no_forward_mode)
                multiplied = directional_derivatives(*given, **options)
            assert error(found, multiplied) < 1e-10
        E = rows(ggn_eigh(*given, select=top_k(1), subsampling_ggn=ggn, gram=gram)[1])
        expected = along(reference, E, Choice(None, ggn, held), None)
        one = directional_derivatives(*given, **options | {"select": top_k(1)})
        assert error(one.lambdas, expected.lambdas) < 1e-10


@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "many_points", "tuple_of_two"])
def test_which_way_is_taken(name, gram, monkeypatch):
    """Parameters without axes are pushed like all others."""
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    given = problem(name)
    M = len(gram_matrix(*given)) // len(whole(name).slopes)
    held = {"subsampling_ggn": [0, 1], "subsampling_curvature": [2], "gram": gram}
    with monkeypatch.context() as patch:
        patch.setattr("ddnewton.quadratic.unseen_samples._multiplied", refuse)
        directional_derivatives(*given, select=top_k(M), **held)
    with monkeypatch.context() as patch:
        patch.setattr("ddnewton.quadratic.unseen_samples._pushed", refuse)
        directional_derivatives(*given, select=top_k(M + 1), **held)
        directional_derivatives(*given, select=lambda evals: [], **held)
        directional_derivatives(*given, select=top_k(1), subsampling_curvature=[1])
        seen = held | {"subsampling_curvature": [1, 0]}
        directional_derivatives(*given, select=top_k(1), **seen)


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_directions_are_pushed_some_at_a_time(name, monkeypatch):
    given = problem(name)
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    options = {"select": top_k(2), "subsampling_ggn": [0, 1, 4], "subsampling_curvature": [2, 3]}
    expected = directional_derivatives(*given, **options)
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PUSHED_AT_ONCE", 1)
    assert error(directional_derivatives(*given, **options), expected) < 1e-12


def test_a_chunk_bounds_the_samples_that_directions_are_pushed_through(monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    given, sizes = problem("tanh_mlp"), set()

    def watched(p, x):
        sizes.add(len(x))
        return given.model_fn(p, x)

    options = {"subsampling_ggn": [0], "subsampling_curvature": range(1, len(given.X))}
    expected = directional_derivatives(*given, **options)
    found = directional_derivatives(watched, *given[1:], chunk_size=2, gram="dense", **options)
    assert len(given.X) > 3
    assert max(sizes) <= 2
    assert error(found.lambdas, expected.lambdas) < 1e-12


def test_shared_directions_have_the_same_curvature_however_many_are_asked_for(monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    for name in ("relu_mlp", "tanh_mlp", "convolution", "many_points"):
        held = {"subsampling_ggn": [0, 1], "subsampling_curvature": [3, 1, 2]}
        one, more = (
            directional_derivatives(*problem(name), select=top_k(k), **held).lambdas for k in (1, 9)
        )
        assert error(one[:, -1], more[:, -1]) < 1e-11


class Cube(torch.autograd.Function):
    """No forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class WrongForward(Cube):
    """A forward mode that is two thirds of what it should be."""

    calls = 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        WrongForward.calls += 1
        (x,) = ctx.saved_tensors
        return 2 * x**2 * tangent


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, X):
        return self.head(self.cell(X)[0][:, -1])


def with_cube(function):
    def model_fn(p, X):
        return function.apply(X @ p["a"]) @ p["b"]

    return model_fn


def plain_cube(p, X):
    return (X @ p["a"]) ** 3 @ p["b"]


def cubes(model_fn, samples: int) -> Problem:
    torch.manual_seed(3)
    params = {"a": normal(3, 2).double(), "b": normal(2, 3).double()}  # D = 12
    X, y = normal(samples, 3).double(), torch.arange(samples) % 3
    return Problem(model_fn, params, X, y, nn.CrossEntropyLoss())


@pytest.mark.parametrize("samples", [5, 15], ids=["Gram side", "parameter side"])
@pytest.mark.parametrize("function", [Cube, WrongForward])
def test_a_forward_mode_that_is_missing_or_wrong_is_not_used(function, samples, monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    given, reference = (
        cubes(with_cube(function), samples),
        dense(*cubes(plain_cube, samples)),
    )
    ggn = list(range(0, samples, 2)) if samples == 5 else list(range(12))
    WrongForward.calls = 0
    for choice in (Choice([1], ggn, [1, -2]), Choice(None, ggn, None), Choice([1], ggn, range(5))):
        for select in (top_k(1), top_k(2), top_k(5)):
            expected = truth_of(given, reference, choice, select=select)
            step, info = newton_step_and_info(*given, 0.1, select=select, **choice.options)
            check_info(info, expected, 0.1, reference, 1e-9)
            assert error(step, expected.step(0.1)) < 1e-9
    assert bool(WrongForward.calls) == (function is WrongForward)


@DTYPES
def test_recurrent_nets_have_held_out_curvature(dtype, monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    from models import of_module

    torch.manual_seed(0)
    module, X = Gated(), normal(5, 4, 2)
    y = torch.tensor([1, 0, 2, 1, 2])
    reference = dense(*of_module(copy.deepcopy(module), X, y, nn.CrossEntropyLoss(), FLOAT64))
    given = of_module(module, X, y, nn.CrossEntropyLoss(), dtype)
    for select in (top_k(1), top_k(2), top_k(4)):
        choice = Choice([1, 2], [0, 3], [4, 3])
        tolerance = 10 * TOLERANCE[dtype]
        expected = truth_of(given, reference, choice, tolerance, select=select)
        step, info = newton_step_and_info(*given, 0.1, select=select, **choice.options)
        check_info(info, expected, 0.1, reference, tolerance)
        assert error(step, expected.step(0.1)) < tolerance


@pytest.mark.parametrize("select", [top_k(1), top_k(4), None], ids=["1", "4", "all"])
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_large_models_in_float32_stay_in_float32(name, select, monkeypatch):
    monkeypatch.setattr("ddnewton.linearize.linearization.CHEAP_FLOPS", 0)
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    given, choice = problem(name, FLOAT32), Choice([3, 1], [0, 2, 1], [3, 0])
    options = {"select": select, "gram": "structured"}
    expected = truth_of(given, whole(name), choice, 1e-5, **options)
    step, info = newton_step_and_info(*given, 0.1, **options, **choice.options)
    assert error(info.gammas, expected.gammas) < 1e-5
    assert error(info.lambdas, expected.lambdas) < 1e-5
    assert error(step, expected.step(0.1)) < 1e-5


def test_the_empirical_fisher_matrix_of_samples():
    for name in ("relu_mlp", "more_columns_than_parameters"):
        given = problem(name)._replace(criterion=empirical_fisher(problem(name).criterion))
        g = whole(name).gradients
        for choice in CHOICES.values():
            evals, evecs = ggn_eigh(*given, select=top_k(2), **choice.of_the_ggn)
            E, mine = rows(evecs), g if choice.ggn is None else g[choice.ggn]
            assert error(mine.mT @ (mine @ E) / len(mine), E * evals) < 1e-10
            pair = directional_derivatives(*given, select=top_k(2), **choice.options)
            slopes = g if choice.grad is None else g[choice.grad]
            held = mine if choice.curvature is None else g[choice.curvature]
            assert error(pair.gammas, slopes @ E) < 1e-10
            assert error(pair.lambdas, (held @ E).square()) < 1e-10


# --- among torch's own ----------------------------------------------------------------------

TRANSFORMED = {
    "step": lambda given, **options: newton_step(*given, 0.1, **options),
    "selected step": lambda given, **options: newton_step(
        *given, 0.1, select=top_k(2), complement=0.3, **options
    ),
    "rule": lambda given, **options: newton_step(
        *given, lambda evals, evecs, gammas, lambdas: 0.1 + lambdas.mean(0), **options
    ),
    "derivatives": lambda given, **options: tuple(
        part.abs() for part in directional_derivatives(*given, select=top_k(2), **options)
    ),
    "info": lambda given, **options: tuple(
        part.abs() for part in newton_step_and_info(*given, 0.1, select=top_k(2), **options)[1]
    ),
}


@pytest.mark.parametrize("choice", ["ggn", "apart", "overlapping"])
@pytest.mark.parametrize("function", TRANSFORMED)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_an_ensemble_is_a_loop(name, function, choice, monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    given = problem(name)
    apart = [problem(name, seed=seed).params for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *apart)

    def one(params):
        return TRANSFORMED[function](given._replace(params=params), **CHOICES[choice].options)

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        assert error(tree_map(lambda leaf, i=i: leaf[i], together), one(params)) < 1e-8


@pytest.mark.parametrize("function", TRANSFORMED)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_under_every_context_nothing_is_recorded_or_changed(name, function):
    options = {key: torch.tensor(value) for key, value in CHOICES["apart"].options.items()}
    given = problem(name)
    for leaf in tree_leaves(given.params):
        leaf.requires_grad_()
    before = copy.deepcopy((given[1:4], options))
    expected = TRANSFORMED[function](given, **options)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            result = TRANSFORMED[function](given, **options)
            inside = problem(name)  # inference mode's own tensors
            assert error(TRANSFORMED[function](inside, **options), expected) < 1e-11
        assert error(result, expected) < 1e-11
        assert not any(leaf.requires_grad for leaf in tree_leaves(result))
    for x, y in zip(tree_leaves(before), tree_leaves((given[1:4], options)), strict=True):
        assert torch.equal(x, y)
    assert all(leaf.grad is None for leaf in tree_leaves(given.params))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("choice", ["apart", "overlapping"])
@pytest.mark.parametrize("name", [*SMALL_AND_LARGE, "attention"])
def test_prepared_models_and_chunks_change_nothing(name, choice, chunk_size):
    chosen = CHOICES[choice]
    if len(whole(name).slopes) < 5:
        chosen = Choice(*(None if x is None else [i for i in x if i < 3] or [2] for x in chosen))
    given = problem(name)
    prepared = given._replace(model_fn=prepare(*given[:3]))
    for function in ("step", "selected step"):
        expected = TRANSFORMED[function](given, **chosen.options, gram="dense")
        for each in (given, prepared):
            result = TRANSFORMED[function](each, **chosen.options, chunk_size=chunk_size)
            assert error(result, expected) < 1e-8


# --- refusals -------------------------------------------------------------------------------

RULE = "must hold distinct indices of samples"
REFUSED = {
    "repeated": ([1, 0, 1], ValueError, r"repeats in \[1, 0, 1\]"),
    "repeated from the end": ([4, -1], ValueError, r"repeats in \[4, -1\]"),
    "too large": ([0, 5], ValueError, "indices from 0 to 5"),
    "too small": ([-6, 0], ValueError, "indices from -6 to 0"),
    "empty": ([], ValueError, "got none"),
    "empty range": (range(0), ValueError, "got none"),
    "one number": (3, ValueError, r"got shape \[\]"),
    "a table": ([[0, 1], [2, 3]], ValueError, r"got shape \[2, 2\]"),
    "ragged": ([[0], [1, 2]], TypeError, r"got \[\[0\], \[1, 2\]\]"),
    "floats": ([0.0, 1.0], TypeError, "numbers of torch.float32"),
    "complex": (torch.tensor([0j]), TypeError, "numbers of torch.complex64"),
    "a mask": (torch.ones(5, dtype=torch.bool), TypeError, r"a mask\. .*mask.nonzero\(\)"),
    "a list of booleans": ([True, False, True, False, True], TypeError, "got a mask"),
    "a string": ("all", TypeError, "got 'all'"),
    "strings": (["0", "1"], TypeError, r"got \['0', '1'\]"),
    "a set": ({0, 1}, TypeError, r"got \{0, 1\}"),
    "an empty slice": (slice(5, None), ValueError, "got none"),
    "a slice of floats": (slice(0.5), TypeError, r"got slice\(None, 0.5, None\)"),
    "nothing inside": ([None], TypeError, r"got \[None\]"),
    "a function": (len, TypeError, "got <built-in function len>"),
}
TAKERS = {
    newton_step: OPTIONS,
    newton_step_and_info: OPTIONS,
    directional_derivatives: OPTIONS,
    ggn_eigh: OPTIONS[1:2],
    ggn_eigvalsh: OPTIONS[1:2],
    gram_matrix: OPTIONS[1:2],
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("function", TAKERS, ids=lambda f: f.__name__)
def test_what_are_no_indices_is_refused(function, case):
    subset, kind, message = REFUSED[case]
    arguments = [*problem("relu_mlp", FLOAT32)] + [0.1] * function.__name__.startswith("newton")
    for option in TAKERS[function]:
        pattern = f"^{function.__name__}: {option} {RULE}; .*{message}.*The batch has 5 samples"
        if case.startswith("a mask"):
            pattern = f"^{function.__name__}: {option} {RULE}; .*{message}"
        with pytest.raises(kind, match=pattern):
            function(*arguments, **{option: subset})


def test_refusals_come_before_any_work():
    given = problem("relu_mlp", FLOAT32)._replace(model_fn=refuse)
    for function, options in TAKERS.items():
        arguments = [*given] + [0.1] * function.__name__.startswith("newton")
        for option in options:
            with pytest.raises(ValueError, match=f"{option} must hold"):
                function(*arguments, **{option: [7]})


def test_a_batch_is_as_large_as_its_first_axis_says():
    """Not as its first leaf's second, nor as y's."""
    given = problem("attention", FLOAT32)
    with pytest.raises(ValueError, match="The batch has 3 samples"):
        ggn_eigvalsh(*given, subsampling_ggn=[3])
    assert len(ggn_eigvalsh(*given, subsampling_ggn=[2])) == 6


def test_all_solutions_agree_with_solve():
    """The private reference above is the shared one where nothing is left out."""
    for name in SMALL_AND_LARGE:
        expected = truth_of(problem(name), whole(name), Choice())
        assert error(expected.step(0.1, complement=0.1), solve(whole(name), 0.1)) < 1e-11
