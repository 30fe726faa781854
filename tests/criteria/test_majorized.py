"""Iteratively reweighted least squares: ψ(r) / r, whatever the loss, and fits from far away."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares
from torch import nn
from torch.func import vmap

from ddnewton import (
    clipped,
    directional_newton,
    fit,
    majorized,
    monte_carlo,
    newton_step,
    weighted,
)
from ddnewton.criteria import Loss, expand_batch, mse
from tests.methods import FLOAT32, FLOAT64, seeded
from tests.reference import autograd_derivatives, dense, error, solve

SAMPLES = 6


def residuals():
    """Zero, tiny, small and large ones, of both signs, at targets that are no round numbers."""
    r = torch.tensor([0.0, 1e-9, -0.3, 0.8, -1.7, 40.0, 0.05, -1e-13, 2.5, -3.0, 0.9, -7.0])
    return r.double().reshape(SAMPLES, 2)


def targets():
    return torch.linspace(-2, 3, 2 * SAMPLES, dtype=FLOAT64).reshape(SAMPLES, 2).sin()


def mean_of(term):
    return lambda f, y: term(f - y).mean()


# Each case: a criterion, and ψ(r) / r of a term on paper.
WEIGHT = torch.linspace(0, 2, 2 * SAMPLES, dtype=FLOAT64).reshape(SAMPLES, 2)
SMOOTH = {
    "mse": (nn.MSELoss(), lambda r: 2 + 0 * r),
    "huber": (nn.HuberLoss(delta=0.7), lambda r: (0.7 / r.abs()).clamp(max=1)),
    "huber, sum": (nn.HuberLoss(reduction="sum"), lambda r: (1 / r.abs()).clamp(max=1)),
    "smooth_l1": (nn.SmoothL1Loss(beta=0.5), lambda r: (1 / r.abs()).clamp(max=2)),
    "cauchy": (mean_of(lambda r: (r**2).log1p()), lambda r: 2 / (1 + r**2)),
    "student_t": (mean_of(lambda r: 2.5 * (r**2 / 4).log1p()), lambda r: 5 / (4 + r**2)),
    "geman_mcclure": (mean_of(lambda r: r**2 / (1 + r**2)), lambda r: 2 / (1 + r**2) ** 2),
    "log_cosh": (
        mean_of(lambda r: F.softplus(2 * r) - r),
        lambda r: torch.where(r.abs() < 1e-8, 1, r.tanh() / torch.where(r == 0, 1, r)),
    ),
    "pseudo_huber": (mean_of(lambda r: (1 + r**2).sqrt()), lambda r: (1 + r**2).rsqrt()),
    "tukey": (
        mean_of(lambda r: torch.where(r.abs() < 3, 1 - (1 - r**2 / 9) ** 3, 1)),
        lambda r: torch.where(r.abs() < 3, 2 / 3 * (1 - r**2 / 9) ** 2, 0),
    ),
}


def floored(r):
    return r.abs().clamp(min=r.abs().mean() / 100)


KINKED = {
    "l1": (nn.L1Loss(), lambda r: 1 / floored(r)),
    "l1, sum": (nn.L1Loss(reduction="sum"), lambda r: 1 / floored(r)),
    "smooth_l1, beta 0": (nn.SmoothL1Loss(beta=0.0), lambda r: 1 / floored(r)),
    "pinball": (mean_of(lambda r: torch.maximum(0.1 * r, -0.9 * r)), lambda r: 0.5 / floored(r)),
    "power": (mean_of(lambda r: r.abs() ** 1.5), lambda r: 1.5 * floored(r) ** -0.5),
}
CASES = SMOOTH | KINKED


def derivatives_by(curvature):
    """Of the batch: autograd's gradient, and ψ(r) / r on the diagonal, in the reduction's scale."""

    def derivatives(loss, f, y):
        slopes, _ = autograd_derivatives(loss, f, y)
        scale = 1.0 if getattr(loss, "reduction", "mean") == "sum" else 1 / f.numel()
        return slopes, scale * torch.diag_embed(curvature(f - y).flatten(1))

    return derivatives


@pytest.mark.parametrize("name", CASES)
def test_the_curvature_is_psi_over_r_and_the_gradient_is_exact(name):
    criterion, curvature = CASES[name]
    y, r = targets(), residuals()
    if name == "power":  # whose own derivative is nan at r = 0
        r = torch.where(r == 0, 1e-9, r)
    f = y + r
    expansion = expand_batch(majorized(criterion), f, f, y)
    slopes, hessians = derivatives_by(curvature)(criterion, f, y)
    assert expansion.R.shape[2] == 0
    torch.testing.assert_close(expansion.z / SAMPLES, slopes, rtol=1e-12, atol=1e-16)
    assert torch.equal(expansion.basis, torch.eye(2, dtype=FLOAT64).expand(SAMPLES, 2, 2))
    found = torch.diag_embed(expansion.h) / SAMPLES
    torch.testing.assert_close(found, hessians, rtol=3e-6, atol=1e-14)
    torch.testing.assert_close(expansion.value.mean(), criterion(f, y), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_vanishing_residual_has_the_curvature_of_the_bottom(name):
    """At 0 and where ψ is nothing but rounding: ψ′(0), to all digits that a Hessian has."""
    criterion, curvature = SMOOTH[name]
    y = targets()
    f = y + torch.tensor([0.0, 1e-16], dtype=FLOAT64)
    f[-1] += 1
    h = expand_batch(majorized(criterion), f, f, y).h[:-1]
    scale = SAMPLES if getattr(criterion, "reduction", "mean") == "sum" else 1 / 2
    limit = scale * curvature(torch.full_like(h, 1e-12))
    torch.testing.assert_close(h, limit, rtol=1e-12, atol=0)


@given(
    st.lists(st.floats(-100, 100), min_size=2 * SAMPLES, max_size=2 * SAMPLES),
    st.sampled_from(sorted(SMOOTH)),
)
def test_the_parabola_lies_above_the_loss(numbers, name):
    """ℓ(f + u) ≤ ℓ(f) + zᵀu + h u² / 2 for every u, which makes a full step safe."""
    criterion, _ = SMOOTH[name]
    y, r = targets(), torch.tensor(numbers, dtype=FLOAT64).reshape(SAMPLES, 2)
    r = torch.where(r.abs() < 1e-6, 0, r)  # softplus(2 r) − r knows no smaller ones
    f = y + r
    loss = majorized(criterion)
    value, _, z, h, _ = expand_batch(loss, f, f, y)
    for u in (-0.9 * r, -1.9 * r, 0.5 * r, torch.ones_like(r), r.flip(0) - r):
        moved, *_ = expand_batch(loss, f + u, f + u, y)
        above = value + (z * u + h * u**2 / 2).sum(1)
        assert (moved <= above + 1e-6 * (1 + value.abs() + above.abs())).all()


@pytest.mark.parametrize("name", [name for name in CASES if name != "power"])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_a_step_is_one_of_weighted_least_squares(name, dtype):
    criterion, curvature = CASES[name]
    X = torch.linspace(-1, 1, 3 * SAMPLES, dtype=dtype).reshape(SAMPLES, 3).cos()
    params = {"W": torch.randn(3, 2, dtype=dtype)}
    y = 3 * targets().to(dtype)

    def model_fn(p, x):
        return torch.tanh(x @ p["W"])

    truth = dense(model_fn, params, X, y, criterion, derivatives_by(curvature))
    result = newton_step(model_fn, params, X, y, majorized(criterion), 0.1)
    assert error(result, solve(truth, 0.1)) < (1e-10 if dtype == FLOAT64 else 1e-5)


def test_weights_keep_their_meaning():
    """Those of torch's option, in y, on a record."""
    y, f = targets(), targets() + residuals()
    plain = expand_batch(majorized(nn.HuberLoss()), f, f, y).h
    h = majorized(partial(F.huber_loss, weight=WEIGHT)).expand(f, y).h
    torch.testing.assert_close(h, WEIGHT * 2 * plain)
    of_pair = majorized(lambda f, t: (t["w"] * F.huber_loss(f, t["y"], reduction="none")).sum())
    h = of_pair.expand(f, {"w": WEIGHT, "y": y}).h
    torch.testing.assert_close(h, WEIGHT * 2 * plain)
    h = expand_batch(majorized(weighted(nn.HuberLoss(), 3.0)), f, f, y).h
    torch.testing.assert_close(h, 3 * plain)
    scaled = majorized(lambda f, t: (((f - t[0]) / t[1]) ** 2).log1p().sum())
    sigma = WEIGHT + 0.1
    h = scaled.expand(f, (y, sigma)).h
    torch.testing.assert_close(h, 2 / (sigma**2 + (f - y) ** 2), rtol=1e-6, atol=1e-14)


