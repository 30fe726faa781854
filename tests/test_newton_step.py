"""Steps and info against the dense reference, and how the function behaves among torch's own."""

import contextlib
import copy
import math
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddnewton import above, criteria, energy, newton_step, newton_step_and_info, top_k
from models import PROBLEMS, Problem, cast, problem
from reference import Dense, clusters, dense, directions, error, flat, solve, step

FLOAT32, FLOAT64 = torch.float32, torch.float64
TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-11}
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])

SMALL_AND_LARGE = ["relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points"]
"""Problems with fewer and with more columns NM than parameters D, with both kinds of M."""


@cache
def truth(name: str) -> Dense:
    """The dense reference of a problem."""
    return dense(*problem(name))


def captured(name: str, dtype=FLOAT64, **options):
    """The four arguments that a damping rule is called with."""
    seen = []

    def rule(*arguments):
        seen.append(arguments)
        return torch.ones_like(arguments[0])

    newton_step(*problem(name, dtype), rule, **options)
    return seen[-1]


def curvature_damping(evals, evecs, gammas, lambdas):
    """A rule that needs every argument that does not depend on a sign or a root."""
    return 0.1 + lambdas.square().mean(0).sqrt() + gammas.square().mean(0).sqrt() + 0.1 * evals


def indices(choice) -> list[int]:
    """A choice as a list, whether it came as a list, a tensor of indices or a mask."""
    choice = torch.as_tensor(choice)
    return (choice.nonzero()[:, 0] if choice.dtype == torch.bool else choice).tolist()


# --- every model ----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_of_every_model(name, dtype):
    given = problem(name, dtype)
    result = newton_step(*given, 0.1)
    assert error(result, solve(truth(name), 0.1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_looks_like_the_parameters(name):
    params = problem(name, FLOAT32).params
    leaves, structure = tree_flatten(params)
    stepped, stepped_structure = tree_flatten(newton_step(*problem(name, FLOAT32), 0.1))
    assert structure == stepped_structure
    assert type(params) is type(newton_step(*problem(name, FLOAT32), 0.1))
    for p, s in zip(leaves, stepped, strict=True):
        assert (s.shape, s.dtype, s.device) == (p.shape, p.dtype, p.device)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, "N", 100])
@pytest.mark.parametrize("name", PROBLEMS)
def test_chunks_change_nothing(name, chunk_size):
    given = problem(name)
    size = len(tree_leaves(given.X)[0]) if chunk_size == "N" else chunk_size
    result = newton_step(*given, 0.1, chunk_size=size)
    assert error(result, newton_step(*given, 0.1)) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_chunks_change_nothing_of_info(name, chunk_size):
    options = {"select": top_k(3), "complement": 0.2}
    s, info = newton_step_and_info(*problem(name), 0.1, chunk_size=chunk_size, **options)
    whole, whole_info = newton_step_and_info(*problem(name), 0.1, **options)
    assert error(s, whole) < 1e-11
    for field, found, expected in zip(info._fields, info, whole_info, strict=True):
        assert error(found.abs(), expected.abs()) < 1e-9, field


@pytest.mark.parametrize("gram", ["dense", "auto"])
def test_the_gram_options_agree(gram):
    result = newton_step(*problem("relu_mlp"), 0.1, gram=gram)
    assert error(result, solve(truth("relu_mlp"), 0.1)) < 1e-12


# --- every loss, in every form --------------------------------------------------------------

CLASSES = torch.tensor([0, 2, 1, 1, 0])
PROBABILITIES = torch.tensor(
    [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2], [0.0, 0.5, 0.5]]
)
UNIT_INTERVAL = torch.linspace(0, 1, 15).reshape(5, 3)


class TorchLoss(NamedTuple):
    module: type
    function: object
    record: object
    y: torch.Tensor


TORCH_LOSSES = {
    "mse": TorchLoss(nn.MSELoss, F.mse_loss, criteria.mse, 3 * UNIT_INTERVAL - 1),
    "classes": TorchLoss(nn.CrossEntropyLoss, F.cross_entropy, criteria.cross_entropy, CLASSES),
    "probabilities": TorchLoss(
        nn.CrossEntropyLoss, F.cross_entropy, criteria.cross_entropy, PROBABILITIES
    ),
    "bce": TorchLoss(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        criteria.bce_with_logits,
        UNIT_INTERVAL,
    ),
}

