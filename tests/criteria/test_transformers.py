"""Criteria of criteria: a factor, no negative curvature, another's curvature; and all nested."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

from ddnewton import (
    clipped,
    directional_newton,
    empirical_fisher,
    fisher,
    ggn_eigvalsh,
    majorized,
    monte_carlo,
    newton_step,
    weighted,
    with_curvature,
)
from ddnewton.criteria import Loss, MonteCarlo, as_loss, expand_batch, heteroscedastic_nll
from ddnewton.criteria.loss import Expansion
from tests.methods import CLASSES, FLOAT64, TORCH_LOSSES, seeded
from tests.reference import autograd_derivatives, dense, error, solve

LOGITS = torch.linspace(-2, 2, 15, dtype=FLOAT64).reshape(5, 3).mul(7).sin()


def focal(f, y):
    """Convex where the class is likely, and not where it is not."""
    nll = F.cross_entropy(f, y, reduction="none")
    return ((1 - (-nll).exp()) ** 2 * nll).mean()


def mixture(f, y):
    """Two Gaussians: negative curvature between them."""
    return -torch.logaddexp(-((f - y - 1) ** 2), -((f - y + 1) ** 2)).sum()


def second_order(criterion, f, y):
    """Value, gradients and curvatures of the batch, as a step is made of them."""
    value, L, z, h, R = expand_batch(as_loss(criterion), f, f, y)
    slopes = torch.einsum("ncm,nm->nc", L, z) + R.sum(2)
    return value.mean(), slopes, torch.einsum("ncm,nm,nbm->ncb", L, h, L)


def assert_same(left, right, factor=1.0):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, factor * other, rtol=1e-12, atol=1e-14)


class Problem:
    """A net of tanh and its batch."""

    X = torch.linspace(-1, 1, 10, dtype=FLOAT64).reshape(5, 2).cos()

    def __init__(self):
        self.params = {"W": torch.randn(2, 4, dtype=FLOAT64), "V": torch.randn(4, 3, dtype=FLOAT64)}

    def model_fn(self, p, x):
        return torch.tanh(x @ p["W"]) @ p["V"]

    def step(self, criterion, y):
        arguments = (self.model_fn, self.params, self.X, y, criterion, 0.1)
        return newton_step(*arguments, complement=0.1)

    def reference(self, criterion, y, derivatives):
        return solve(dense(self.model_fn, self.params, self.X, y, criterion, derivatives), 0.1)


# --- weighted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [3, 0.25, torch.tensor(2.5), torch.tensor(7)])
def test_a_weight_scales_all_of_a_loss(name, reduction, weight):
    case = TORCH_LOSSES[name]
    criterion = case.module(reduction=reduction)
    loss = weighted(criterion, weight)
    assert_same(
        second_order(loss, LOGITS, case.y), second_order(criterion, LOGITS, case.y), float(weight)
    )
    value, slopes = loss.gradient(LOGITS, case.y)
    torch.testing.assert_close(value, float(weight) * as_loss(criterion).expand(LOGITS, case.y)[0])
    assert slopes.shape == (5, 3)
    assert loss.denominator(LOGITS, case.y) == as_loss(criterion).denominator(LOGITS, case.y)


def test_a_weight_scales_every_kind_of_curvature():
    inner = {
        "callable": focal,
        "drawn": monte_carlo(nn.CrossEntropyLoss(), 2, seeded()),
        "empirical": empirical_fisher(nn.CrossEntropyLoss()),
    }
    for criterion in (clipped(inner["callable"]), inner["empirical"]):
        assert_same(
            second_order(weighted(criterion, 3.0), LOGITS, CLASSES),
            second_order(criterion, LOGITS, CLASSES),
            3.0,
        )
    drawn = weighted(inner["drawn"], 3.0)
    assert isinstance(drawn, MonteCarlo)
    again = monte_carlo(weighted(nn.CrossEntropyLoss(), 3.0), 2, seeded())
    plain = second_order(monte_carlo(nn.CrossEntropyLoss(), 2, seeded()), LOGITS, CLASSES)
    assert_same(second_order(drawn, LOGITS, CLASSES), plain, 3.0)
    assert_same(second_order(again, LOGITS, CLASSES), plain, 3.0)
    _, r, plain = second_order(empirical_fisher(nn.CrossEntropyLoss()), LOGITS, CLASSES)
    squared = empirical_fisher(weighted(nn.CrossEntropyLoss(), 3.0))
    assert_same(second_order(squared, LOGITS, CLASSES)[1:], (3 * r, 9 * plain))


def test_a_weight_under_vmap():
    """An ensemble of weights, each as if alone; and dampings that grow with them."""
    problem, weights = Problem(), torch.tensor([0.5, 2.0, 4.0], dtype=FLOAT64)

    def evals(weight):
        criterion = weighted(nn.CrossEntropyLoss(), weight)
        return ggn_eigvalsh(problem.model_fn, problem.params, problem.X, CLASSES, criterion)

    plain = evals(1.0)
    torch.testing.assert_close(vmap(evals)(weights), weights[:, None] * plain)
    step = newton_step(problem.model_fn, problem.params, problem.X, CLASSES, smoothed(), 0.1)
    scaled = weighted(smoothed(), 4.0)
    again = newton_step(problem.model_fn, problem.params, problem.X, CLASSES, scaled, 0.4)
    assert error(again, step) < 1e-12


def smoothed():
    return nn.CrossEntropyLoss(label_smoothing=0.1)


WEIGHTS = {
    "zero": (0, ValueError, r"^weighted: weight must be a number > 0; got 0\. Leave a term out"),
    "negative": (-1.5, ValueError, r"got -1\.5"),
    "nan": (float("nan"), ValueError, r"got nan"),
    "infinite": (float("inf"), ValueError, r"got inf"),
    "zero tensor": (torch.tensor(0.0), ValueError, r"got 0\."),
    "nan tensor": (torch.tensor(float("nan")), ValueError, r"got nan"),
    "vector": (torch.ones(5), ValueError, r"got a tensor of shape \[5\]\. Give each output"),
    "bool": (True, TypeError, r"got True\. Pass a float"),
    "text": ("2", TypeError, r"got '2'"),
    "none": (None, TypeError, r"got None"),
    "bool tensor": (torch.tensor(True), TypeError, r"dtype torch\.bool"),
    "complex": (torch.tensor(1j), TypeError, r"dtype torch\.complex64"),
    "trained": (torch.ones((), requires_grad=True), ValueError, r"pass weight\.detach\(\)"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_other_weight_is_taken(name):
    weight, kind, message = WEIGHTS[name]
    with pytest.raises(kind, match=message):
        weighted(nn.MSELoss(), weight)


def test_a_weight_under_vmap_is_checked_in_all_members():
    def value(weight):
        return weighted(nn.MSELoss(), weight).expand(LOGITS, 0 * LOGITS).value

    with pytest.raises(ValueError, match="weight must be a number > 0; got -1"):
        vmap(value)(torch.tensor([1.0, -1.0]))


# --- clipped ----------------------------------------------------------------------------------

NOT_CONVEX = {
    "focal": (focal, CLASSES),
    "mixture": (mixture, 0.3 * LOGITS),
    "waves": (lambda f, y: (1 - torch.cos(3 * (f - y))).mean(), 0.3 * LOGITS),
    "convex": (F.cross_entropy, CLASSES),
}


def without_negative(loss, f, y):
    slopes, hessians = autograd_derivatives(loss, f, y)
    h, Q = torch.linalg.eigh(hessians)
    return slopes, Q @ torch.diag_embed(h.clamp(min=0)) @ Q.mT


@pytest.mark.parametrize("name", NOT_CONVEX)
def test_negative_eigenvalues_count_as_zero(name):
    criterion, y = NOT_CONVEX[name]
    f = 2 * LOGITS
    slopes, hessians = without_negative(criterion, f, y)
    _, found_slopes, found = second_order(clipped(criterion), f, y)
    torch.testing.assert_close(found_slopes / 5, slopes, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found / 5, hessians, rtol=1e-10, atol=1e-13)
    problem = Problem()
    truth = problem.reference(criterion, y, without_negative)
    assert error(problem.step(clipped(criterion), y), truth) < 1e-10


@given(st.integers(0, 10**6))
def test_clipping_a_random_quadratic(seed):
    """½ uᵀ S u + bᵀu with any symmetric S, S from a record whose L is no eigenvectors' too."""
    source = seeded(seed)
    S = torch.randn(3, 3, dtype=FLOAT64, generator=source)
    S, b = S + S.T, torch.randn(3, dtype=FLOAT64, generator=source)

    def quadratic(f, y):
        return (f @ S * f).sum() / 2 + (f * b).sum()

    L = torch.randn(3, 3, dtype=FLOAT64, generator=source) + 3 * torch.eye(3, dtype=FLOAT64)
    h = torch.tensor([2.0, -1.0, 0.5], dtype=FLOAT64)

    def expand(f, y):
        basis = L.expand(len(f), 3, 3)
        H = L @ torch.diag(h) @ L.T
        z = torch.linalg.solve(L, H @ f.T).T
        return Expansion((f @ H * f).sum(1) / 2, basis, z, h.expand(len(f), 3), basis[:, :, :0])

    record = Loss(expand, lambda f, y: 1.0, lambda f, y: None)
    for criterion, H, g in (
        (quadratic, S, LOGITS @ S + b),
        (record, L @ torch.diag(h) @ L.T, LOGITS @ (L @ torch.diag(h) @ L.T)),
    ):
        values, vectors = torch.linalg.eigh(H)
        _, slopes, found = second_order(clipped(criterion), LOGITS, CLASSES)
        torch.testing.assert_close(slopes / 5, g, rtol=1e-11, atol=1e-11)
        nearest = (vectors * values.clamp(min=0)) @ vectors.T
        torch.testing.assert_close(found / 5, nearest.expand(5, 3, 3), rtol=1e-10, atol=1e-10)