def test_targets_without_the_outputs_axis_of_one():
    y, f = targets()[:, :1], (targets() + residuals())[:, :1]
    whole = majorized(nn.HuberLoss()).expand(f, y)
    flat = majorized(lambda outputs, y: F.huber_loss(outputs[:, 0], y)).expand(f, y[:, 0])
    for left, right in zip(whole, flat, strict=True):
        torch.testing.assert_close(left, right)


def test_missing_targets_as_nan_are_those_of_a_mask():
    y, f = targets(), targets() + residuals()
    y[1, 0] = y[3, 1] = torch.nan

    def of_numbers(f, y):
        terms = F.huber_loss(f, y.nan_to_num(), reduction="none")
        return torch.where(y.isnan(), 0, terms).sum() / (~y.isnan()).sum()

    def masked(f, y):
        return (y["w"] * F.huber_loss(f, y["y"], reduction="none")).sum() / y["w"].sum()

    pair = {"w": (~y.isnan()).to(y.dtype), "y": y.nan_to_num()}
    expansions = (majorized(of_numbers).expand(f, y), majorized(masked).expand(f, pair))
    for left, right in zip(*expansions, strict=True):
        torch.testing.assert_close(left, right)


def test_it_is_what_it_was():
    """Of a majorized criterion it is the same; nothing of the criterion itself is changed."""
    criterion = nn.HuberLoss()
    y, f = targets(), targets() + residuals()
    once, twice = majorized(criterion), majorized(majorized(criterion))
    for left, right in zip(once.expand(f, y), twice.expand(f, y), strict=True):
        assert torch.equal(left, right)
    assert once.denominator(f, y) == 2 * SAMPLES


