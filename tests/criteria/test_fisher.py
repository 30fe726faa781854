"""The Fisher information against its definition, E ∇ℓ ∇ℓᵀ over targets that the model draws."""

import math
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
    monte_carlo,
    newton_step,
    weighted,
)
from ddnewton.criteria import Loss, as_loss, expand_batch, heteroscedastic_nll
from ddnewton.linearize.basis import written_out
from tests.methods import CLASSES, FLOAT32, FLOAT64, REDUCTIONS, TORCH_LOSSES, seeded
from tests.reference import autograd_derivatives, dense, error, solve

PAIRS = torch.linspace(-2, 2, 12, dtype=FLOAT64).mul(7).sin().reshape(6, 2)
REALS = torch.linspace(-1, 2, 6, dtype=FLOAT64).mul(5).cos()
LOG_P = torch.linspace(-2, 2, 15, dtype=FLOAT64).mul(7).sin().reshape(5, 3).log_softmax(1)
EXACT_GAUSSIAN = partial(F.gaussian_nll_loss, eps=0.0)


def second_order(criterion, f, y):
    """Value, gradients and curvatures of the batch's loss."""
    value, basis, z, h, R = expand_batch(as_loss(criterion), f, f, y)
    L = written_out(basis)
    slopes = torch.einsum("ncm,nm->nc", L, z) + R.sum(2)
    return value.mean(), slopes, torch.einsum("ncm,nm,nbm->ncb", L, h, L)


def assert_same(left, right, rtol=1e-11):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-13)


def torch_nll(f, y, **options):
    """Torch's own, of the mean and log-variance that the last axis holds."""
    return EXACT_GAUSSIAN(f[..., 0], y, f[..., 1].exp(), **options)


def plain_nll(f, y):
    """The same in plain words, without the branch in torch's that `vmap` cannot take."""
    return ((f[..., 1] + (y - f[..., 0]) ** 2 / f[..., 1].exp()) / 2).mean()


# --- a predicted mean and log-variance --------------------------------------------------------