FORMS = {
    "module": lambda loss, reduction: loss.module(reduction=reduction),
    "function": lambda loss, reduction: (
        loss.function if reduction == "mean" else partial(loss.function, reduction=reduction)
    ),
    "record": lambda loss, reduction: loss.record(reduction=reduction),
    "callable": lambda loss, reduction: lambda f, y: loss.function(f, y, reduction=reduction),
    "convex": lambda loss, reduction: criteria.convex(
        lambda f, y: loss.function(f, y, reduction=reduction)
    ),
}


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_a_torch_loss_in_every_form(name, form, reduction, dtype):
    loss = TORCH_LOSSES[name]
    given = problem("relu_mlp", dtype)._replace(
        y=cast(loss.y, dtype), criterion=FORMS[form](loss, reduction)
    )
    reference = dense(
        *problem("relu_mlp")._replace(
            y=cast(loss.y, FLOAT64), criterion=partial(loss.function, reduction=reduction)
        )
    )
    result, info = newton_step_and_info(*given, 0.1)
    assert error(result, solve(reference, 0.1)) < TOLERANCE[dtype]
    assert error(info.loss, reference.loss) < TOLERANCE[dtype]
    assert error(info.evals, directions(reference).evals) < TOLERANCE[dtype]


def reduced(values, reduction):
    return values.mean() if reduction == "mean" else values.sum()


def log_cosh(f, y, reduction):
    z = f - y
    return reduced(z.abs() + F.softplus(-2 * z.abs()) - math.log(2), reduction)


def huber(f, y, reduction):
    """Flat Hessian and a slope of ±1 further than 1 from the target."""
    return F.huber_loss(f, y, reduction=reduction)


def softplus_hinge(f, y, reduction):
    return reduced(F.softplus(1 - f * y.sign()), reduction)


def poisson_nll(f, y, reduction):
    return F.poisson_nll_loss(f, y.abs(), reduction=reduction)


def euclidean(f, y, reduction):
    """Flat along the line to the target, where its slope is 1."""
    return reduced((f - y).square().sum(-1).sqrt(), reduction)


def log_sum_exp(f, y, reduction):
    """Flat along (1, …, 1), where its slope is 1."""
    return reduced((f - y).logsumexp(-1), reduction)


def smoothed(f, y, reduction):
    """Cross-entropy of labels that are made from y, inside a callable."""
    return F.cross_entropy(f, y.argmax(1), label_smoothing=0.1, reduction=reduction)


CALLABLES = [log_cosh, huber, softplus_hinge, poisson_nll, smoothed, euclidean, log_sum_exp]


def with_callable(function, reduction: str, dtype) -> Problem:
    y = torch.tensor([2.0, -1.5, 0.3]).repeat(5, 1) * torch.linspace(0.1, 1.3, 5)[:, None]
    return problem("relu_mlp", dtype)._replace(
        y=cast(y, dtype), criterion=partial(function, reduction=reduction)
    )


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
def test_a_loss_without_curvature_leaves_gradient_descent(dtype):
    """The absolute error is convex; its curvature is zero and its gradient is not."""
    given = problem("tanh_mlp", dtype)._replace(criterion=F.l1_loss)
    gradient = dense(*problem("tanh_mlp")._replace(criterion=F.l1_loss)).gradient
    result, info = newton_step_and_info(*given, 0.1)
    assert flat(result).abs().max() == 0
    assert len(info.evals) == 0
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


# --- directions, complement, damping --------------------------------------------------------

SELECTIONS = {
    "none": (None, None),
    "top_k": (top_k(3), lambda evals: range(len(evals) - 3, len(evals))),
    "top_1": (top_k(1), lambda evals: [len(evals) - 1]),
    "above": (above(0.05), lambda evals: evals > 0.05 * evals[-1]),
    "above_absolute": (above(0.02, relative=False), lambda evals: evals > 0.02),
    "energy": (
        energy(0.9),
        lambda evals: evals.flip(0).cumsum(0).flip(0) - evals < 0.9 * evals.sum(),
    ),
    "list": (lambda evals: [len(evals) - 1, len(evals) - 3],) * 2,
    "tensor": (lambda evals: torch.tensor([len(evals) - 2, len(evals) - 1]),) * 2,
    "mask": (lambda evals: (evals > 0.02 * evals[-1]) & (evals < 0.7 * evals[-1]),) * 2,
    "nothing": (lambda evals: [],) * 2,
}