def test_members_of_an_ensemble_are_as_if_alone():
    y, members = targets(), torch.stack([targets() + residuals(), targets() + 1])
    loss = majorized(mean_of(lambda r: (r**2).log1p()))

    def curvatures(f):
        return expand_batch(loss, f, f, y).h

    for found, f in zip(vmap(curvatures)(members), members, strict=True):
        torch.testing.assert_close(found, curvatures(f), rtol=1e-12, atol=1e-14)


# --- fits -------------------------------------------------------------------------------------

POINTS = torch.linspace(0, 5, 60, dtype=FLOAT64)
FAR = {"a": torch.tensor([10.0], dtype=FLOAT64), "k": torch.tensor([2.0], dtype=FLOAT64)}


def decay(p, x):
    return p["a"] * torch.exp(-p["k"] * x)


def contaminated():
    y = 40 * torch.exp(-0.7 * POINTS) + 0.05 * torch.randn(60, generator=seeded()).double()
    return y.index_add(0, torch.arange(0, 60, 9), torch.full((7,), 15.0, dtype=FLOAT64))


# Each case: a criterion, the loss of SciPy's that it is, SciPy's scale, updates.
FITS = {
    "huber": (nn.HuberLoss(delta=0.1), "huber", 0.1, 16),
    "smooth_l1": (nn.SmoothL1Loss(beta=0.1), "huber", 0.1, 16),
    "cauchy": (mean_of(lambda r: ((r / 0.1) ** 2).log1p()), "cauchy", 0.1, 25),
    "student_t": (mean_of(lambda r: (r**2 / (3 * 0.05**2)).log1p()), "cauchy", 3**0.5 * 0.05, 25),
    "soft_l1": (mean_of(lambda r: (1 + (r / 0.1) ** 2).sqrt()), "soft_l1", 0.1, 16),
}