@REDUCTIONS
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(6, 2), (3, 2, 2), (2, 1, 3, 2)])
def test_the_loss_of_a_mean_and_a_log_variance_is_torchs(reduction, full, shape):
    f = torch.linspace(-2, 2, math.prod(shape), dtype=FLOAT64).mul(7).sin().reshape(shape)
    y = f[..., 0].flip(0).cos()
    loss = heteroscedastic_nll(reduction, full=full)
    function = partial(torch_nll, reduction=reduction, full=full)
    slopes, hessians = autograd_derivatives(function, f, y)
    n = len(f)
    # By hand, as the Hessian has negative eigenvalues, which no batch may have.
    scale = n / loss.denominator(f, y)
    value, L, z, h, _ = loss.expand(f, y)
    torch.testing.assert_close(scale * value.mean(), function(f, y))
    slopes_of_L, hessians_of_L = L @ z[:, :, None], L @ torch.diag_embed(h) @ L.mT
    assert_same((scale * slopes_of_L[:, :, 0], scale * hessians_of_L), (n * slopes, n * hessians))
    value, r = loss.gradient(f, y)
    torch.testing.assert_close(scale * r, n * slopes, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(scale * value.mean(), function(f, y))
    # Targets of one axis more are the same ones.
    assert_same(loss.gradient(f, y[..., None]), (value, r))


@REDUCTIONS
def test_the_information_of_a_mean_and_a_log_variance(reduction):
    """diag(1 / v, 1 / 2), with torch's gradient."""
    criterion = fisher(heteroscedastic_nll(reduction))
    slopes, _ = autograd_derivatives(partial(torch_nll, reduction=reduction), PAIRS, REALS)
    _, found_slopes, found = second_order(criterion, PAIRS, REALS)
    scale = 1 if reduction == "mean" else 6
    information = torch.stack([(-PAIRS[:, 1]).exp(), torch.full((6,), 0.5)], 1)
    torch.testing.assert_close(found, scale * torch.diag_embed(information))
    torch.testing.assert_close(found_slopes, 6 * slopes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wrapper", [lambda loss: loss, fisher])
def test_the_mean_of_many_draws_is_the_information(wrapper):
    draws = 20_000
    drawn = as_loss(monte_carlo(wrapper(heteroscedastic_nll("sum")), draws, seeded()))
    f = PAIRS.reshape(3, 2, 2)
    expansion = drawn.expand(f, REALS.reshape(3, 2))
    columns = expansion.basis
    squares = torch.einsum("ncd,nbd->dncb", columns, columns)
    truth = torch.diag_embed(
        torch.stack([(-f[..., 1]).exp(), torch.full((3, 2), 0.5)], -1).flatten(1)
    )
    assert ((squares.mean(0) - truth).abs() <= 5 * squares.std(0) / draws**0.5 + 1e-12).all()
    assert columns.mean(2).abs().amax() < 0.1  # an expected gradient of zero
    assert expansion.R.shape == (3, 4, 1)


class Net:
    """A net that predicts means and log-variances of data whose noise changes."""

    def __init__(self, dtype=FLOAT64):
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.params = {name: p.detach() for name, p in net.named_parameters()}
        self.model_fn = partial(torch.func.functional_call, net)
        self.X = torch.linspace(-1, 1, 200, dtype=dtype)[:, None]
        noise = torch.randn(200, generator=seeded()).to(dtype)
        self.y = (3 * self.X[:, 0]).sin() + (self.X[:, 0] - 2).exp() * noise


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_a_step_of_fisher_scoring(dtype):
    net = Net(dtype)

    def derivatives(loss, f, y):
        information = torch.stack([(-f[:, 1]).exp(), torch.full_like(f[:, 1], 0.5)], 1)
        return autograd_derivatives(loss, f, y)[0], torch.diag_embed(information) / len(f)

    truth = dense(net.model_fn, net.params, net.X, net.y, torch_nll, derivatives)
    for criterion in (fisher(heteroscedastic_nll()), fisher(plain_nll)):
        step = newton_step(net.model_fn, net.params, net.X, net.y, criterion, 0.1)
        assert error(step, solve(truth, 0.1)) < (1e-10 if dtype == FLOAT64 else 1e-5)


def test_a_fit_of_mean_and_variance_finds_both():
    net = Net()
    optimizer = directional_newton(net.model_fn, fisher(heteroscedastic_nll()))
    params, state = net.params, optimizer.init(net.params)
    for _ in range(40):
        params, state, _ = optimizer.update(params, state, net.X, net.y)
    f = net.model_fn(params, net.X)
    assert (f[:, 0] - (3 * net.X[:, 0]).sin()).abs().mean() < 0.05
    assert (f[:, 1] / 2 - (net.X[:, 0] - 2)).abs().mean() < 0.3


# --- where the Hessian is the information -----------------------------------------------------

NATURAL = [name for name, loss in TORCH_LOSSES.items() if loss.draws]


@pytest.mark.parametrize("name", NATURAL)
@REDUCTIONS
def test_natural_parameters_have_their_hessian(name, reduction):
    case = TORCH_LOSSES[name]
    f = LOG_P * 2
    criterion = case.module(reduction=reduction)
    assert_same(
        second_order(fisher(criterion), f, case.y), second_order(criterion, f, case.y), rtol=0
    )


# --- outputs that are no natural parameters ---------------------------------------------------


@REDUCTIONS
def test_rates_of_counts(reduction):
    rates = LOG_P.exp() * 4
    criterion = nn.PoissonNLLLoss(log_input=False, eps=0.0, reduction=reduction)
    _, slopes, found = second_order(fisher(criterion), rates, CLASSES[:, None].expand(5, 3))
    d = 15 if reduction == "mean" else 1
    torch.testing.assert_close(found, 5 / d * torch.diag_embed(1 / rates))
    plain = second_order(criterion, rates, CLASSES[:, None].expand(5, 3))
    torch.testing.assert_close(slopes, plain[1])


IGNORED = torch.tensor([0, 2, -100, 1, 0])
TOKENS = torch.tensor([[0, 2], [1, -100], [2, 2], [0, 1], [1, 1]])
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 2.5], dtype=FLOAT64)


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("y", [CLASSES, IGNORED, TOKENS], ids=["classes", "ignored", "tokens"])
@REDUCTIONS
def test_the_loss_of_log_probabilities_is_torchs(weight, y, reduction):
    f = LOG_P if y.ndim == 1 else torch.stack([LOG_P, LOG_P.flip(1)], 2)
    criterion = nn.NLLLoss(weight, reduction=reduction)
    slopes, _ = autograd_derivatives(criterion, f, y)
    value, found_slopes, found = second_order(criterion, f, y)
    torch.testing.assert_close(value, criterion(f, y))
    torch.testing.assert_close(found_slopes, 5 * slopes, rtol=1e-12, atol=1e-14)
    assert (found == 0).all()


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@pytest.mark.parametrize("y", [CLASSES, IGNORED, TOKENS], ids=["classes", "ignored", "tokens"])
@REDUCTIONS
def test_log_probabilities_make_the_step_of_logits(weight, y, reduction):
    params = {"W": torch.randn(2, 3, dtype=FLOAT64), "V": torch.randn(2, 3, dtype=FLOAT64)}
    X = torch.linspace(-1, 1, 10, dtype=FLOAT64).reshape(5, 2).cos()

    def logits(p, x):
        return x @ p["W"] if y.ndim == 1 else torch.stack([x @ p["W"], x @ p["V"]], 2)

    def log_p(p, x):
        return logits(p, x).log_softmax(1)

    step = newton_step(log_p, params, X, y, fisher(nn.NLLLoss(weight, reduction=reduction)), 0.1)
    of_logits = nn.CrossEntropyLoss(weight, reduction=reduction)
    assert error(step, newton_step(logits, params, X, y, of_logits, 0.1)) < 1e-11


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
@REDUCTIONS
def test_probabilities_make_the_step_of_logits(weight, reduction):
    params = {"W": torch.randn(2, 3, dtype=FLOAT64)}
    X = torch.linspace(-1, 1, 10, dtype=FLOAT64).reshape(5, 2).cos()
    y = F.one_hot(CLASSES, 3).double()
    step = newton_step(
        lambda p, x: (x @ p["W"]).sigmoid(),
        params,
        X,
        y,
        fisher(nn.BCELoss(weight, reduction=reduction)),
        0.1,
    )
    of_logits = nn.BCEWithLogitsLoss(weight, reduction=reduction)
    expected = newton_step(lambda p, x: x @ p["W"], params, X, y, of_logits, 0.1)
    assert error(step, expected) < 1e-11


