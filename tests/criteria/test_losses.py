"""Every closed form against torch's own loss: its values, gradients, Hessians and refusals."""

import inspect
import math
from decimal import Decimal, localcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap

from ddnewton import criteria, newton_step
from ddnewton.criteria import as_loss, expand_batch
from ddnewton.criteria.loss import sample_values
from ddnewton.linearize.basis import combined, stored, written_out
from tests.methods import DTYPES, FLOAT64, REDUCTIONS, TORCH_LOSSES
from tests.reference import as_double, autograd_derivatives, dense, error, solve

MANY = settings(max_examples=100)


# --- the losses, with their options as data ---------------------------------------------------


def ramp(*shape):
    """Numbers from 0.2 to 2 in no order."""
    return 1.1 + 0.9 * torch.arange(1, 1 + math.prod(shape)).mul(2.4).cos().reshape(shape)


def reals(f):
    return 2 * ramp(*f.shape).flip(0) - 1


def shares(f):
    """Targets in [0, 1], both ends included."""
    return (ramp(*f.shape) - 0.6).clamp(0, 1)


def counts(f):
    return (3 * ramp(*f.shape) - 0.6).floor() + 0.5 * (ramp(*f.shape) > 1.5)


def classes(f):
    """Class indices from 0 to C − 1, one of them to be ignored."""
    y = torch.arange(f[:, 0].numel()).mul(7).add(1).remainder(f.shape[1]).reshape(f[:, 0].shape)
    return y.index_put((torch.tensor(1),), torch.tensor(-100)) if len(y) > 1 else y


def probabilities(f):
    """Torch does not ask that they sum to one."""
    return ramp(*f.shape) / f.shape[1]


def with_variance(f):
    return reals(f), 0.5 * ramp(*f.shape)


class Case(NamedTuple):
    function: object
    targets: object
    options: object = lambda f: {}


ELEMENTWISE = {
    "mse": Case(F.mse_loss, reals),
    "mse, weight": Case(F.mse_loss, reals, lambda f: {"weight": ramp(*f.shape).flip(0)}),
    "huber": Case(F.huber_loss, reals),
    "huber, delta": Case(F.huber_loss, reals, lambda f: {"delta": 0.4}),
    "huber, weight": Case(
        F.huber_loss, reals, lambda f: {"delta": 0.7, "weight": ramp(*f.shape).flip(0)}
    ),
    "smooth_l1": Case(F.smooth_l1_loss, reals),
    "smooth_l1, beta": Case(F.smooth_l1_loss, reals, lambda f: {"beta": 0.3}),
    "bce": Case(F.binary_cross_entropy_with_logits, shares),
    "bce, weight": Case(
        F.binary_cross_entropy_with_logits, shares, lambda f: {"weight": ramp(*f.shape[1:])}
    ),
    "bce, pos_weight": Case(
        F.binary_cross_entropy_with_logits, shares, lambda f: {"pos_weight": ramp(f.shape[-1])}
    ),
    "bce, both": Case(
        F.binary_cross_entropy_with_logits,
        shares,
        lambda f: {"weight": ramp(*f.shape), "pos_weight": torch.tensor(2.5)},
    ),
    "poisson": Case(F.poisson_nll_loss, counts),
    "poisson, full": Case(F.poisson_nll_loss, counts, lambda f: {"full": True}),
    "poisson, rates": Case(F.poisson_nll_loss, counts, lambda f: {"log_input": False}),
    "poisson, rates, full": Case(
        F.poisson_nll_loss, counts, lambda f: {"log_input": False, "full": True, "eps": 0.1}
    ),
    "gaussian": Case(F.gaussian_nll_loss, with_variance),
    "gaussian, full": Case(F.gaussian_nll_loss, with_variance, lambda f: {"full": True}),
    "gaussian, clamped": Case(F.gaussian_nll_loss, with_variance, lambda f: {"eps": 0.6}),
    "gaussian, a number": Case(F.gaussian_nll_loss, reals, lambda f: {"var": 0.3}),
    "gaussian, var": Case(F.gaussian_nll_loss, reals, lambda f: {"var": ramp(*f.shape)}),
    "gaussian, last axis 1": Case(
        F.gaussian_nll_loss, reals, lambda f: {"var": ramp(*f.shape[:-1], 1), "full": True}
    ),
    "gaussian, no last axis": Case(
        F.gaussian_nll_loss, reals, lambda f: {"var": ramp(*f.shape[:-1])}
    ),
    "gaussian, first axis 1": Case(
        F.gaussian_nll_loss, reals, lambda f: {"var": ramp(1, *f.shape[1:])}
    ),
}