@DTYPES
@pytest.mark.parametrize("complement", [None, 0.5], ids=["inside", "complement"])
@pytest.mark.parametrize("damping", [0.05, curvature_damping], ids=["float", "function"])
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_selected_directions(name, select, damping, complement, dtype):
    theirs, ours = SELECTIONS[select]
    expected = step(truth(name), damping, ours, complement)
    result = newton_step(*problem(name, dtype), damping, select=theirs, complement=complement)
    assert error(result, expected) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_a_choice_sees_all_eigenvalues_ascending(name):
    seen = []

    def select(evals):
        seen.append(evals)
        return [len(evals) - 1]

    newton_step(*problem(name), 0.1, select=select)
    N, C, _ = truth(name).jacobians.shape
    M = C - 1 if isinstance(problem(name).criterion, nn.CrossEntropyLoss) else C
    (evals,) = seen
    assert evals.shape == (N * M,)
    assert (evals.diff() >= 0).all()
    assert evals.dtype == FLOAT64
    kept = directions(truth(name)).evals
    assert error(evals[-len(kept) :], kept) < 1e-12
    assert evals[: -len(kept)].abs().sum() < 1e-12 * evals[-1]


def test_ready_made_selections_keep_what_their_names_say():
    evals = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    assert indices(top_k(2)(evals)) == [3, 4]
    assert indices(above(0.5)(evals)) == [3, 4]
    assert indices(above(0.15, relative=False)(evals)) == [2, 3, 4]
    assert indices(energy(0.65)(evals)) == [3, 4]
    assert indices(energy(0.75)(evals)) == [2, 3, 4]


def test_the_rule_may_skip_directions_with_inf():
    def every_other(evals, evecs, gammas, lambdas):
        return torch.where(torch.arange(len(evals)) % 2 == 0, math.inf, 0.1)

    result = newton_step(*problem("relu_mlp"), every_other)
    assert error(result, step(truth("relu_mlp"), every_other)) < 1e-12


def test_an_infinite_float_takes_no_step():
    result = newton_step(*problem("relu_mlp"), math.inf)
    assert flat(result).abs().max() == 0


@DTYPES
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_what_a_damping_rule_receives(name, dtype):
    evals, evecs, gammas, lambdas = captured(name, dtype)
    N, C, _ = truth(name).jacobians.shape
    M = C - 1 if isinstance(problem(name).criterion, nn.CrossEntropyLoss) else C
    K = len(evals)
    assert evecs.shape == (N * M, K)
    assert gammas.shape == lambdas.shape == (N, K)
    assert {x.dtype for x in (evals, evecs, gammas, lambdas)} == {dtype}
    loose = TOLERANCE[dtype]
    assert error(evecs.T @ evecs, torch.eye(K)) < loose * K
    # λ_nk = N λ_k ‖u_kn‖², where u_kn are the rows m·N + n: this pins the order of the rows.
    of_sample = evecs.reshape(M, N, K).square().sum(0)
    assert error(lambdas, N * evals * of_sample) < 10 * loose


# --- info -----------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["none", "top_1", "above"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_info_is_the_references(name, select):
    """Signs, and rotations among equal eigenvalues, are free: γγᵀ and Σλ_n of a cluster are not."""
    theirs, ours = SELECTIONS[select]
    _, info = newton_step_and_info(*problem(name), curvature_damping, select=theirs)
    kept = directions(truth(name), ours)
    gradient = truth(name).gradient

    assert error(info.loss, truth(name).loss) < 1e-12
    assert error(info.evals, kept.evals) < 1e-12
    for cluster in clusters(kept.evals):
        products = info.gammas[:, cluster] @ info.gammas[:, cluster].T
        assert error(products, kept.gammas[:, cluster] @ kept.gammas[:, cluster].T) < 1e-6
        lambdas = info.lambdas[:, cluster].sum(1)
        assert error(lambdas, kept.lambdas[:, cluster].sum(1)) < 1e-6
    assert error(info.gradient_norm, gradient.norm()) < 1e-12
    share = (kept.vectors.T @ gradient).square().sum() / gradient.square().sum()
    assert error(info.gradient_share, share) < 1e-10
    assert int(info.rank) == len(directions(truth(name)).evals)