# --- functions that are quadratic in y --------------------------------------------------------


def softplus_nll(f, y):
    return EXACT_GAUSSIAN(f[:, :1], y[:, None], F.softplus(f[:, 1:]))


def precision_nll(f, y):
    """Of a mean and the root of a precision, summed."""
    return (f[:, 1] ** 2 * (y - f[:, 0]) ** 2 / 2 - f[:, 1].abs().log()).sum()


def correlated_nll(f, y):
    """Two targets with a Cholesky factor of their precision: a b; 0 c."""
    white = torch.stack(
        [f[:, 2].exp() * (y[:, 0] - f[:, 0]), f[:, 3] * (y[:, 0] - f[:, 0]) + y[:, 1] - f[:, 1]], 1
    )
    return ((white**2).sum(1) / 2 - f[:, 2]).mean()


def expected_square(function, f, mean, root, order=8):
    """E ∇ℓ ∇ℓᵀ for y ~ N(mean, root rootᵀ), by Gauss-Hermite quadrature in every direction."""
    import numpy as np

    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(order))
    weights = weights / weights.sum()
    total = 0
    k = len(mean)
    for index in torch.cartesian_prod(*[torch.arange(order)] * k).reshape(-1, k):
        y = (mean + root @ nodes[index])[None]
        u = f[None].clone().requires_grad_()
        (s,) = torch.autograd.grad(function(u, y if k > 1 else y[:, 0]), u)
        total = total + weights[index].prod() * torch.outer(s[0], s[0])
    return total


@pytest.mark.parametrize(
    ("function", "variance"),
    [
        (torch_nll, lambda f: f[1].exp()),
        (plain_nll, lambda f: f[1].exp()),
        (softplus_nll, lambda f: F.softplus(f[1])),
        (precision_nll, lambda f: f[1] ** -2),
    ],
)
def test_the_information_of_any_gaussian(function, variance):
    denominator = 1 if function is precision_nll else 6
    _, slopes, found = second_order(fisher(function), PAIRS, REALS)
    expected, _ = autograd_derivatives(function, PAIRS, REALS)
    torch.testing.assert_close(slopes, 6 * expected, rtol=1e-12, atol=1e-13)
    for n, f in enumerate(PAIRS):
        root = variance(f).sqrt().reshape(1, 1)
        truth = expected_square(function, f, f[:1], root)
        torch.testing.assert_close(found[n], 6 / denominator * truth, rtol=1e-9, atol=1e-10)


def test_the_information_of_a_covariance():
    f = PAIRS.reshape(3, 4)
    _, _, found = second_order(fisher(correlated_nll), f, PAIRS[:3])
    for n in range(3):
        a, b = f[n, 2].exp(), f[n, 3]
        factor = torch.stack([torch.stack([a, 0 * a]), torch.stack([b, 1 + 0 * b])])
        truth = expected_square(correlated_nll, f[n], f[n, :2], torch.linalg.inv(factor))
        torch.testing.assert_close(found[n], truth, rtol=1e-9, atol=1e-10)