def test_flat_directions_have_no_curvature():
    """Rounding is none: h is exactly zero."""
    h = clipped(lambda f, y: ((f.sum(1) - 1) ** 2).sum()).expand(LOGITS, CLASSES).h
    assert (h[:, :2] == 0).all()
    assert (h[:, 2] > 1).all()


def test_training_by_focal_loss():
    """Where the criterion itself stops in some update, and not with its negative curvature out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
    params = {name: 5 * p.detach() for name, p in net.named_parameters()}
    X = torch.randn(64, 3)
    y = X.argmax(1)

    def last_loss(criterion):
        optimizer = directional_newton(partial(torch.func.functional_call, net), criterion)
        moving, state = params, optimizer.init(params)
        for _ in range(40):
            moving, state, info = optimizer.update(moving, state, X, y)
        return float(info.loss_after)

    assert last_loss(clipped(focal)) < 1e-3  # from 4
    with pytest.raises(ValueError, match=r"convex in the outputs.*pass clipped\(criterion\)"):
        last_loss(focal)


# --- with_curvature ---------------------------------------------------------------------------

ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, -0.3, 1.5], dtype=FLOAT64)


def surrogate(f, y):
    """A policy's objective: advantages of both signs."""
    return (y[1] * F.cross_entropy(f, y[0], reduction="none")).mean()


