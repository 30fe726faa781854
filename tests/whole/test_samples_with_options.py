"""Different samples for slopes, directions and curvatures, with every other option."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import (
    directional_derivatives,
    ggn_eigh,
    ggn_eigvalsh,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
)
from tests.methods import FLOAT32, FLOAT64, READY_MADE, SMALL_AND_LARGE, truth
from tests.models import Problem, problem
from tests.reference import dense, error, flat, softmax_derivatives
from tests.whole.chosen_samples import (
    CHOICES,
    TOLERANCE,
    Choice,
    along,
    check_info,
    rows,
    some,
    truth_of,
)

# --- steps with every other option ----------------------------------------------------------


KEYWORDS = {
    **{name: {"select": select} for name, select in READY_MADE.items()},
    "permuted": {"select": lambda evals: [len(evals) - 2, len(evals) - 1]},
    "nothing": {"select": lambda evals: []},
    "complement": {"complement": 0.2},
    "both": {"select": top_k(2), "complement": 0.2},
}


SELECTED = [("relu_mlp", FLOAT64), ("many_points", FLOAT64), ("relu_mlp", FLOAT32)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize(("name", "dtype"), SELECTED, ids=str)
def test_steps_along_selected_directions(name, dtype, keywords, choice):
    given, reference, options = problem(name, dtype), truth(name), KEYWORDS[keywords]
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
    given, reference, chosen = problem(name), truth(name), CHOICES[choice]
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
    given, reference = problem(name), truth(name)
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
                if ggn == [2, 3]:  # no direction at all
                    with pytest.raises(ValueError, match="must have curvature"):
                        newton_step_and_info(*given, 0.1, **choice.options)
                    continue
                expected_along = truth_of(given, reference, choice)
                step, info = newton_step_and_info(*given, 0.1, **choice.options)
                check_info(info, expected_along, 0.1, reference, 1e-9)
                assert error(step, expected_along.step(0.1)) < 1e-9


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
    if len(truth(name).slopes) < 5:
        chosen = Choice(*(None if x is None else [i for i in x if i < 3] or [2] for x in chosen))
    given = problem(name)
    prepared = given._replace(model_fn=prepare(*given[:3]))
    for function in ("step", "selected step"):
        expected = TRANSFORMED[function](given, **chosen.options, gram="dense")
        for each in (given, prepared):
            result = TRANSFORMED[function](each, **chosen.options, chunk_size=chunk_size)
            assert error(result, expected) < 1e-8