@given(st.floats(0.01, 100), st.integers(1, 3))
def test_a_factor_of_a_likelihood_is_found(factor, targets):
    """That of a mean over a sample's targets, and one on top: F of ℓ = a (−log p) is a F."""
    f = PAIRS.repeat(1, targets).reshape(6, targets, 2)
    f = f + torch.arange(targets)[:, None] / 3
    y = f[..., 0].cos()

    def function(f, y):
        return factor * plain_nll(f, y)

    expected = second_order(fisher(weighted(heteroscedastic_nll(), factor)), f, y)
    by_function = second_order(fisher(function), f, y)
    per_factor = ([part / factor for part in parts] for parts in (by_function, expected))
    assert_same(*per_factor, rtol=1e-8)


def test_members_of_an_ensemble_are_as_if_alone():
    members = torch.stack([PAIRS, PAIRS.flip(0) / 2])
    for criterion in (fisher(heteroscedastic_nll()), fisher(plain_nll)):

        def curvature(f, criterion=criterion):
            return second_order(criterion, f, REALS)[2]

        for found, f in zip(vmap(curvature)(members), members, strict=True):
            torch.testing.assert_close(found, curvature(f), rtol=1e-8, atol=1e-9)


# --- refusals ---------------------------------------------------------------------------------

NO_LIKELIHOOD = {
    "huber": (nn.HuberLoss(), "got HuberLoss"),
    "function": (F.smooth_l1_loss, "got smooth_l1_loss"),
    "record": (Loss(lambda f, y: None, lambda f, y: 1.0, lambda f, y: None), "a Loss without"),
    "empirical": (empirical_fisher(nn.MSELoss()), "got a Loss without scores"),
    "drawn": (monte_carlo(nn.MSELoss(), 1, seeded()), "got monte_carlo of one"),
}


@pytest.mark.parametrize("name", NO_LIKELIHOOD)
def test_what_has_no_likelihood_is_refused(name):
    criterion, message = NO_LIKELIHOOD[name]
    with pytest.raises(ValueError, match=rf"^fisher: criterion must .*{message}"):
        fisher(criterion)


def cauchy(f, y):
    return ((f[:, 0] - y) ** 2).log1p().mean()


def without_log(f, y):
    return ((f[:, 0] - y) ** 2 / f[:, 1].exp()).mean()


def with_prior(f, y):
    return plain_nll(f, y) + (f**2).mean()


IN_A_BATCH = {
    "not quadratic": (cauchy, PAIRS, REALS, "not quadratic in y"),
    "flat": (lambda f, y: (f[:, 0] * y).mean(), PAIRS, REALS, "flat in y"),
    "no log-variance": (without_log, PAIRS, REALS, "its expected gradient is not zero"),
    "a prior": (with_prior, PAIRS, REALS, "its expected gradient is not zero"),
    "classes": (
        lambda f, y: F.cross_entropy(2 * f, y),
        LOG_P,
        CLASSES,
        "got a function, and torch.int",
    ),
    "parts": (lambda f, y: (f[:, 0] - y[0]).square().mean(), PAIRS, (REALS, REALS), "a tuple as y"),
    "logits": (nn.NLLLoss(), 5 * LOG_P, CLASSES, "must be log-probabilities"),
    "shares": (nn.NLLLoss(), LOG_P, LOG_P.exp(), "class indices for this loss"),
    "one output": (heteroscedastic_nll(), PAIRS[:, :1], REALS, r"log-variance on the last axis"),
    "no axis": (heteroscedastic_nll(), REALS, REALS, r"log-variance on the last axis"),
    "targets": (heteroscedastic_nll(), PAIRS, PAIRS, "y must have the shape"),
}


@pytest.mark.parametrize("name", IN_A_BATCH)
def test_a_batch_that_does_not_fit_is_refused(name):
    criterion, f, y, message = IN_A_BATCH[name]
    with pytest.raises((ValueError, TypeError), match=message):
        second_order(fisher(criterion), f, y)


def test_the_loss_itself_is_not_convex_and_the_message_says_so():
    net = Net()
    with pytest.raises(ValueError, match=r"convex in the outputs.*pass clipped\(criterion\)"):
        newton_step(net.model_fn, net.params, net.X, net.y, heteroscedastic_nll(), 0.1)
    step = newton_step(net.model_fn, net.params, net.X, net.y, clipped(heteroscedastic_nll()), 0.1)
    assert step["0.weight"].isfinite().all()
    with pytest.raises(ValueError, match="must reduce to one number"):
        heteroscedastic_nll("none")