def of_actions(f, y):
    return F.cross_entropy(f, y[0])


def test_the_natural_gradient_of_a_policy():
    y = (CLASSES, ADVANTAGES)

    def derivatives(loss, f, y):
        return autograd_derivatives(surrogate, f, y)[0], autograd_derivatives(of_actions, f, y)[1]

    problem = Problem()
    criterion = with_curvature(surrogate, of_actions)
    truth = problem.reference(surrogate, y, derivatives)
    assert error(problem.step(criterion, y), truth) < 1e-11


REDUCTIONS = [("mean", "mean"), ("mean", "sum"), ("sum", "mean"), ("sum", "sum")]


@pytest.mark.parametrize(("of_loss", "of_metric"), REDUCTIONS)
def test_either_has_its_own_reduction(of_loss, of_metric):
    """Of a loss that divides by N C, and a metric by N; class weights in a third."""
    for metric in (
        nn.CrossEntropyLoss(reduction=of_metric),
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.3]).double(), reduction=of_metric),
    ):
        loss = nn.SmoothL1Loss(reduction=of_loss)
        y = F.one_hot(CLASSES, 3).double()

        def of_probabilities(f, y, metric=metric):
            return metric(f, y.argmax(1))

        if metric.weight is None:
            plain = of_probabilities
        else:
            plain = partial(F.cross_entropy, weight=metric.weight, reduction=of_metric)
        found = second_order(with_curvature(loss, plain), LOGITS, y)
        value, slopes, _ = second_order(loss, LOGITS, y)
        assert_same(found, (value, slopes, second_order(plain, LOGITS, y)[2]))


