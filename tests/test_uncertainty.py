"""Covariances of fitted parameters: NIST's certified deviations, SciPy's, and the textbook's."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import curve_fit
from torch import nn
from torch.func import hessian, vmap
from torch.utils._pytree import tree_leaves, tree_structure

from benchmarks.nist.regressions import MODELS, regression
from ddnewton import (
    clipped,
    covariance,
    criteria,
    empirical_fisher,
    fisher,
    fit,
    majorized,
    monte_carlo,
    standard_errors,
    weighted,
)
from tests.methods import FLOAT32, TORCH_LOSSES, seeded
from tests.reference import dense

DIGITS = 1e-8
"""NIST certifies 11 digits; of the parameters given too, and a deviation may depend on them."""


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Lanczos1"])
def test_certified_standard_deviations(name):
    fit = regression(name)
    errors = standard_errors(fit.model, fit.certified, fit.X, fit.y, nn.MSELoss())
    torch.testing.assert_close(errors, fit.deviations, rtol=DIGITS, atol=0.0)


@pytest.mark.parametrize("name", MODELS)
def test_certified_standard_deviations_with_the_certified_noise(name):
    # That of Lanczos1 is below the rounding of its certified parameters.
    fit = regression(name)
    variance = fit.squares / (len(fit.y) - len(fit.certified))
    criterion = criteria.mse(
        weight=torch.tensor(1 / variance, dtype=torch.float64).expand_as(fit.y)
    )
    errors = standard_errors(fit.model, fit.certified, fit.X, fit.y, criterion, absolute_sigma=True)
    torch.testing.assert_close(errors, fit.deviations, rtol=DIGITS, atol=0.0)


# --- three parameters, five samples, three outputs: any of torch's losses ----------------------


def curves(p, x):
    return p["wave"][0] * x + p["wave"][1] * x.square() + p["shift"] * torch.sin(x + 1)


PARAMS = {"shift": torch.tensor(0.3).double(), "wave": torch.tensor([0.4, -0.2]).double()}
X = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
LIKELIHOODS = [name for name, loss in TORCH_LOSSES.items() if loss.draws and name != "mse"]


def joined(cov):
    """A covariance nested as of PARAMS, as one matrix."""
    rows = [
        torch.cat([cov[a][b].reshape(PARAMS[a].numel(), -1) for b in PARAMS], 1) for a in PARAMS
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_have_the_inverse_information_of_their_sum(name, reduction):
    loss = TORCH_LOSSES[name]
    textbook = dense(curves, PARAMS, X, loss.y, loss.plain("sum"))
    expected = torch.linalg.inv(textbook.ggn)
    cov = covariance(curves, PARAMS, X, loss.y, loss.module(reduction=reduction))
    torch.testing.assert_close(joined(cov), expected, rtol=1e-10, atol=1e-14)
    errors = standard_errors(curves, PARAMS, X, loss.y, loss.module(reduction=reduction))
    both = torch.cat([errors["shift"][None], errors["wave"]])
    torch.testing.assert_close(both, expected.diagonal().sqrt(), rtol=1e-10, atol=0.0)


def test_the_information_of_rates_is_that_of_the_model_not_of_the_targets():
    rates = lambda p, x: curves(p, x).exp()  # noqa: E731
    counts = torch.arange(15.0).reshape(5, 3)
    f = rates(PARAMS, X)
    J = dense(rates, PARAMS, X, counts, lambda f, y: f.sum()).jacobians.reshape(15, 3)
    expected = torch.linalg.inv(J.T @ (J / f.reshape(15, 1)))
    criterion = nn.PoissonNLLLoss(log_input=False)
    torch.testing.assert_close(joined(covariance(rates, PARAMS, X, counts, criterion)), expected)
    # The same likelihood of the logarithms.
    of_logs = covariance(curves, PARAMS, X, counts, nn.PoissonNLLLoss())
    torch.testing.assert_close(joined(of_logs), expected)


def test_predicted_means_and_variances_have_the_information_of_both():
    pairs = lambda p, x: torch.stack([p[0] * x, p[1] + 0 * x], -1)  # noqa: E731
    x, y = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1.0, 2.5, 4.0]).double()
    params = torch.tensor([1.1, math.log(0.3)], dtype=torch.float64)
    cov = covariance(pairs, params, x, y, criteria.heteroscedastic_nll())
    expected = torch.diag(
        torch.tensor([0.3 / 21, 2 / 3], dtype=torch.float64)
    )  # v / Σx², and 1 / (N/2)
    torch.testing.assert_close(cov, expected, rtol=1e-12, atol=1e-16)


# --- squared errors ----------------------------------------------------------------------------


def decay(x, a, b, c):
    return a * np.exp(-b * x) + c


def torch_decay(p, x):
    return p[0] * torch.exp(-p[1] * x) + p[2]


def decay_data():
    x = torch.linspace(0, 4, 30, dtype=torch.float64)
    sigma = 0.1 + 0.05 * x
    noise = sigma * torch.randn(30, generator=seeded(), dtype=torch.float64)
    return x, 2.5 * torch.exp(-1.3 * x) + 0.5 + noise, sigma


@pytest.mark.parametrize("absolute_sigma", [False, True])
def test_weighted_squares_have_the_covariance_of_curve_fit(absolute_sigma):
    x, y, sigma = decay_data()
    options = {"sigma": sigma.numpy(), "absolute_sigma": absolute_sigma}
    tolerances = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    best, expected = curve_fit(
        decay, x.numpy(), y.numpy(), p0=[2.0, 1.0, 0.0], **options, **tolerances
    )
    criterion = criteria.mse(weight=1 / sigma.square())
    cov = covariance(
        torch_decay, torch.tensor(best), x, y, criterion, absolute_sigma=absolute_sigma
    )
    # As exact as SciPy's derivatives by differences.
    torch.testing.assert_close(cov, torch.tensor(expected), rtol=1e-5, atol=0.0)


SQUARES = {
    "sum": nn.MSELoss(reduction="sum"),
    "function": F.mse_loss,
    "own function": lambda f, y: (f - y).square().mean(),
    "half of it": lambda f, y: 0.5 * ((f - y) ** 2).sum(),
    "by valid targets": lambda f, y: (f - y)[~y.isnan()].square().mean(),
    "convex": criteria.convex(lambda f, y: (f - y).square().mean()),
    "weighted": weighted(nn.MSELoss(), 7.0),
    "weights alike": criteria.mse(weight=torch.full((30,), 3.0)),
    "fisher": fisher(nn.MSELoss()),
    "clipped": clipped(lambda f, y: (f - y).square().mean()),
    "majorized": majorized(nn.MSELoss()),
}


@pytest.mark.parametrize("name", SQUARES)
def test_every_way_to_write_squares_has_one_covariance(name):
    x, y, _ = decay_data()
    params = torch.tensor([2.4, 1.2, 0.6]).double()
    expected = covariance(torch_decay, params, x, y, nn.MSELoss())
    cov = covariance(torch_decay, params, x, y, SQUARES[name])
    torch.testing.assert_close(cov, expected, rtol=1e-9, atol=0.0)


def test_what_has_no_weight_is_no_residual():
    x, y, _ = decay_data()
    params, weight = torch.tensor([2.4, 1.2, 0.6]).double(), torch.ones(30)
    weight[20:] = 0
    first = covariance(torch_decay, params, x[:20], y[:20], nn.MSELoss())
    cov = covariance(torch_decay, params, x, y, criteria.mse(weight=weight))
    torch.testing.assert_close(cov, first, rtol=1e-10, atol=0.0)
    # Nor has a target that is missing, and left out by the criterion.
    missing = y.clone()
    missing[20:] = math.nan
    cov = covariance(torch_decay, params, x, missing, SQUARES["by valid targets"])
    torch.testing.assert_close(cov, first, rtol=1e-10, atol=0.0)


def test_complex_outputs_are_two_residuals():
    wave = lambda p, x: p[0] * torch.exp(1j * p[1] * x)  # noqa: E731
    x = torch.linspace(0, 3, 7).double()
    params = torch.tensor([1.5, 0.7]).double()
    y = wave(torch.tensor([1.4, 0.75]).double(), x)
    cov = covariance(wave, params, x, y, lambda f, t: (f - t).abs().square().mean())
    pairs = lambda p, x: torch.view_as_real(wave(p, x))  # noqa: E731
    expected = covariance(pairs, params, x, torch.view_as_real(y), nn.MSELoss())
    torch.testing.assert_close(cov, expected, rtol=1e-10, atol=1e-16)


def test_terms_add_up():
    x, y, sigma = decay_data()
    params = torch.tensor([2.4, 1.2, 0.6]).double()
    halves = {"first": slice(0, 12), "second": slice(12, 30)}
    parts = [{name: data[half] for name, half in halves.items()} for data in (x, y)]
    models = dict.fromkeys(halves, torch_decay)
    # Sums of squares of all residuals, or sums of likelihoods.
    squares = nn.MSELoss(reduction="sum")
    expected = covariance(torch_decay, params, x, y, squares)
    cov = covariance(models, params, *parts, squares)
    torch.testing.assert_close(cov, expected, rtol=1e-10, atol=0.0)
    expected = covariance(torch_decay, params, x, y.clamp(min=0), nn.PoissonNLLLoss())
    counts = {name: part.clamp(min=0) for name, part in parts[1].items()}
    criteria_of_terms = {"first": nn.PoissonNLLLoss(), "second": nn.PoissonNLLLoss(reduction="sum")}
    cov = covariance(models, params, parts[0], counts, criteria_of_terms)
    torch.testing.assert_close(cov, expected, rtol=1e-10, atol=0.0)
    # Weights 1/σ² of a term each.
    weights = {name: 1 / sigma[half].square() for name, half in halves.items()}
    chi_squared = {name: criteria.mse("sum", weight=weight) for name, weight in weights.items()}
    whole = criteria.mse("sum", weight=1 / sigma.square())
    for absolute_sigma in (False, True):
        expected = covariance(torch_decay, params, x, y, whole, absolute_sigma=absolute_sigma)
        cov = covariance(models, params, *parts, chi_squared, absolute_sigma=absolute_sigma)
        torch.testing.assert_close(cov, expected, rtol=1e-10, atol=0.0)
    # Noise that is known beside noise that is not.
    mixed = {"first": nn.MSELoss(), "second": nn.PoissonNLLLoss()}
    with pytest.raises(ValueError, match=r"^covariance: the terms .* all likelihoods; got MSELoss"):
        covariance(models, params, parts[0], counts, mixed)
    refused = {"first": nn.MSELoss(), "second": nn.HuberLoss()}
    with pytest.raises(ValueError, match=rf"^covariance: term 'second': {NOISE}; got HuberLoss"):
        covariance(models, params, *parts, refused)


# --- form --------------------------------------------------------------------------------------

FORMS = {
    "dict": PARAMS,
    "list": [PARAMS["wave"], PARAMS["shift"]],
    "nested": {"a": (PARAMS["shift"], [PARAMS["wave"].reshape(1, 2)])},
    "tensor": PARAMS["wave"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_covariance_nests_as_hessian_does(form):
    params = FORMS[form]
    y = TORCH_LOSSES["mse"].y.double()

    def model(p, x):
        # Linear in the parameters, so that the Hessian of the loss is G.
        numbers = torch.cat([leaf.reshape(-1) for leaf in tree_leaves(p)])
        return sum(number * x**k for k, number in enumerate(numbers, 1))

    cov = covariance(model, params, X, y, nn.MSELoss())
    loss = lambda p: F.mse_loss(model(p, X), y)  # noqa: E731
    H = hessian(loss)(params)
    assert tree_structure(cov) == tree_structure(H)
    leaves = zip(tree_leaves(cov), tree_leaves(H), strict=True)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in leaves)
    # 2 L / (N − D) H⁻¹.
    sizes = [leaf.numel() for leaf in tree_leaves(params)]
    both = [torch.cat([part.reshape(-1) for part in tree_leaves(tree)]) for tree in (cov, H)]
    C, G = (_square(entries, sizes) for entries in both)
    expected = 2 * loss(params) / (15 - sum(sizes)) * torch.linalg.inv(G)
    torch.testing.assert_close(C, expected, rtol=1e-9, atol=1e-14)
    errors = standard_errors(model, params, X, y, nn.MSELoss())
    assert tree_structure(errors) == tree_structure(params)
    flat = torch.cat([leaf.reshape(-1) for leaf in tree_leaves(errors)])
    torch.testing.assert_close(flat, C.diagonal().sqrt())


def _square(entries, sizes):
    """The blocks of a matrix, one after the other, as a matrix."""
    blocks = iter(entries.split([a * b for a in sizes for b in sizes]))
    return torch.cat([torch.cat([next(blocks).reshape(a, b) for b in sizes], 1) for a in sizes])


@pytest.mark.parametrize(
    "options", [{"chunk_size": 2}, {"gram": "structured"}, {"gram": "dense"}], ids=str
)
def test_options_change_nothing(options):
    y = TORCH_LOSSES["mse"].y.double()
    net = lambda p, x: torch.tanh(x @ p["W"]) @ p["v"]  # noqa: E731
    params = {"W": X[:3, :2].clone(), "v": X[3:, :2].T.clone()}
    x = torch.randn(40, 3, generator=seeded(), dtype=torch.float64)
    y = torch.randn(40, 2, generator=seeded(1), dtype=torch.float64)
    expected = covariance(net, params, x, y, nn.MSELoss())
    cov = covariance(net, params, x, y, nn.MSELoss(), **options)
    for a, b in zip(tree_leaves(cov), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_float32_and_an_ensemble():
    x, y, _ = decay_data()
    members = torch.tensor([[2.4, 1.2, 0.6], [2.0, 1.5, 0.2]])
    errors = partial(standard_errors, torch_decay, X=x.float(), y=y.float(), criterion=F.mse_loss)
    alone = torch.stack([errors(member) for member in members])
    assert alone.dtype == FLOAT32
    torch.testing.assert_close(vmap(errors)(members), alone)
    wide = standard_errors(torch_decay, members[0].double(), x.float(), y.float(), nn.MSELoss())
    torch.testing.assert_close(alone[0].double(), wide, rtol=1e-6, atol=0.0)


def test_units_of_the_parameters_cost_no_digit():
    # Twenty orders of magnitude between two parameters.
    x, y, _ = decay_data()
    params, units = torch.tensor([2.4, 1.2, 0.6]).double(), torch.tensor([1e10, 1.0, 1e-10])
    scaled = lambda p, x: torch_decay(p / units, x)  # noqa: E731
    errors = standard_errors(torch_decay, params, x, y, nn.MSELoss())
    of_scaled = standard_errors(scaled, params * units, x, y, nn.MSELoss())
    torch.testing.assert_close(of_scaled / units, errors, rtol=1e-12, atol=0.0)


# --- what there is none of ---------------------------------------------------------------------


def test_what_the_data_do_not_determine():
    x, y, _ = decay_data()
    twice = lambda p, x: (p["a"] + p["b"][1]) * x + p["c"]  # noqa: E731
    params = {name: torch.ones(shape).double() for name, shape in (("a", ()), ("b", 2), ("c", ()))}
    message = (
        r"the data do not determine params\['a'\], params\['b'\]\[0\], params\['b'\]\[1\]: a change"
    )
    with pytest.warns(UserWarning, match=message):
        cov = covariance(twice, params, x, y, nn.MSELoss())
    assert all(leaf.isposinf().all() for leaf in tree_leaves(cov))
    with pytest.warns(UserWarning, match=message):
        errors = standard_errors(twice, params, x, y, nn.MSELoss())
    assert all(leaf.isposinf().all() for leaf in tree_leaves(errors))


def test_as_many_residuals_as_parameters():
    x, y, _ = decay_data()
    params = torch.tensor([2.4, 1.2, 0.6]).double()
    with pytest.warns(UserWarning, match="no more residuals than parameters"):
        errors = standard_errors(torch_decay, params, x[:3], y[:3], nn.MSELoss())
    assert errors.isposinf().all()
    errors = standard_errors(torch_decay, params, x[:3], y[:3], criteria.mse(), absolute_sigma=True)
    assert errors.isfinite().all()


NOISE = "criterion must be a sum of squares, or a likelihood whose Fisher information is known"
REFUSED = {
    "huber": (nn.HuberLoss(), {}, ValueError, f"{NOISE}; got HuberLoss"),
    "l1": (nn.L1Loss(), {}, ValueError, f"{NOISE}; got L1Loss"),
    "smooth l1": (nn.SmoothL1Loss(), {}, ValueError, f"{NOISE}; got SmoothL1Loss"),
    "empirical": (empirical_fisher(nn.MSELoss()), {}, ValueError, f"{NOISE}; got a Loss"),
    "majorized": (majorized(nn.HuberLoss()), {}, ValueError, f"{NOISE}; got a Loss"),
    "drawn": (
        monte_carlo(nn.MSELoss(), 1, seeded()),
        {},
        ValueError,
        "criterion must be a loss; got monte_carlo of one",
    ),
    "a function": (
        lambda f, y: (f - y).cosh().log().mean(),
        {},
        ValueError,
        f"{NOISE}; got <lambda>, a function of another kind",
    ),
    "not convex": (
        lambda f, y: torch.log1p(100 * (f - y).square()).mean(),
        {},
        ValueError,
        f"{NOISE}; got one that is not convex. MSELoss, .* how much refits to resampled data",
    ),
    "targets": (
        torch.zeros(4, 1),
        {},
        TypeError,
        r"criterion must be a loss function; got a tensor of shape \[4, 1\]. If it is y, pass",
    ),
    "absolute of a function": (
        lambda f, y: (f - y).square().mean(),
        {"absolute_sigma": True},
        ValueError,
        "absolute_sigma needs a criterion that says what its weights are; got the function <lam",
    ),
    "a word": (nn.MSELoss(), {"absolute_sigma": "no"}, TypeError, "absolute_sigma must be True or"),
    "gram": (nn.MSELoss(), {"gram": "fast"}, ValueError, "gram must be one of"),
    "chunk_size": (nn.MSELoss(), {"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    "no criterion": (3, {}, TypeError, "criterion must be a loss function; got 3"),
}


@pytest.mark.parametrize("function", [covariance, standard_errors])
def test_the_criterion_is_that_of_fit_unless_another_is_given(function):
    x, y, _ = decay_data()
    arguments = (torch_decay, torch.tensor([2.4, 1.2, 0.6]).double(), x, y)
    default = inspect.signature(fit).parameters["criterion"].default
    assert inspect.signature(function).parameters["criterion"].default is default
    assert torch.equal(function(*arguments), function(*arguments, nn.MSELoss()))
    # Of two terms the default serves both.
    terms = [{"a": part, "b": part} for part in (torch_decay, x, y)]
    several = [terms[0], arguments[1], *terms[1:]]
    explicit = function(*several, {"a": nn.MSELoss(), "b": nn.MSELoss()})
    assert torch.equal(function(*several), explicit)


@pytest.mark.parametrize("function", [covariance, standard_errors])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(function, case):
    criterion, options, kind, message = REFUSED[case]
    x, y, _ = decay_data()
    with pytest.raises(kind, match=f"^{function.__name__}: {message}"):
        function(torch_decay, torch.tensor([2.4, 1.2, 0.6]).double(), x, y, criterion, **options)


def test_which_models_and_parameters_are_refused():
    x, y, _ = decay_data()
    with pytest.raises(TypeError, match=r"^covariance: params must be real .*params\['a'\]: torch"):
        covariance(lambda p, x: p["a"].abs() * x, {"a": torch.tensor(1j)}, x, y, nn.MSELoss())
    with pytest.raises(ValueError, match=r"^covariance: model_fn must use params"):
        covariance(lambda p, x: x, torch.ones(2).double(), x, y, nn.MSELoss())
    for function in (covariance, standard_errors):
        message = (
            r"^\w+: term 'b': criterion must be a sum of squares, or .* one that is not convex"
        )
        with pytest.raises(ValueError, match=message):
            function(
                {"a": torch_decay, "b": torch_decay},
                torch.tensor([2.4, 1.2, 0.6]).double(),
                {"a": x, "b": x},
                {"a": y, "b": y},
                {"a": nn.MSELoss(), "b": REFUSED["not convex"][0]},
            )
    with pytest.raises(TypeError, match=r"^covariance: params must hold floating-point"):
        covariance(torch_decay, [1.0, 2.0, 3.0], x, y, nn.MSELoss())
    with pytest.raises(ValueError, match=r"^standard_errors: X and y must hold the same number"):
        standard_errors(torch_decay, torch.ones(3).double(), x, y[:5], nn.MSELoss())