def fitted(criterion, updates):
    optimizer = directional_newton(decay, criterion)
    params, state, y = FAR, optimizer.init(FAR), contaminated()
    for _ in range(updates):
        params, state, info = optimizer.update(params, state, POINTS, y)
    return params, float(info.loss_after)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_from_far_reaches_scipys_answer(name):
    criterion, loss, scale, updates = FITS[name]
    params, _ = fitted(majorized(criterion), updates)

    def scipys_residuals(q):
        a, k = torch.tensor(q[:1]), torch.tensor(q[1:])
        return (decay({"a": a, "k": k}, POINTS) - contaminated()).numpy()

    options = {"loss": loss, "f_scale": scale, "xtol": 1e-12, "ftol": 1e-14, "gtol": 1e-14}
    truth = least_squares(scipys_residuals, [10.0, 2.0], **options).x
    result = torch.cat([params["a"], params["k"]])
    torch.testing.assert_close(result, torch.as_tensor(truth), rtol=1e-4, atol=0)


def test_a_fit_of_absolute_errors_comes_near_the_corner():
    """The best of a fine grid, to 1e-4 of the loss."""
    _, loss = fitted(majorized(nn.L1Loss()), 30)
    y = contaminated()
    a, k = torch.meshgrid(
        torch.linspace(39.7, 40.3, 400, dtype=FLOAT64),
        torch.linspace(0.69, 0.71, 400, dtype=FLOAT64),
        indexing="ij",
    )
    grid = (a[..., None] * torch.exp(-k[..., None] * POINTS) - y).abs().mean(2)
    assert loss < grid.min() * (1 + 1e-4)


# --- refusals ---------------------------------------------------------------------------------


def coupled(f, y):
    return (f - y).norm(dim=-1).mean()


def expectile(f, y):
    return (torch.where(f > y, 0.9, 0.1) * (f - y) ** 2).mean()