@pytest.mark.parametrize("select", ["none", "top_k"])
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_info_fields_follow_from_one_another(name, select):
    theirs, _ = SELECTIONS[select]
    _, info = newton_step_and_info(*problem(name), curvature_damping, select=theirs)
    g = info.gammas.mean(0)
    dampings = curvature_damping(info.evals, None, info.gammas, info.lambdas)
    tau = -g / (info.evals + dampings)
    torch.testing.assert_close(info.dampings, dampings)
    torch.testing.assert_close(info.coefficients, tau)
    torch.testing.assert_close(info.predicted_decrease, -(g * tau + info.evals * tau**2 / 2))
    torch.testing.assert_close(info.lambdas.mean(0), info.evals)


@DTYPES
def test_info_has_the_models_dtype(dtype):
    _, info = newton_step_and_info(*problem("relu_mlp", dtype), 0.1)
    for field in ("evals", "gammas", "lambdas"):
        assert getattr(info, field).dtype == dtype


def test_info_in_float32():
    _, info = newton_step_and_info(*problem("relu_mlp", FLOAT32), 0.1)
    kept = directions(truth("relu_mlp"))
    assert error(info.evals, kept.evals) < 1e-6
    # Single directions turn by about eps λ_max / gap.
    gap = kept.evals.diff().min() / kept.evals[-1]
    loose = 10 * torch.finfo(FLOAT32).eps / float(gap)
    assert error(info.gammas.abs(), kept.gammas.abs()) < loose
    assert error(info.lambdas, kept.lambdas) < loose
    assert int(info.rank) == len(kept.evals)


def test_newton_step_is_the_first_of_the_pair():
    given = problem("convolution")
    result, _ = newton_step_and_info(*given, 0.1)
    assert error(newton_step(*given, 0.1), flat(result)) < 1e-12  # by Cholesky, no eigenpairs


# --- edges ----------------------------------------------------------------------------------


@DTYPES
def test_unused_parameters_get_exactly_zero(dtype):
    for options in ({}, {"complement": 0.1}, {"select": top_k(2)}, {"chunk_size": 1}):
        result = newton_step(*problem("tanh_mlp", dtype), 0.1, **options)
        assert torch.equal(result["unused"], torch.zeros(2, 2, dtype=dtype))
        assert result["in"]["weight"].abs().min() > 0


@DTYPES
def test_no_parameter_is_used(dtype):
    X = torch.ones(3, 2, dtype=dtype)
    params = {"a": torch.ones(2, dtype=dtype), "b": torch.ones((), dtype=dtype)}
    result, info = newton_step_and_info(
        lambda p, X: X * 1.0, params, X, 0 * X, nn.MSELoss(), 0.1, complement=1.0
    )
    assert flat(result).tolist() == [0, 0, 0]
    assert int(info.rank) == 0
    assert float(info.gradient_norm) == 0