def test_a_metric_may_be_drawn():
    """In expectation, and with the seed of each call: the metric's own draws, on its own scale."""
    drawn = with_curvature(nn.L1Loss(reduction="sum"), monte_carlo(nn.MSELoss(), 4, seeded()))
    assert isinstance(drawn, MonteCarlo)
    y = 0 * LOGITS
    _, slopes, curvature = second_order(drawn, LOGITS, y)
    metric = second_order(monte_carlo(nn.MSELoss(), 4, seeded()), LOGITS, y)
    torch.testing.assert_close(curvature, metric[2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slopes / 5, LOGITS.sign())


def test_both_are_checked():
    y = torch.zeros(5, 3, dtype=FLOAT64)
    for criterion in (
        with_curvature(nn.CrossEntropyLoss(), F.mse_loss),
        with_curvature(F.mse_loss, nn.CrossEntropyLoss()),
    ):
        with pytest.raises((ValueError, TypeError), match="y must"):
            expand_batch(criterion, LOGITS, LOGITS, CLASSES.int())
        expand_batch(criterion, LOGITS, LOGITS, y + 1 / 3)
    with pytest.raises(ValueError, match="convex in the outputs"):
        expand_batch(with_curvature(F.mse_loss, mixture), LOGITS, LOGITS, y)
    expand_batch(with_curvature(mixture, F.mse_loss), LOGITS, LOGITS, y)


# --- nested -----------------------------------------------------------------------------------

REALS = 0.5 * LOGITS.flip(0)
WRAPPERS = {
    "weighted": lambda criterion: weighted(criterion, 2.0),
    "majorized": majorized,
    "fisher": fisher,
    "clipped": clipped,
    "metric": lambda criterion: with_curvature(nn.L1Loss(), criterion),
    "criterion": lambda criterion: with_curvature(criterion, nn.MSELoss()),
    "empirical_fisher": empirical_fisher,
    "monte_carlo": lambda criterion: monte_carlo(criterion, 2, seeded()),
}
REFUSED = {
    # of what is drawn only a weight, and another's gradient
    **{(outer, "monte_carlo"): "got monte_carlo of one" for outer in WRAPPERS},
    # curvature that replaced another has no likelihood
    **{
        (outer, inner): "must have a likelihood.*a Loss without scores"
        for outer in ("fisher", "monte_carlo")
        for inner in ("majorized", "empirical_fisher")
    },
}
del REFUSED["weighted", "monte_carlo"], REFUSED["metric", "monte_carlo"]


@pytest.mark.parametrize("inner", WRAPPERS)
@pytest.mark.parametrize("outer", WRAPPERS)
def test_they_nest(outer, inner):
    """The outermost says what the curvature is; the gradient is the loss's own."""
    if (outer, inner) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[outer, inner]):
            WRAPPERS[outer](WRAPPERS[inner](nn.MSELoss()))
        return
    both = WRAPPERS[outer](WRAPPERS[inner](nn.MSELoss()))
    value, slopes, curvature = second_order(both, LOGITS, REALS)
    # The gradient of the loss, with the factor that it has here.
    base = nn.L1Loss() if "metric" in {outer, inner} else nn.MSELoss()
    factor = 2.0 ** ([outer, inner].count("weighted") if outer != "metric" else 0)
    f = LOGITS.clone().requires_grad_()
    loss = base(f, REALS)
    (expected,) = torch.autograd.grad(loss, f)
    torch.testing.assert_close(value, factor * loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes / 5, factor * expected, rtol=1e-12, atol=1e-15)
    assert curvature.isfinite().all()
    # The curvature is semi-definite, and a step can be made of it.
    assert (torch.linalg.eigvalsh(curvature) >= -1e-12).all()
    assert Problem().step(both, REALS)["W"].isfinite().all()


def test_the_curvature_of_a_few_nests():
    """Two of a weight are four; a weight on either side of what replaces a curvature."""
    twice = second_order(weighted(weighted(nn.MSELoss(), 2.0), 2.0), LOGITS, REALS)
    assert_same(twice, second_order(nn.MSELoss(), LOGITS, REALS), 4.0)
    y = 3 * REALS
    for wrapper in (majorized, clipped):
        inside = second_order(wrapper(weighted(nn.HuberLoss(), 2.0)), LOGITS, y)
        outside = second_order(weighted(wrapper(nn.HuberLoss()), 2.0), LOGITS, y)
        assert_same(inside, outside)
    pairs = LOGITS[:, :2]
    inside = second_order(fisher(weighted(heteroscedastic_nll(), 2.0)), pairs, LOGITS[:, 2])
    outside = second_order(weighted(fisher(heteroscedastic_nll()), 2.0), pairs, LOGITS[:, 2])
    assert_same(inside, outside)


@pytest.mark.parametrize("wrapper", [clipped, fisher, majorized, partial(weighted, weight=2.0)])
def test_what_is_no_loss_is_refused(wrapper):
    with pytest.raises(TypeError, match=r"criterion must be a loss function; got 3"):
        wrapper(3)
    with pytest.raises(TypeError, match=r"criterion must be a loss function"):
        wrapper(nn.MSELoss)


def test_a_drawn_criterion_has_no_gradient_of_its_own():
    drawn = monte_carlo(nn.MSELoss(), 1, seeded())
    with pytest.raises(ValueError, match=r"^with_curvature: .*as the metric"):
        with_curvature(drawn, nn.MSELoss())
    with pytest.raises(TypeError, match=r"^with_curvature: criterion must be a loss function"):
        with_curvature(nn.MSELoss(), "mse")
    with pytest.raises(ValueError, match=r"^clipped: .*what is drawn is never negative"):
        clipped(drawn)