SOFTMAX = {
    f"{targets.__name__}{', weight' * weight}{', smooth' * (smooth > 0)}{', ignored' * ignored}": (
        Case(
            F.cross_entropy,
            targets,
            lambda f, weight=weight, smooth=smooth, ignored=ignored: (
                {"label_smoothing": smooth}
                | ({"weight": ramp(f.shape[1])} if weight else {})
                | ({"ignore_index": 1} if ignored else {})
            ),
        )
    )
    for targets in (classes, probabilities)
    for weight in (False, True)
    for smooth in (0.0, 0.2)
    for ignored in (False, True)
    if targets is classes or not ignored
}

CASES = ELEMENTWISE | SOFTMAX
ELEMENTWISE_SHAPES = [(4,), (3, 4), (3, 2, 2), (2, 2, 2, 2)]
SOFTMAX_SHAPES = [(4, 3), (3, 3, 2), (2, 2, 2, 2), (3, 1), (3, 1, 2)]
EVERY = [(name, shape) for name in ELEMENTWISE for shape in ELEMENTWISE_SHAPES] + [
    (name, shape) for name in SOFTMAX for shape in SOFTMAX_SHAPES
]
FEW = [(name, (3, 4)) for name in ELEMENTWISE] + [(name, (3, 3, 2)) for name in SOFTMAX]


def outputs_for(name, shape, members=()):
    """Outputs of mixed signs, or rates."""
    f = 1.7 * torch.randn(*members, *shape)
    return f.abs() + 0.1 if "rates" in name else f


def cast(tree, dtype):
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )


def batch(name, shape, dtype):
    """Outputs, targets and options of a case, and torch's loss of them in float64."""
    case = CASES[name]
    f = cast(outputs_for(name, shape), dtype)
    y, options = cast(case.targets(f), dtype), cast(case.options(f), dtype)
    if "ignore_index" in options:
        y = torch.where(y < 0, options["ignore_index"], y)
    return f, y, options


def torchs(name, options):
    """A case as a user of torch writes it, in float64."""
    function = CASES[name].function
    if function is F.gaussian_nll_loss and "var" not in options:
        return lambda f, y: function(f, y[0], y[1], **options)
    return lambda f, y: function(f, y, **cast(options, FLOAT64))


def derivatives(expansion):
    """The mean loss and its gradient and Hessian blocks, as an expansion of a batch has them."""
    value, basis, z, h, R = expansion
    L = written_out(basis)
    slopes = torch.einsum("ncm,nm->nc", L, z) + R.sum(2)
    return value.mean(), slopes / len(L), torch.einsum("ncm,nm,nbm->ncb", L, h, L) / len(L)