@DTYPES
@pytest.mark.parametrize("complement", [None, 0.1])
def test_one_class_has_nothing_to_learn(dtype, complement):
    """Cross-entropy over one class is zero, with no gradient and no curvature."""
    params, X = torch.ones(2, 1, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    y = torch.zeros(3, dtype=torch.long)
    result, info = newton_step_and_info(
        lambda W, X: X @ W, params, X, y, nn.CrossEntropyLoss(), 0.1, complement=complement
    )
    assert flat(result).tolist() == [0, 0]
    assert all(bool(torch.as_tensor(field).isfinite().all()) for field in info)


@DTYPES
def test_a_parameter_may_be_a_scalar(dtype):
    X, y = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([3.0, 5.0], dtype=dtype)
    result = newton_step(lambda p, X: p * X, torch.tensor(1.0, dtype=dtype), X, y, F.mse_loss, 0.0)
    assert result.shape == ()
    assert float(result) == pytest.approx(1.6, rel=1e-6)


def test_parameters_of_two_dtypes():
    given = problem("list_of_layers")
    mixed = [(weight, bias.float()) for weight, bias in given.params]
    result = newton_step(*given._replace(params=mixed), 0.1)
    assert [leaf.dtype for leaf in tree_leaves(result)] == [FLOAT64, FLOAT32] * 3
    assert error(result, solve(truth("list_of_layers"), 0.1)) < 1e-6


@pytest.mark.parametrize("inside", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("outside", [FLOAT32, FLOAT64])
def test_outputs_of_another_dtype_than_the_parameters(inside, outside):
    given = problem("one_tensor", inside)
    result = newton_step(
        lambda W, X: (X @ W).to(outside), given.params, given.X, given.y, given.criterion, 0.1
    )
    assert result.dtype == inside
    assert error(result, solve(truth("one_tensor"), 0.1)) < 1e-5


def test_integer_leaves_in_y_and_x_pass_through():
    given = problem("attention", FLOAT32)
    assert given.X["tokens"].dtype == torch.long
    assert given.X["mask"].dtype == torch.bool
    assert error(newton_step(*given, 1.0), solve(truth("attention"), 1.0)) < 1e-5


# --- purity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"complement": 0.1, "select": top_k(2), "chunk_size": 2}])
def test_nothing_outside_changes(options):
    module = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )
    module.eval()
    module[1].train()
    module[3].bias.requires_grad_(False)
    flags = [m.training for m in module.modules()]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    params = dict(module.named_parameters())
    X, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    x_before, y_before = X.detach().clone(), y.clone()
    random_state, default = torch.get_rng_state(), torch.get_default_dtype()
    threads, fastpath = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()

    result = newton_step(
        lambda p, x: functional_call(module, p, (x,)),
        params,
        X,
        y,
        nn.CrossEntropyLoss(),
        0.1,
        **options,
    )

    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert [p.requires_grad for p in params.values()] == [True] * 5 + [False]
    assert all(p.grad is None for p in params.values())
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert torch.equal(X.detach(), x_before)
    assert X.grad is None
    assert X.requires_grad
    assert torch.equal(y, y_before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_default_dtype() == default
    assert torch.get_num_threads() == threads
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.is_grad_enabled()
    # Parameters that require a gradient take the same step, and carry no graph away.
    plain = newton_step(
        lambda p, x: functional_call(module, p, (x,)),
        {k: p.detach() for k, p in params.items()},
        X.detach(),
        y,
        nn.CrossEntropyLoss(),
        0.1,
        **options,
    )
    assert error(result, plain) < 1e-6
    assert not any(leaf.requires_grad for leaf in tree_leaves(result))


@pytest.mark.parametrize("target", ["params", "X", "y"])
def test_a_model_that_writes_to_its_inputs_does_not_reach_them(target):
    """Refused or not, what the caller passed is as it was."""

    def write(name, tensor):
        return tensor.mul_(2) if name == target else tensor

    def model_fn(W, X):
        return write("X", X) @ write("params", W)

    def criterion(f, y):
        return (f - write("y", y)).square().mean()

    W, X, y = torch.randn(3, 2), torch.randn(5, 3), torch.randn(5, 2)
    before = [leaf.clone() for leaf in (W, X, y)]
    with contextlib.suppress(RuntimeError, ValueError):
        newton_step(model_fn, W, X, y, criterion, 0.1)
    for leaf, old in zip((W, X, y), before, strict=True):
        assert torch.equal(leaf, old)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["relu_mlp", "lstm", "poisson", "encoder_layer"])
def test_without_gradients(name, context):
    given = problem(name)
    expected = newton_step(*given, 0.1)
    with context():
        result = newton_step(*given, 0.1)
        assert not torch.is_grad_enabled()
    assert error(result, expected) < 1e-13


def test_the_same_call_twice_gives_the_same_bits():
    first, second = (newton_step(*problem("convolution", FLOAT32), 0.1) for _ in range(2))
    assert torch.equal(flat(first), flat(second))


# --- ensembles ------------------------------------------------------------------------------


def ensemble(name: str, dtype, members: int = 3):
    """The first of some problems, and the parameters of all of them, stacked and apart."""
    problems = [problem(name, dtype, seed) for seed in range(members)]
    apart = [p.params for p in problems]
    return problems[0], tree_map(lambda *leaves: torch.stack(leaves), *apart), apart


ENSEMBLE_OPTIONS = {
    "float": (0.1, {}),
    "function": (curvature_damping, {}),
    "top_k": (0.1, {"select": top_k(3)}),
    "above": (0.1, {"select": above(0.05)}),
    "energy": (0.1, {"select": energy(0.9)}),
    "complement": (0.1, {"complement": 0.5}),
    "top_k_complement_function": (curvature_damping, {"select": top_k(3), "complement": 0.5}),
    "chunked": (0.1, {"chunk_size": 2}),
}


@DTYPES
@pytest.mark.parametrize("options", ENSEMBLE_OPTIONS)
@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "tanh_mlp", "many_points"])
def test_an_ensemble_is_a_loop(name, options, dtype):
    damping, keywords = ENSEMBLE_OPTIONS[options]
    first, stacked, apart = ensemble(name, dtype)

    def one(params):
        return newton_step(*first._replace(params=params), damping, **keywords)

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        result = tree_map(lambda leaf, i=i: leaf[i], together)
        assert error(result, one(params)) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["attention", "encoder_layer", "poisson", "tied_autoencoder"])
