"""Steps with every loss, in every form, against the dense reference."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddnewton import criteria, newton_step, newton_step_and_info
from tests.methods import (
    CLASSES,
    DTYPES,
    FLOAT32,
    FLOAT64,
    REDUCTIONS,
    TORCH_LOSSES,
    UNIT_INTERVAL,
    truth,
)
from tests.models import cast, problem
from tests.reference import dense, directions, error, solve, step
from tests.whole.dense_steps import (
    CALLABLES,
    TOLERANCE,
    euclidean,
    huber,
    log_sum_exp,
    with_callable,
)

FORMS = {
    "module": lambda loss, reduction: loss.module(reduction=reduction),
    "function": lambda loss, reduction: (
        loss.function if reduction == "mean" else partial(loss.function, reduction=reduction)
    ),
    "record": lambda loss, reduction: loss.record(reduction=reduction),
    "callable": lambda loss, reduction: loss.plain(reduction),
    "convex": lambda loss, reduction: criteria.convex(loss.plain(reduction)),
}


# The scale that a reduction sets has nothing to do with the dtype.
@pytest.mark.parametrize(("reduction", "dtype"), [("mean", FLOAT64), ("sum", FLOAT32)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_a_torch_loss_in_every_form(name, form, reduction, dtype):
    loss = TORCH_LOSSES[name]
    given = problem("relu_mlp", dtype)._replace(
        y=cast(loss.y, dtype), criterion=FORMS[form](loss, reduction)
    )
    reference = dense(
        *problem("relu_mlp")._replace(y=cast(loss.y, FLOAT64), criterion=loss.plain(reduction))
    )
    result, info = newton_step_and_info(*given, 0.1)
    assert error(result, (solve if loss.curved else step)(reference, 0.1)) < TOLERANCE[dtype]
    assert error(info.loss, reference.loss) < TOLERANCE[dtype]
    assert error(info.evals, directions(reference).evals) < TOLERANCE[dtype]


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("function", CALLABLES)
def test_any_convex_callable(function, reduction, dtype):
    reference = dense(*with_callable(function, reduction, FLOAT64))
    result, info = newton_step_and_info(*with_callable(function, reduction, dtype), 0.1)
    assert error(result, step(reference, 0.1)) < TOLERANCE[dtype]
    assert error(info.loss, reference.loss) < TOLERANCE[dtype]
    assert error(info.evals, directions(reference).evals) < TOLERANCE[dtype]


WEIGHT = torch.tensor([0.5, 1.0, 2.0])
OPTIONS = {
    "label_smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES),
    "weight": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), CLASSES),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=1, reduction="sum"), CLASSES),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), UNIT_INTERVAL),
    "bce_weight": (nn.BCEWithLogitsLoss(weight=WEIGHT), UNIT_INTERVAL),
    "huber": (nn.HuberLoss(delta=0.3), UNIT_INTERVAL),
    "smooth_l1": (nn.SmoothL1Loss(reduction="sum"), UNIT_INTERVAL),
    "soft_margin": (nn.SoftMarginLoss(), UNIT_INTERVAL.round() * 2 - 1),
    "gaussian_nll": (lambda f, y: F.gaussian_nll_loss(f, y, torch.ones_like(y)), UNIT_INTERVAL),
}


@DTYPES
@pytest.mark.parametrize("name", OPTIONS)
def test_torch_losses_with_options(name, dtype):
    """In closed form or by torch's own derivatives, never by leaving an option out."""
    criterion, y = OPTIONS[name]
    double = copy.deepcopy(criterion).double() if isinstance(criterion, nn.Module) else criterion
    reference = dense(*problem("relu_mlp")._replace(y=cast(y, FLOAT64), criterion=double))
    given = problem("relu_mlp", dtype)._replace(
        y=cast(y, dtype), criterion=criterion if dtype == FLOAT32 else double
    )
    result, info = newton_step_and_info(*given, 0.1)
    assert error(result, step(reference, 0.1)) < TOLERANCE[dtype]
    assert error(info.loss, reference.loss) < TOLERANCE[dtype]


@pytest.mark.parametrize("function", [huber, euclidean, log_sum_exp])
def test_some_callables_have_gradients_where_there_is_no_curvature(function):
    reference = dense(*with_callable(function, "mean", FLOAT64))
    assert error(step(reference, 0.1), solve(reference, 0.1)) > 0.01


@pytest.mark.parametrize("function", [huber, euclidean, log_sum_exp])
def test_a_number_and_a_constant_rule_are_the_same_damping(function):
    """Rounding must not decide whether a direction has no curvature or a vanishing one."""
    given = with_callable(function, "mean", FLOAT64)
    number = newton_step(*given, 0.1)
    rule = newton_step(*given, lambda evals, *_: 0.1 * torch.ones_like(evals))
    assert error(number, rule) < 1e-11


@DTYPES
def test_a_callable_may_hold_tensors_of_the_models_dtype(dtype):
    def with_matrix(dtype):
        metric = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]], dtype=dtype)
        return problem("relu_mlp", dtype)._replace(
            y=3 * cast(UNIT_INTERVAL, dtype),
            criterion=lambda f, y: torch.einsum("nc,cb,nb->n", f - y, metric, f - y).mean(),
        )

    reference = dense(*with_matrix(FLOAT64))
    result = newton_step(*with_matrix(dtype), 0.1)
    assert error(result, solve(reference, 0.1)) < TOLERANCE[dtype]


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("function", CALLABLES)
def test_the_complement_takes_what_no_direction_holds(function, reduction, dtype):
    reference = dense(*with_callable(function, reduction, FLOAT64))
    result = newton_step(*with_callable(function, reduction, dtype), 0.1, complement=0.1)
    assert error(result, solve(reference, 0.1)) < TOLERANCE[dtype]


@DTYPES
def test_a_loss_without_curvature_is_refused_or_leaves_gradient_descent(dtype):
    """The absolute error is convex; its curvature is zero and its gradient is not."""
    given = problem("tanh_mlp", dtype)._replace(criterion=F.l1_loss)
    gradient = dense(*problem("tanh_mlp")._replace(criterion=F.l1_loss)).gradient
    with pytest.raises(ValueError, match="must have curvature where its gradient is not zero"):
        newton_step_and_info(*given, 0.1)
    result, info = newton_step_and_info(*given, 0.1, complement=0.5)
    assert len(info.evals) == 0
    assert error(result, -2 * gradient) < TOLERANCE[dtype]
    assert error(newton_step(*given, 0.1, complement=0.5), -2 * gradient) < TOLERANCE[dtype]


def test_a_partial_with_the_default_reduction_is_the_function():
    given = problem("relu_mlp")
    result = newton_step(*given._replace(criterion=partial(F.cross_entropy)), 0.1)
    assert error(result, solve(truth("relu_mlp"), 0.1)) < 1e-12


def test_targets_may_be_a_pytree_for_a_callable():
    given = problem("tanh_mlp")
    weights = torch.linspace(0.5, 2, 6, dtype=FLOAT64)
    given = given._replace(
        y={"value": given.y, "weight": weights},
        criterion=lambda f, y: (y["weight"] * (f - y["value"]) ** 2).mean(),
    )
    assert error(newton_step(*given, 0.1), solve(dense(*given), 0.1)) < 1e-12