def check_close(found, truth, tolerance=1e-13):
    for own, other in zip(found, truth, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize(("name", "shape"), EVERY)
def test_the_closed_form_is_torchs_loss(name, shape, reduction, dtype):
    f, y, options = batch(name, shape, dtype)
    loss = as_loss(partial(CASES[name].function, reduction=reduction, **options))
    assert loss.expand.__module__ != "ddnewton.criteria.convex"
    found = derivatives(expand_batch(loss, f, f, y))
    reference = torchs(name, {"reduction": reduction} | options)
    wide, target = f.double(), as_double(y)
    truth = reference(wide, target), *autograd_derivatives(reference, wide, target)
    check_close(found, truth)


@pytest.mark.parametrize(("name", "shape"), EVERY)
def test_gradients_alone_are_those_of_the_expansion(name, shape):
    f, y, options = batch(name, shape, FLOAT64)
    loss = as_loss(partial(CASES[name].function, **options))
    value, basis, z, _, _ = loss.expand(f, y)
    check_close(loss.gradient(f, y), (value, combined(basis, z)))
    check_close(sample_values(loss, f, y), value)


MODULES = {loss.function: loss.module for loss in TORCH_LOSSES.values()}
FACTORIES = {loss.function: loss.record for loss in TORCH_LOSSES.values()}


@REDUCTIONS
@pytest.mark.parametrize(("name", "shape"), FEW)
def test_modules_functions_and_records_are_one(name, shape, reduction):
    f, y, options = batch(name, shape, FLOAT64)
    function = CASES[name].function
    given = {"reduction": reduction} | options
    forms = [partial(function, **given), FACTORIES[function](**given)]
    if given.keys() <= inspect.signature(MODULES[function]).parameters.keys():
        forms.append(MODULES[function](**given))
    if not options and reduction == "mean":
        forms.append(function)
    first, *others = (expand_batch(as_loss(form), f, f, y) for form in forms)
    for other in others:
        for own, same in zip(first, other, strict=True):
            assert torch.equal(
                *(x if isinstance(x, Tensor) else written_out(x) for x in (own, same))
            )


@pytest.mark.parametrize(
    "criterion",
    [
        partial(F.mse_loss, size_average=False),
        partial(F.cross_entropy, reduce=True),
        type("Mine", (nn.MSELoss,), {})(),
        F.l1_loss,
        nn.KLDivLoss(reduction="batchmean"),
        partial(F.smooth_l1_loss, beta=0.0),
        nn.SmoothL1Loss(beta=0),
        lambda f, y: 2 * F.mse_loss(f, y),
    ],
)
def test_what_no_closed_form_knows_is_left_to_torch(criterion):
    assert as_loss(criterion).expand.__module__ == "ddnewton.criteria.convex"


def test_an_attribute_that_torch_does_not_read_is_not_read():
    criterion = nn.MSELoss()
    criterion.weight = torch.zeros(2, 2)
    assert as_loss(criterion).expand(torch.ones(2, 2), torch.zeros(2, 2)).value.tolist() == [2, 2]


def test_a_legacy_reduction_is_what_torch_makes_of_it():
    with pytest.warns(UserWarning, match="size_average"):
        criterion = nn.MSELoss(size_average=False)
    assert as_loss(criterion).denominator(torch.ones(2, 2), torch.zeros(2, 2)) == 1


@pytest.mark.parametrize("beta", [0, 0.0])
def test_smooth_l1_without_a_round_kink_is_l1(beta):
    f, y = torch.randn(3, 2, dtype=FLOAT64), torch.zeros(3, 2, dtype=FLOAT64)
    found = derivatives(expand_batch(criteria.smooth_l1(beta=beta), f, f, y))
    check_close(found, (F.l1_loss(f, y), f.sign() / 6, torch.zeros(3, 2, 2, dtype=FLOAT64)))


@pytest.mark.parametrize("function", [F.huber_loss, F.smooth_l1_loss])
def test_the_kink_itself_is_flat(function):
    f, y = torch.tensor([[1.0, -1.0, 0.999]]), torch.zeros(1, 3)
    assert as_loss(function).expand(f, y).h.tolist() == [[0.0, 0.0, 1.0]]


def test_counts_may_be_integers():
    f, y = torch.randn(3, 2), torch.tensor([[0, 1], [2, 3], [4, 5]])
    found = derivatives(expand_batch(as_loss(nn.PoissonNLLLoss(full=True)), f, f, y))
    assert error(found[0], F.poisson_nll_loss(f.double(), y.double(), full=True)) < 1e-14


def test_weights_may_have_another_dtype():
    """Where torch refuses: the outputs are taken in float64 beside a module in float32."""
    f, y, weight = torch.randn(4, 3, dtype=FLOAT64), torch.tensor([0, 2, 1, 1]), ramp(3)
    found = derivatives(expand_batch(as_loss(nn.CrossEntropyLoss(weight=weight)), f, f, y))
    assert error(found[0], F.cross_entropy(f, y, weight.double())) < 1e-15


def test_numbers_are_not_rounded_to_float32():
    f, y = torch.ones(2, 2, dtype=FLOAT64), torch.zeros(2, 2, dtype=FLOAT64)
    assert criteria.gaussian_nll(var=0.1).expand(f, y).z[0, 0] == 1 / 0.1


# --- positions that do not count --------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 17])
def test_ignored_positions_are_flat_and_level(ignore_index):
    f = torch.randn(2, 3, 4, dtype=FLOAT64)
    y = torch.tensor([[0, 1, 2, 1], [2, 1, 0, 0]])
    y[0, 1] = y[1, 2] = ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": 0.1, "weight": ramp(3).double()}
    expansion = criteria.cross_entropy(**options).expand(f, y)
    ignored = (y == ignore_index).repeat_interleave(2, 1)
    assert (expansion.z[ignored] == 0).all()
    assert (expansion.h[ignored] == 0).all()
    assert (expansion.h[~ignored] > 0).all()
    found = derivatives(expand_batch(criteria.cross_entropy(**options), f, f, y))
    truth = partial(F.cross_entropy, **options)
    check_close(found, (truth(f, y), *autograd_derivatives(truth, f, y)))


@pytest.mark.parametrize(
    ("y", "weight"), [([-100, -100], [1.0, 1.0, 1.0]), ([-100, 1], [1.0, 0.0, 1.0])]
)
def test_a_mean_over_nothing_is_refused_and_a_sum_is_zero(y, weight):
    f, y, weight = torch.zeros(2, 3), torch.tensor(y), torch.tensor(weight)
    with pytest.raises(ValueError, match="a target of positive weight; got targets that are all"):
        criteria.cross_entropy(weight=weight).check(f, y)
    summed = criteria.cross_entropy("sum", weight=weight)
    assert all(x.abs().sum() == 0 for x in derivatives(expand_batch(summed, f, f, y)))


# --- saturated nets ---------------------------------------------------------------------------


def softmax_in_decimals(f, t):
    """Gradient p Σt − t, the size of what it subtracts, and Hessian (Σt) (diag(p) − ppᵀ)."""
    with localcontext(prec=400):
        e, t = [Decimal(x).exp() for x in f.tolist()], [Decimal(x) for x in t.tolist()]
        p, C = [x / sum(e) for x in e], range(len(e))
        gradient = [p[c] * sum(t) - t[c] for c in C]
        size = [p[c] * (sum(t) - t[c]) + t[c] * (1 - p[c]) for c in C]
        hessian = [[sum(t) * p[c] * ((b == c) - p[b]) for b in C] for c in C]
        return torch.tensor(
            [[*map(float, row)] for row in (gradient, size, *hessian)], dtype=FLOAT64
        )


@MANY
@given(
    st.lists(st.floats(-200, 200), min_size=2, max_size=4),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.booleans(),
    st.data(),
)
def test_cross_entropy_keeps_its_digits_when_saturated(logits, smoothing, weighted, data):
    f, C = torch.tensor(logits, dtype=FLOAT64), len(logits)
    y = torch.tensor(data.draw(st.integers(0, C - 1)))
    weight = (ramp(C) if weighted else torch.ones(C)).double()
    t = weight * ((1 - smoothing) * F.one_hot(y, C).double() + smoothing / C)
    gradient, size, *hessian = softmax_in_decimals(f, t)
    loss = criteria.cross_entropy("sum", weight=weight, label_smoothing=smoothing)
    _, slopes, curvature = derivatives(loss.expand(f[None], y[None]))
    torch.testing.assert_close(curvature[0], torch.stack(hessian), rtol=1e-11, atol=1e-190)
    assert ((slopes[0] - gradient).abs() <= 1e-11 * size + 1e-190).all()
    _, (alone,) = loss.gradient(f[None], y[None])
    assert ((alone - gradient).abs() <= 1e-11 * size + 1e-190).all()


@MANY
@given(st.floats(-200, 200), st.sampled_from([0.0, 1.0]), st.floats(0.1, 10), st.floats(0.1, 10))
def test_weighted_binary_cross_entropy_keeps_every_digit(logit, label, weight, pos_weight):
    f, y = (torch.tensor([[x]], dtype=FLOAT64) for x in (logit, label))
    weight, pos_weight = (torch.tensor(x, dtype=FLOAT64) for x in (weight, pos_weight))
    loss = criteria.bce_with_logits("sum", weight=weight, pos_weight=pos_weight)
    _, slope, curvature = derivatives(loss.expand(f, y))
    factor = weight * (pos_weight if label else 1)
    truth = -factor * torch.sigmoid(-f) if label else factor * torch.sigmoid(f)
    torch.testing.assert_close(slope, truth, rtol=1e-12, atol=0)
    truth = factor * torch.sigmoid(f) * torch.sigmoid(-f)
    torch.testing.assert_close(curvature[0], truth, rtol=1e-12, atol=0)


@given(st.floats(-700, 700), st.integers(0, 1000))
def test_poisson_is_right_for_any_rate(logarithm, count):
    f, y = torch.tensor([[logarithm]], dtype=FLOAT64), torch.tensor([[count]])
    _, slope, curvature = derivatives(criteria.poisson_nll("sum").expand(f, y))
    torch.testing.assert_close(slope, f.exp() - count, rtol=1e-15, atol=0)
    torch.testing.assert_close(curvature[0], f.exp(), rtol=1e-15, atol=1e-200)
    assert curvature > 0


# --- ensembles --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), FEW)
def test_an_ensemble_is_its_members(name, shape):
    _, y, options = batch(name, shape, FLOAT64)
    members = outputs_for(name, shape, members=(3,)).double()
    loss = as_loss(partial(CASES[name].function, **options))

    def expanded(f):
        expansion = expand_batch(loss, f, f, y)
        return stored(expansion.basis), *expansion[2:], *expansion[:1], *loss.gradient(f, y)

    found = vmap(expanded)(members)
    for n, member in enumerate(members):
        check_close([part[n] for part in found], expanded(member))


def test_an_ensemble_may_have_targets_of_its_own():
    f, y = torch.randn(3, 4, 3, 2, dtype=FLOAT64), torch.randint(3, (3, 4, 2))
    y[1, 0, 0] = -100
    loss = criteria.cross_entropy(label_smoothing=0.1, weight=ramp(3).double())
    found = vmap(lambda f, y: derivatives(expand_batch(loss, f, f, y)))(f, y)
    for n in range(3):
        check_close([x[n] for x in found], derivatives(expand_batch(loss, f[n], f[n], y[n])))
    y[1] = -100
    with pytest.raises(ValueError, match="all ignored"):
        vmap(lambda f, y: expand_batch(loss, f, f, y))(f, y)


# --- through the whole step -------------------------------------------------------------------

STEPS = {
    "tokens": (
        nn.CrossEntropyLoss(weight=ramp(3), label_smoothing=0.1, ignore_index=2),
        torch.tensor([[0, 1], [2, 1], [0, 0], [1, 2]]),
        (3, 2),
    ),
    "weighted mean": (
        partial(F.mse_loss, weight=ramp(4, 3, 2).double()), ramp(4, 3, 2), (3, 2)
    ),
    "counts": (nn.PoissonNLLLoss(), torch.arange(8).reshape(4, 2), (2,)),
    "gaussian": (partial(F.gaussian_nll_loss, var=0.3), ramp(4, 2), (2,)),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_every_option(name, dtype):
    criterion, y, shape = STEPS[name]
    X = torch.randn(4, 2, dtype=dtype)
    params = {"W": torch.randn(math.prod(shape), 2, dtype=dtype)}

    def model_fn(p, x):
        return torch.tanh(x @ p["W"].T).reshape(-1, *shape)

    def reference(f, y):
        wide = {"weight": ramp(3).double()} if name == "tokens" else {}
        if isinstance(criterion, nn.CrossEntropyLoss):
            return F.cross_entropy(f, y, label_smoothing=0.1, ignore_index=2, **wide)
        return criterion(f, y)

    truth = dense(model_fn, params, X, y, reference)
    result = newton_step(model_fn, params, X, cast(y, dtype), criterion, 0.1)
    assert error(result, solve(truth, 0.1)) < (1e-12 if dtype == FLOAT64 else 1e-5)


# --- refusals ---------------------------------------------------------------------------------

FACTORY_REFUSALS = [
    (criteria.huber, {"delta": 0.0}, ValueError, "delta must be a number > 0; got 0.0"),
    (criteria.huber, {"delta": "1"}, TypeError, "delta must be a number > 0; got '1'"),
    (criteria.huber, {"reduction": "none"}, ValueError, "one number; got reduction='none'"),
    (criteria.smooth_l1, {"beta": -1.0}, ValueError, "beta must be a number ≥ 0; got -1.0"),
    (criteria.smooth_l1, {"beta": True}, TypeError, "beta must be a number ≥ 0; got True"),
    (criteria.smooth_l1, {"beta": 0.0, "reduction": "none"}, ValueError, "reduction='none'"),
    (criteria.poisson_nll, {"eps": math.nan}, ValueError, "eps must be a number ≥ 0; got nan"),
    (criteria.gaussian_nll, {"eps": -1.0}, ValueError, "eps must be a number ≥ 0; got -1.0"),
    (criteria.mse, {"weight": 2.0}, TypeError, "weight must be a tensor or None; got float"),
    (criteria.mse, {"weight": torch.tensor([-1.0, 2.0])}, ValueError, "got numbers from -1 to 2"),
    (criteria.huber, {"weight": torch.tensor([math.nan])}, ValueError, "weight must hold finite"),
    (criteria.cross_entropy, {"weight": torch.tensor([1.0, -1.0])}, ValueError, "is not convex"),
    (criteria.cross_entropy, {"weight": torch.tensor([math.inf])}, ValueError, "finite numbers"),
    (criteria.cross_entropy, {"label_smoothing": 1.1}, ValueError, "in 0 to 1; got 1.1"),
    (criteria.cross_entropy, {"label_smoothing": -0.1}, ValueError, "in 0 to 1; got -0.1"),
    (criteria.cross_entropy, {"label_smoothing": None}, TypeError, "in 0 to 1; got None"),
    (criteria.bce_with_logits, {"weight": -torch.ones(2)}, ValueError, "weight must hold finite"),
    (criteria.bce_with_logits, {"pos_weight": -torch.ones(2)}, ValueError, "pos_weight must hold"),
]


@pytest.mark.parametrize(("factory", "options", "error", "message"), FACTORY_REFUSALS)
def test_factories_refuse_options(factory, options, error, message):
    with pytest.raises(error, match=message):
        factory(**options)


F42, Y42, ONES = torch.ones(4, 2), torch.ones(4, 2), torch.ones
BATCH_REFUSALS = {
    "mse weight": (criteria.mse(weight=ONES(2)), F42, Y42, r"weight: \[2\] instead of \[4, 2\]"),
    "mse weightless": (criteria.mse(weight=torch.zeros(4, 2)), F42, Y42, "positive weight"),
    "huber weight": (criteria.huber(weight=ONES(4)), F42, Y42, "weight must have the outputs' sh"),
    "bce weight": (criteria.bce_with_logits(weight=ONES(3)), F42, Y42, "weight must broadcast"),
    "bce larger": (
        criteria.bce_with_logits(pos_weight=ONES(3, 4, 2)),
        F42,
        Y42,
        r"pos_weight must broadcast to the outputs; got pos_weight: \[3, 4, 2\]",
    ),
    "class weight": (
        criteria.cross_entropy(weight=ONES(3)),
        F42,
        Y42,
        r"one entry a class; got weight: \[3\] instead of \[2\]",
    ),
    "classes on the last axis": (
        criteria.cross_entropy(),
        ONES(4, 5, 3),
        torch.zeros(4, 5, dtype=torch.long),
        r"got outputs: \[4, 5, 3\], y: \[4, 5\]\. Put the classes on axis 1",
    ),
    "class out of range": (
        criteria.cross_entropy(ignore_index=7),
        F42,
        torch.tensor([0, 7, 2, 1]),
        "must lie in 0 to 1 for 2 outputs; got indices from 0 to 2",
    ),
    "default ignore_index given up": (
        criteria.cross_entropy(ignore_index=0),
        F42,
        torch.tensor([0, -100, 1, 1]),
        "got indices from -100 to 1",
    ),
    "ignored probabilities": (
        criteria.cross_entropy(ignore_index=1),
        F42,
        Y42,
        "ignore_index is for class indices in y; got probabilities, and ignore_index=1",
    ),
    "counts": (criteria.poisson_nll(), F42, -Y42, "not be negative for a Poisson loss; got -1"),
    "counts' shape": (criteria.poisson_nll(), F42, ONES(4), "shape of the model's outputs"),
    "rates": (
        criteria.poisson_nll(log_input=False),
        -F42,
        Y42,
        "outputs must be rates above −eps; got -1. Let the model return logarithms",
    ),
    "variance negative": (criteria.gaussian_nll(), F42, (Y42, -Y42), "negative or nan; got -1"),
    "variance nan": (criteria.gaussian_nll(var=math.nan), F42, Y42, "negative or nan; got nan"),
    "variance shape": (
        criteria.gaussian_nll(var=ONES(1, 1)),
        F42,
        Y42,
        r"without the last at most; got outputs: \[4, 2\], var: \[1, 1\]",
    ),
    "variance without axes": (criteria.gaussian_nll(var=torch.tensor(1.0)), F42, Y42, r"var: \[\]"),
    "three": (criteria.gaussian_nll(), F42, (Y42, Y42, Y42), r"must be a tuple \(target, var\)"),
    "no variance": (
        criteria.gaussian_nll(),
        F42,
        Y42,
        r"y must be a tuple \(target, var\) for this loss; got Tensor",
    ),
    "variance of a kind": (criteria.gaussian_nll(var="1"), F42, Y42, "number or a tensor; got str"),
    "target's shape": (criteria.gaussian_nll(), F42, (ONES(4), Y42), "shape of the model's outp"),
    "huber integers": (criteria.huber(), F42, Y42.long(), "y must be floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCH_REFUSALS)
def test_losses_refuse_batches(name):
    loss, f, y, message = BATCH_REFUSALS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        loss.check(f, y)


def summed_margins(outputs, y):
    """Margins that no batch is the mean or the sum of."""
    losses = F.multi_margin_loss(outputs, y, reduction="none")
    return (losses * torch.arange(1, 4)).sum()


@pytest.mark.parametrize("loss", [nn.MultiMarginLoss(p=2), summed_margins])
def test_what_torch_differentiates_once_is_refused(loss):
    problem = lambda p, x: x @ p, torch.eye(3), torch.randn(3, 3), torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match=r"differentiates twice; .* with_curvature\("):
        newton_step(*problem, loss, 0.1)
    assert newton_step(*problem, criteria.empirical_fisher(loss), 0.1).any()