def test_an_ensemble_of_other_models(name):
    first, stacked, apart = ensemble(name, FLOAT64, members=2)
    together = vmap(lambda params: newton_step(*first._replace(params=params), 0.1))(stacked)
    for i, params in enumerate(apart):
        result = tree_map(lambda leaf, i=i: leaf[i], together)
        assert error(result, newton_step(*first._replace(params=params), 0.1)) < 1e-11


@REDUCTIONS
@pytest.mark.parametrize("function", CALLABLES)
def test_an_ensemble_with_a_callable(function, reduction):
    given = with_callable(function, reduction, FLOAT64)
    _, stacked, apart = ensemble("relu_mlp", FLOAT64)

    def one(params):
        return newton_step(*given._replace(params=params), 0.1, complement=0.3)

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        assert error(tree_map(lambda leaf, i=i: leaf[i], together), one(params)) < 1e-11


def test_an_ensemble_of_info():
    first, stacked, apart = ensemble("relu_mlp", FLOAT64)

    def one(params):
        return newton_step_and_info(*first._replace(params=params), 0.1, select=top_k(3))[1]

    together = vmap(one)(stacked)
    for i, params in enumerate(apart):
        alone = one(params)
        for field in ("loss", "evals", "lambdas", "dampings", "predicted_decrease", "rank"):
            assert error(getattr(together, field)[i], getattr(alone, field)) < 1e-10, field
        assert error(together.gammas[i].abs(), alone.gammas.abs()) < 1e-10
        assert error(together.gradient_norm[i], alone.gradient_norm) < 1e-12
        assert error(together.gradient_share[i], alone.gradient_share) < 1e-12


def test_an_ensemble_of_modules_with_its_own_data_each():
    modules = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(3)]
    params, _ = stack_module_state(modules)
    X, y = torch.randn(3, 5, 3), torch.randn(3, 5, 2)

    def one(params, X, y):
        return newton_step(
            lambda p, x: functional_call(modules[0], p, (x,)), params, X, y, nn.MSELoss(), 0.1
        )

    together = vmap(one)(params, X, y)
    for i in range(3):
        alone = one({k: p[i] for k, p in params.items()}, X[i], y[i])
        assert error({k: s[i] for k, s in together.items()}, alone) < 1e-5


def test_a_batch_of_dampings():
    given = problem("relu_mlp")
    deltas = torch.tensor([0.01, 0.1, 1.0], dtype=FLOAT64)
    together = vmap(lambda delta: newton_step(*given, lambda evals, *_: delta + 0 * evals))(deltas)
    for i, delta in enumerate(deltas.tolist()):
        result = {k: s[i] for k, s in together.items()}
        assert error(result, solve(truth("relu_mlp"), delta)) < 1e-11


# --- devices --------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "many_points", "poisson"])
def test_on_cuda(name):
    given = problem(name)
    params, X, y = (tree_map(lambda t: t.cuda(), tree) for tree in given[1:4])
    result, info = newton_step_and_info(given.model_fn, params, X, y, given.criterion, 0.1)
    assert {leaf.device.type for leaf in tree_leaves(result)} == {"cuda"}
    assert info.evals.device.type == "cuda"
    assert error(tree_map(lambda t: t.cpu(), result), solve(truth(name), 0.1)) < 1e-11
