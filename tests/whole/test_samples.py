"""Slopes, directions and curvatures may come from different samples of a batch."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import (
    directional_derivatives,
    ggn_eigvalsh,
    gram_matrix,
    newton_step,
    newton_step_and_info,
    top_k,
)
from tests.methods import (
    CLASSES,
    DTYPES,
    FLOAT64,
    REALS,
    REDUCTIONS,
    SMALL_AND_LARGE,
    TORCH_LOSSES,
    truth,
)
from tests.models import PROBLEMS, Problem, cast, normal, problem
from tests.reference import dense, error, solve
from tests.whole.chosen_samples import (
    OPTIONS,
    SUBSETS,
    TOLERANCE,
    Choice,
    check_info,
    numbers,
    some,
    truth_of,
)

# --- every choice of samples ----------------------------------------------------------------


@pytest.mark.parametrize("ggn", SUBSETS)
@pytest.mark.parametrize("grad", SUBSETS)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_every_choice_of_samples(name, grad, ggn):
    given, reference = problem(name), truth(name)
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
    given, reference = problem(name, dtype), truth(name)
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
    given, reference = problem(name), truth(name)
    for curvature, select in ((None, top_k(1)), ([1, 0], top_k(3)), ([-1], None)):
        choice = Choice([1], [0, 2], curvature)
        expected = truth_of(given, reference, choice, select=select)
        step, info = newton_step_and_info(*given, 0.1, select=select, **choice.options)
        check_info(info, expected, 0.1, reference, 1e-9)
        assert error(step, expected.step(0.1)) < 1e-9


LOSSES = {name: (loss.function, loss.y) for name, loss in TORCH_LOSSES.items() if loss.curved} | {
    "ignored": (partial(F.cross_entropy, ignore_index=2), CLASSES),
    # So wide that every sample has two directions.
    "huber": (partial(F.huber_loss, delta=4.0), REALS),
    "smooth_l1": (partial(F.smooth_l1_loss, beta=4.0), REALS),
}


@REDUCTIONS
@pytest.mark.parametrize("loss", LOSSES)
def test_samples_keep_the_scale_they_have_in_the_whole_batch(loss, reduction):
    function, y = LOSSES[loss]
    criterion = partial(function, reduction=reduction)
    given = problem("relu_mlp")._replace(y=cast(y, FLOAT64), criterion=criterion)
    plain = (lambda f, y: criterion(f, *y)) if isinstance(y, tuple) else criterion
    reference = dense(*given._replace(criterion=plain))
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
    everyone = range(len(truth(name).slopes))
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


# --- refusals -------------------------------------------------------------------------------


def test_all_solutions_agree_with_solve():
    """The private reference above is the shared one where nothing is left out."""
    for name in SMALL_AND_LARGE:
        expected = truth_of(problem(name), truth(name), Choice())
        assert error(expected.step(0.1, complement=0.1), solve(truth(name), 0.1)) < 1e-11