REFUSALS = {
    "classes": (nn.CrossEntropyLoss(), torch.arange(SAMPLES) % 2, "of one residual, outputs − y"),
    "logits": (nn.BCEWithLogitsLoss(), targets().abs(), "in the outputs and in y are not opposite"),
    "coupled": (coupled, targets(), "terms depend on other residuals too"),
    "max": (lambda f, y: (f - y).abs().amax(1).mean(), targets(), "depend on other residuals"),
    "one-sided": (expectile, targets(), "of either sign alike"),
    "quartic": (mean_of(lambda r: r**4), targets(), r"rise with the residual r.*bends upwards"),
    "falling": (mean_of(lambda r: -(r**2)), targets(), "rise with the residual r.*one that falls"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_robust_loss_of_residuals_is_refused(name):
    criterion, y, message = REFUSALS[name]
    f = targets() + residuals().clamp(-3, 3) + math.pi / 10
    with pytest.raises(ValueError, match=message):
        expand_batch(majorized(criterion), f, f, y)


def test_a_perfect_fit_is_not_refused():
    """Where all residuals are rounding of large targets."""
    y = 1e6 + targets()
    f = y + 1e-10 * residuals()
    for criterion in (nn.HuberLoss(), nn.L1Loss(), mean_of(lambda r: (r**2).log1p())):
        for outputs in (f, y):
            assert expand_batch(majorized(criterion), outputs, outputs, y).h.isfinite().all()


def falling_off(term):
    """A criterion of residuals by themselves, for models that return one output."""
    return lambda outputs, y: term(outputs - y).sum(1).mean()


ROBUST = {
    "cauchy": falling_off(lambda r: torch.log1p(r**2)),
    "student_t": falling_off(lambda r: 2.5 * torch.log1p(r**2 / 4)),
    "geman_mcclure": falling_off(lambda r: r**2 / (1 + r**2)),
    "welsch": falling_off(lambda r: 1 - torch.exp(-(r**2) / 2)),
    "tukey": falling_off(lambda r: torch.where(r.abs() < 3, 1 - (1 - r**2 / 9) ** 3, 1)),
    "weighted": weighted(falling_off(lambda r: torch.log1p(r**2)), 2.0),
    "of float32": lambda f, y: torch.log1p((f.float() - y.float()) ** 2).sum(),
}
OTHER_KINDS = {
    "angles": lambda f, y: (1 - torch.cos(2 * (f - y))).mean(),
    "a double well": lambda f, y: (f**2 - 16).square().mean(),
    "without y": lambda f, y: torch.log1p(f**2).mean(),
    "concave": mean_of(lambda r: -(r**2)),
}
OUTLIER = torch.tensor([[0.1], [-0.2], [0.3], [2.5]], dtype=FLOAT64)


@pytest.mark.parametrize("name", ROBUST)
def test_a_robust_loss_is_told_of_majorized_which_takes_it(name):
    arguments = (lambda p, x: p + 0 * x, torch.tensor([0.0]).double(), OUTLIER, OUTLIER)
    with pytest.raises(
        ValueError, match=r"^newton_step: criterion must be convex in the outp.*; g"
    ):
        newton_step(*arguments, ROBUST[name], 0.1)
    with pytest.raises(
        ValueError, match=r"robust loss of residuals.*: pass majorized\(criterion\)"
    ):
        newton_step(*arguments, ROBUST[name], 0.1)
    assert newton_step(*arguments, majorized(ROBUST[name]), 0.1) > 0
    with pytest.raises(
        ValueError, match=r"^fit: term 'b': criterion .*: pass majorized\(criterion\)"
    ):
        fit(
            {"a": arguments[0], "b": arguments[0]},
            arguments[1],
            {"a": OUTLIER, "b": OUTLIER},
            {"a": OUTLIER, "b": OUTLIER},
            {"a": nn.MSELoss(), "b": ROBUST[name]},
        )


def test_an_ensemble_is_told_of_majorized_too():
    def step(p):
        return newton_step(lambda q, x: q + 0 * x, p, OUTLIER, OUTLIER, ROBUST["cauchy"], 0.1)

    with pytest.raises(ValueError, match=r"pass majorized\(criterion\)"):
        vmap(step)(torch.zeros(2, 1).double())


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_loss_of_another_kind_is_told_of_clipped(name):
    arguments = (lambda p, x: p + 0 * x, torch.tensor([2.0]).double(), OUTLIER, OUTLIER)
    message = r"convex in the outputs; got .* convex loss: pass clipped\(criterion\), which leaves"
    with pytest.raises(ValueError, match=message):
        newton_step(*arguments, OTHER_KINDS[name], 0.1)
    assert newton_step(*arguments, clipped(OTHER_KINDS[name]), 0.1, complement=1.0).isfinite()


def test_what_is_drawn_or_no_loss_is_refused():
    drawn = monte_carlo(mse(), 1, seeded())
    with pytest.raises(ValueError, match=r"^majorized: criterion must be a loss; got monte_carlo"):
        majorized(drawn)
    with pytest.raises(TypeError, match=r"^majorized: criterion must be a loss function; got 3"):
        majorized(3)
    with pytest.raises(ValueError, match="got a Loss without scores"):
        monte_carlo(majorized(mse()), 1, seeded())
    assert isinstance(majorized(mse()), Loss)
