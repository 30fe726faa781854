"""Steps by products alone are those by matrices, with every option."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddnewton import (
    Group,
    directional_derivatives,
    empirical_fisher,
    ggn_eigh,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
    weighted,
)
from ddnewton.damping import signal_to_noise
from tests.linearize.autograd_cases import CASES, given_and_truth
from tests.methods import (
    CURVATURES,
    DTYPES,
    FLOAT32,
    FLOAT64,
    RULES,
    SELECTIONS,
    SMALL_AND_LARGE,
    seeded,
    truth,
)
from tests.models import PROBLEMS, problem
from tests.reference import error, flat, solve, step
from tests.whole import blocks
from tests.whole.chosen_samples import CHOICES
from tests.whole.products_and_matrices import FREE, compared, lost_share

TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-8}

# --- every model, by one number ------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("delta", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_of_every_model(name, delta, dtype):
    result, info = newton_step_and_info(*problem(name, dtype), delta, **FREE)
    T, exact = truth(name), solve(truth(name), delta)
    assert error(result, exact) < (1e-6 if dtype == FLOAT32 else 1e-9)
    # What the record says of it, by the textbook's matrices.
    tolerance = 1e-5 if dtype == FLOAT32 else 1e-8
    s, g = flat(result), T.gradient
    assert error(info.loss, T.loss) < tolerance
    assert error(info.losses, T.loss) < tolerance
    assert error(info.gradient_norm, g.norm()) < tolerance
    assert error(info.predicted_decrease.sum(), -(g @ s + s @ T.ggn @ s / 2)) < tolerance
    assert error(info.coefficients, s.norm()[None]) < tolerance
    assert error(info.evals, (s @ T.ggn @ s / s.square().sum())[None]) < tolerance
    assert error(info.gammas.mean(0), (g @ s / s.norm())[None]) < tolerance
    assert error(info.dampings, torch.tensor([delta], dtype=FLOAT64)) < tolerance
    assert error(info.gradient_share, (g @ s / s.norm() / g.norm()) ** 2) < tolerance
    assert float(info.residuals) < 1e-9 * g.norm() * max(1, 1 / delta)
    assert float(info.lost) <= 1e-20
    assert int(info.rank) == -1
    assert int(info.products) <= len(s) + 10


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_undamped_step(name):
    """By the relative residual, which is all that an undamped step promises."""
    result, info = newton_step_and_info(*problem(name), 0.0, gram="free", tol=1e-13)
    T = truth(name)
    assert error(T.ggn @ flat(result), -T.gradient) < 2e-13
    assert error(info.residuals, torch.zeros(1)) < 2e-13 * T.gradient.norm()
    assert error(result, step(T, 0.0)) < 1e-6


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_looks_like_the_parameters(name):
    params = problem(name, FLOAT32).params
    result = newton_step(*problem(name, FLOAT32), 0.1, gram="free")
    assert type(params) is type(result)
    leaves, structure = tree_flatten(params)
    stepped, stepped_structure = tree_flatten(result)
    assert structure == stepped_structure
    for p, s in zip(leaves, stepped, strict=True):
        assert (s.shape, s.dtype, s.device) == (p.shape, p.dtype, p.device)
        assert not s.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
@pytest.mark.parametrize("name", PROBLEMS)
def test_chunks_change_nothing(name, chunk_size):
    given, exact = problem(name), solve(truth(name), 0.1)
    result = newton_step(*given, 0.1, chunk_size=chunk_size, **FREE)
    assert error(result, exact) < 1e-9


# Of an LSTM there is no trace.
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "lstm"])
def test_a_prepared_model(name):
    given = problem(name)
    prepared = prepare(*given[:3])
    result = newton_step(prepared, *given[1:], 0.1, **FREE)
    assert error(result, solve(truth(name), 0.1)) < 1e-9
    along = newton_step(prepared, *given[1:], 0.1, select=top_k(1), **FREE)
    assert error(along, newton_step(*given, 0.1, select=top_k(1))) < 1e-8


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_models_with_derivatives_and_kernels_of_their_own(case, dtype):
    given, reference = given_and_truth(case, dtype)
    if case == "sparse bag":
        # A kernel whose derivative torch does not differentiate.
        with pytest.raises(ValueError, match="_embedding_bag_backward"):
            newton_step(*given, 0.1, gram="free")
        return
    result = newton_step(*given, 0.1, **FREE)
    assert error(result, solve(reference, 0.1)) < (1e-6 if dtype == FLOAT32 else 1e-9)


# --- directions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("complement", [None, 0.5], ids=["inside", "complement"])
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_selected_directions(name, select, complement):
    taken, reference, _ = SELECTIONS[select]
    options = {"select": taken, "complement": complement}
    result, info = compared(problem(name), lambda: 0.05, 1e-7, **options)
    assert error(result, step(truth(name), 0.05, reference, complement)) < 1e-8
    coefficients = info.coefficients
    if complement is None:
        assert error(coefficients.norm(), flat(result).norm()) < 1e-8


# A rule that looks at a spread takes two samples; directions of equal eigenvalues are no one's.
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (name, rule)
        for name, rule in product(PROBLEMS, RULES)
        if name != "tuple_of_two" and not (name == "one_sample" and RULES[rule].spread)
    ],
)
def test_rules(name, rule):
    compared(problem(name), RULES[rule].make, 1e-7)


@DTYPES
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_rules_along_selected_directions(name, rule, dtype):
    options = {"select": top_k(3), "complement": 0.3, "chunk_size": 2}
    compared(problem(name, dtype), RULES[rule].make, TOLERANCE[dtype], **options)


def test_a_selection_and_a_rule_get_what_they_get_of_matrices():
    seen = []

    def select(evals):
        seen.append([evals])
        return [len(evals) - 1, len(evals) - 2]

    def rule(*parts):
        seen[-1].extend(parts)
        return torch.ones_like(parts[0])

    for name in SMALL_AND_LARGE:
        seen.clear()
        newton_step(*problem(name), rule, select=select, **FREE)
        newton_step(*problem(name), rule, select=select)
        (evals, *free), (exact_evals, *exact) = seen
        assert evals.shape == exact_evals.shape
        assert error(evals, exact_evals) < 1e-8
        for part, other in zip(free, exact, strict=True):
            assert part.shape == other.shape
            assert part.dtype == other.dtype
        # Directions have signs, and bases of the columns; their products with themselves do not.
        assert error(free[0], exact[0]) < 1e-8
        assert error(free[2].square(), exact[2].square()) < 1e-7
        assert error(free[3], exact[3]) < 1e-7
        of_sample = [part[1].reshape(-1, len(part[2]), 2).square().sum(0) for part in (free, exact)]
        assert error(*of_sample) < 1e-7


@pytest.mark.parametrize("name", PROBLEMS)
def test_eigenpairs_and_derivatives(name):
    given, T = problem(name), truth(name)
    evals, evecs = ggn_eigh(*given, gram="free", tol=1e-8)
    exact, _ = ggn_eigh(*given)
    assert evals.shape == exact.shape
    assert error(evals, exact) < 1e-9
    E = torch.cat([leaf.reshape(len(evals), -1) for leaf in tree_leaves(evecs)], 1)
    assert error(E @ E.mT, torch.eye(len(E), dtype=FLOAT64)) < 1e-10
    assert error(T.ggn @ E.mT, E.mT * evals) < 1e-9
    gammas, lambdas = directional_derivatives(*given, gram="free", tol=1e-8)
    assert error(lambdas.mean(0), evals) < 1e-8
    assert error(gammas.mean(0).abs(), (E @ T.gradient).abs()) < 1e-7


@pytest.mark.parametrize("delta", [0.1, 3.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_complement_of_the_same_and_of_another_damping(name, delta):
    exact = newton_step(*problem(name), 0.1, complement=delta)
    result, info = newton_step_and_info(*problem(name), 0.1, complement=delta, **FREE)
    assert error(result, exact) < 1e-8
    # What lies in the range of G has no complement: such a step is a linear system.
    assert not info.lost.isnan()


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"complement": 0.1}, {"select": top_k(2)}], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_samples_of_slopes_directions_and_curvatures(name, choice, options):
    chosen = CHOICES[choice]
    compared(problem(name), lambda: 0.1, 1e-7, **options, **chosen.options)


@pytest.mark.parametrize("samples", [[0, 1], torch.tensor([3, 0, 2])], ids=str)
def test_the_same_samples_for_slopes_and_directions_make_a_linear_system(samples):
    options = {"subsampling_grad": samples, "subsampling_ggn": samples}
    _, info = compared(problem("relu_mlp"), lambda: 0.1, 1e-8, **options)
    assert not info.lost.isnan()


# --- losses and curvatures -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"complement": 0.1}, {"select": top_k(3)}], ids=str)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_curvatures(name, curvature, options):
    given, make = problem(name), CURVATURES[curvature].make
    steps = [
        newton_step(*given[:4], make(given.criterion, 3), 0.1, **options, **way)
        for way in (FREE, {})
    ]
    assert error(*steps) < 1e-7


def test_draws_of_targets_leave_the_generator_as_matrices_do():
    given, generators = problem("relu_mlp"), [seeded(), seeded()]
    steps = [
        newton_step(*given[:4], monte_carlo(given.criterion, 2, generator), 0.1, **way)
        for generator, way in zip(generators, (FREE, {}), strict=True)
    ]
    assert error(*steps) < 1e-7
    assert torch.equal(*(generator.get_state() for generator in generators))


@pytest.mark.parametrize("delta", [0.1, 2.0])
def test_an_empirical_fisher_beside_its_gradient(delta):
    """Its own slopes are its columns, so that there is nothing outside."""
    given = problem("relu_mlp")
    criterion = empirical_fisher(given.criterion)
    steps = [newton_step(*given[:4], criterion, 0.1, complement=delta, **way) for way in (FREE, {})]
    assert error(*steps) < 1e-7


# --- blocks, terms, scales -----------------------------------------------------------------------


@pytest.mark.parametrize("partition", blocks.PARTITIONS)
@pytest.mark.parametrize("name", blocks.SOME)
def test_blocks(name, partition):
    given = blocks.problem(name)
    groups = partition(given.params).groups
    compared(given, lambda: 0.1, 1e-8, groups=groups)


def test_every_group_has_a_selection_and_a_damping_of_its_own():
    given = problem("relu_mlp")
    groups = [
        Group(["0.weight"], select=top_k(2), damping=0.3),
        Group(["2.weight", "2.bias"], damping=signal_to_noise()),
    ]
    compared(given, lambda: 0.1, 1e-7, groups=groups)


SCALES = {
    "a number": lambda params: 0.3,
    "a pytree": lambda params: tree_map(lambda p: (p.abs() + 0.1).detach(), params),
    "a number for every leaf": lambda params: tree_map(lambda p: 0.5, params),
}


@pytest.mark.parametrize("options", [{}, {"select": top_k(2), "complement": 0.5}], ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_scales(name, scale, options):
    of_params = SCALES[scale](problem(name).params)
    compared(problem(name), lambda: 0.1, 1e-7, scale=of_params, **options)


def terms_of(name="many_points"):
    """Two terms of one model: other samples, another loss of another weight."""
    given = problem(name)
    model_fn = {"one": given.model_fn, "other": lambda p, x: given.model_fn(p, x).sin()}
    X = {"one": given.X, "other": given.X[:5] + 1}
    y = {"one": given.y, "other": given.y[:5]}
    criteria = {"one": given.criterion, "other": weighted(nn.SmoothL1Loss(), 3.0)}
    return model_fn, given.params, X, y, criteria


TERM_OPTIONS = {
    "number": {},
    "number and complement": {"complement": 0.1},
    "select": {"select": top_k(3)},
    "select and complement": {"select": top_k(3), "complement": 0.5, "chunk_size": 2},
    "samples": {"subsampling_ggn": {"one": [1, 3, 5], "other": [0, 1]}},
    "curvatures": {"subsampling_curvature": {"one": [1, 3, 5], "other": [0, 1]}},
}


@pytest.mark.parametrize("options", TERM_OPTIONS)
def test_terms(options):
    _, info = compared(terms_of(), lambda: 0.1, 1e-7, **TERM_OPTIONS[options])
    assert set(info.losses) == {"one", "other"}
    assert error(sum(info.losses.values()), info.loss) < 1e-14


def test_terms_by_a_rule():
    compared(terms_of(), signal_to_noise, 1e-7)


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [math.inf, torch.tensor(0.1), torch.tensor(math.inf)], ids=str)
@pytest.mark.parametrize("options", [{}, {"select": top_k(2)}], ids=str)
def test_dampings_of_any_kind(damping, options):
    given = problem("relu_mlp")
    steps = [newton_step(*given, damping, **options, **way) for way in (FREE, {})]
    assert error(*steps) < 1e-6


def test_a_gradient_of_zero():
    params, X = {"W": torch.zeros(3, 2).double()}, torch.eye(3).double()
    given = (lambda p, x: x @ p["W"], params, X, torch.zeros(3, 2).double(), nn.MSELoss())
    for options in ({}, {"select": top_k(2)}, {"complement": 0.1}):
        result, info = newton_step_and_info(*given, 0.1, gram="free", **options)
        assert (result["W"] == 0).all()
        assert float(info.gradient_norm) == 0
        assert info.predicted_decrease.sum() == 0
        assert torch.stack([info.lost, info.loss]).nan_to_num().abs().sum() == 0


@pytest.mark.parametrize("tol", [0.3, 1e-2])
def test_a_step_is_never_beyond_the_bound(tol):
    for name in SMALL_AND_LARGE:
        result, info = newton_step_and_info(*problem(name), 0.1, gram="free", tol=tol)
        share = lost_share(truth(name), result, 0.1, solve(truth(name), 0.1))
        assert share <= float(info.lost) <= tol
