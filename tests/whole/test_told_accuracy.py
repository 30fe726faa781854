"""What a step by products says of its own accuracy, and what it does where it can go no further."""

import subprocess
import sys
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from torch import nn
from torch.func import functional_call

from ddnewton import (
    above,
    ggn_eigh,
    majorized,
    newton_step,
    newton_step_and_info,
    top_k,
)
from ddnewton.damping import signal_to_noise
from ddnewton.quadratic.matrix_free import leading_directions, steps
from tests.methods import FLOAT32, FLOAT64, SMALL_AND_LARGE, seeded, truth
from tests.models import PROBLEMS, problem
from tests.reference import dense, error, flat, solve, step
from tests.whole.products_and_matrices import lost_share

TOLERANCES = (0.3, 1e-1, 1e-2, 1e-4)

# --- the bound -----------------------------------------------------------------------------------


@given(
    st.sampled_from(list(PROBLEMS)),
    st.integers(0, 3),
    st.floats(-7, 3).map(lambda power: 10.0**power),
    st.sampled_from(TOLERANCES),
    st.sampled_from([FLOAT32, FLOAT64]),
)
@example("many_points", 0, 1e-4, 1e-2, FLOAT64)
@example("list_of_layers", 0, 1e-6, 0.3, FLOAT32)
def test_no_step_gives_away_more_than_is_told(name, seed, delta, tol, dtype):
    result, info = newton_step_and_info(*problem(name, dtype, seed), delta, gram="free", tol=tol)
    reference = dense(*problem(name, FLOAT64, seed))
    exact = solve(reference, delta)
    rounding = 1e-12 if dtype == FLOAT32 else 1e-22
    assert lost_share(reference, result, delta, exact) <= float(info.lost) * (1 + 1e-5) + rounding
    assert float(info.lost) <= tol


def test_how_tight_the_bound_is():
    """It is told of matrices that may be singular: of others the truth may be far below."""
    ratios = []
    for name in PROBLEMS:
        for delta in (1e-4, 0.1, 10.0):
            for tol in TOLERANCES:
                result, info = newton_step_and_info(*problem(name), delta, gram="free", tol=tol)
                true = lost_share(truth(name), result, delta, solve(truth(name), delta))
                if true > 1e-20:
                    ratios.append(float(info.lost) / true)
    ratios = torch.tensor(ratios).sort().values
    assert len(ratios) > 150
    assert ratios[0] >= 1 - 1e-6
    assert ratios.median() < 1.2
    assert ratios[int(0.7 * len(ratios))] < 2


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_tighter_tolerance_takes_no_fewer_products(name):
    counts = [
        int(newton_step_and_info(*problem(name), 0.01, gram="free", tol=tol)[1].products)
        for tol in TOLERANCES
    ]
    assert counts == sorted(counts)


def test_an_undamped_step_has_no_bound():
    """Nothing bounds its error; what it does keep is the residual, relative to the gradient."""
    for name in SMALL_AND_LARGE:
        _, info = newton_step_and_info(*problem(name), 0.0, gram="free", tol=1e-3)
        assert float(info.lost) in (0.0, 1.0)
        assert float(info.residuals) <= 1e-3 * float(info.gradient_norm)


@pytest.mark.parametrize("tol", [1e-16, 1e-30])
@pytest.mark.parametrize("name", PROBLEMS)
def test_an_undamped_step_that_is_asked_for_more_than_there_are_digits(name, tol):
    """It ends at rounding: it neither runs away nor is told to be exact."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        result, info = newton_step_and_info(*problem(name), 0.0, gram="free", tol=tol)
    exact = step(truth(name), 0.0)
    assert error(result, exact) < 1e-6
    assert lost_share(truth(name), result, 0.0, exact) <= float(info.lost) + 1e-12


# --- not there yet -------------------------------------------------------------------------------


def test_a_step_that_has_not_converged_is_told_and_returned(monkeypatch):
    monkeypatch.setattr(steps, "MOST_PRODUCTS", 3)
    with pytest.warns(UserWarning, match=r"not converged to tol=0.0001 after 3 products: at most"):
        result, info = newton_step_and_info(*problem("attention"), 1e-3, gram="free", tol=1e-4)
    true = lost_share(truth("attention"), result, 1e-3, solve(truth("attention"), 1e-3))
    assert 1e-4 < true <= float(info.lost) < 1
    assert int(info.products) == 3
    with pytest.warns(UserWarning, match="after 3 products: a relative residual of"):
        newton_step(*problem("attention"), 0.0, gram="free", tol=1e-4)
    # The decrease that is promised is that of the step, not of the exact one.
    T, s = truth("attention"), flat(result)
    assert error(info.predicted_decrease.sum(), -(T.gradient @ s + s @ T.ggn @ s / 2)) < 1e-10


def deep(outputs=2, n=100, width=16, dtype=FLOAT64):
    """A net of some hundred parameters and columns, whose matrix is made of no unit vectors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)
    params = {name: p.detach() for name, p in net.named_parameters()}
    X = torch.randn(n, 6, generator=seeded()).to(dtype)
    y = torch.randn(n, outputs, generator=seeded(1)).to(dtype)
    return (lambda p, x: functional_call(net, p, (x,))), params, X, y, nn.MSELoss()


def test_eigenpairs_that_have_not_converged_are_told_and_returned(monkeypatch):
    monkeypatch.setattr(leading_directions, "EIGENPAIR_PRODUCTS", 8)
    with pytest.warns(UserWarning, match="3 leading eigenpairs have not converged after 8"):
        evals, _ = ggn_eigh(*deep(), select=top_k(3), gram="free")
    exact, _ = ggn_eigh(*deep(), select=top_k(3))
    assert (evals <= exact + 1e-12).all()
    assert evals[-1] > exact[-1] / 2


def test_eigenpairs_of_products_with_too_few_digits_are_told(monkeypatch):
    monkeypatch.setattr("ddnewton.linearize.precision.CHEAP_FLOPS", 0)
    arguments = {"select": top_k(3), "gram": "free", "tol": 1e-4}
    with pytest.warns(UserWarning, match=r"asks for 1\.0e-08\. That is the rounding of products"):
        evals, _ = ggn_eigh(*deep(dtype=FLOAT32), **arguments)
    exact, _ = ggn_eigh(*deep(), **arguments)
    assert error(evals, exact) < 1e-5


@pytest.mark.parametrize("first", [1, 2, 16])
@pytest.mark.parametrize("tol", [1e-2, 1e-8])
def test_leading_eigenpairs_of_larger_matrices(tol, first, monkeypatch):
    monkeypatch.setattr(leading_directions, "FIRST_COUNT", first)
    for select in (top_k(1), top_k(5), above(0.2), above(0.02, relative=False)):
        options = {"select": select, "complement": 0.5}
        result, info = newton_step_and_info(*deep(), 0.1, gram="free", tol=tol, **options)
        exact, other = newton_step_and_info(*deep(), 0.1, **options)
        assert error(info.evals, other.evals) < 1e-3 * tol
        assert error(result, exact) < tol
        assert int(info.rank) == -1
        assert (info.residuals <= 1e-4 * tol * info.evals.amax()).all()


@pytest.mark.parametrize("outputs", [2, 40], ids=["more columns", "fewer columns"])
def test_whichever_side_is_shorter_is_multiplied(outputs):
    given = deep(outputs=2) if outputs == 2 else deep(outputs=1, n=70, width=20)
    exact = newton_step(*given, 0.1, select=top_k(4))
    assert error(newton_step(*given, 0.1, select=top_k(4), gram="free", tol=1e-6), exact) < 1e-6


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"select": top_k(2)}], ids=str)
@pytest.mark.parametrize("sample", [0, 7])
def test_derivatives_that_are_not_finite(options, sample):
    params, X = {"w": torch.ones(3)}, torch.ones(9, 3)
    X[sample] = 0
    given = (lambda p, x: (x * p["w"]).sum(1).abs().sqrt(), params, X, torch.ones(9))
    match = "newton_step: the derivatives of model_fn must be finite; got nan or inf"
    with pytest.raises(ValueError, match=match):
        newton_step(*given, nn.MSELoss(), 0.1, gram="free", **options)


@pytest.mark.parametrize("options", [{}, {"complement": 0.1}, {"select": top_k(2)}], ids=str)
def test_a_loss_that_is_not_convex(options):
    given = problem("tanh_mlp")
    with pytest.raises(ValueError, match=r"newton_step: .*convex"):
        newton_step(*given[:4], lambda f, y: -(f - y).square().mean(), 0.1, gram="free", **options)


@pytest.mark.parametrize("options", [{}, {"complement": 0.1}, {"select": top_k(2)}], ids=str)
def test_outputs_that_depend_on_no_parameter(options):
    params, X = {"w": torch.zeros(3)}, torch.ones(4, 3)
    match = "model_fn must use params; .* No output depends on any parameter"
    with pytest.raises(ValueError, match="newton_step: " + match):
        newton_step(lambda p, x: x, params, X, 2 * X, nn.MSELoss(), 0.1, gram="free", **options)
    with pytest.raises(ValueError, match="ggn_eigh: " + match):
        ggn_eigh(lambda p, x: x, params, X, 2 * X, nn.MSELoss(), gram="free")


def pinball(f, y):
    return torch.maximum(0.9 * (y - f), -0.1 * (y - f)).mean()


FLAT = {
    "L1Loss": nn.L1Loss(),
    "HuberLoss": nn.HuberLoss(delta=1e-3),
    "pinball": pinball,
}


@pytest.mark.parametrize("damping", [0.0, 0.1, signal_to_noise()], ids=["0", "0.1", "rule"])
@pytest.mark.parametrize("name", FLAT)
def test_losses_without_curvature(name, damping):
    model_fn, params, X, y, _ = deep(n=12)
    given = (model_fn, params, X, y + 10, FLAT[name])
    match = f"newton_step: the loss must have curvature where .*; got {name} with a gradient of"
    with pytest.raises(ValueError, match=match) as raised:
        newton_step(*given, damping, gram="free")
    for way_out in ("CrossEntropyLoss", r"majorized\(criterion\)", "complement"):
        raised.match(way_out)
    # A complement follows all of the gradient.
    exact, other = newton_step_and_info(*given, 0.1, complement=0.5)
    result, info = newton_step_and_info(*given, 0.1, complement=0.5, gram="free", tol=1e-8)
    assert error(result, exact) < 1e-9
    assert error(info.gradient_norm, other.gradient_norm) < 1e-9
    assert info.flat_share.isnan()
    alike = newton_step(*given, 0.5, complement=0.5, gram="free")
    assert error(alike, exact) < 1e-9


def test_a_loss_that_is_flat_at_some_samples():
    model_fn, params, X, y, _ = deep(n=30)
    given = (model_fn, params, X, 3 * y, nn.HuberLoss())
    for options in ({}, {"complement": 0.1}, {"complement": 0.7}):
        exact = newton_step(*given, 0.1, **options)
        result, info = newton_step_and_info(*given, 0.1, **options, gram="free", tol=1e-14)
        assert error(result, exact) < 1e-6
        assert info.flat_share.isnan()
    robust = majorized(nn.HuberLoss())
    steps_of = [
        newton_step(*given[:4], robust, 0.1, **way) for way in ({}, {"gram": "free", "tol": 1e-16})
    ]
    assert error(*steps_of) < 1e-7


# --- memory --------------------------------------------------------------------------------------

WIDE = """
import resource, torch
from torch import nn
from torch.func import functional_call
from ddnewton import directional_newton, levenberg_marquardt, newton_step_and_info, top_k

def net(width):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(200, width), nn.Tanh(), nn.Linear(width, 10))
    params = {name: p.detach() for name, p in module.named_parameters()}
    return (lambda p, x: functional_call(module, p, (x,))), params

def batch(n):
    return torch.randn(n, 200), torch.randint(10, (n,))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def work(given):
    function, params, X, y, loss = given
    _, info = newton_step_and_info(*given, 1e-2, gram="free")
    newton_step_and_info(*given, 1e-2, select=top_k(3), gram="free", tol=0.1)
    optimizer = directional_newton(function, loss, levenberg_marquardt(), gram="free")
    optimizer.update(params, optimizer.init(params), X, y)
    return info

work((*net(4), *batch(20), nn.CrossEntropyLoss()))
before, given = peak(), (*net(100), *batch(2500), nn.CrossEntropyLoss())
info = work(given)
print(peak() - before, float(info.lost))
"""


def test_memory_by_measurement():
    """The matrix of 21,110 parameters and 22,500 columns would take 3 · 8 B · 21,110² = 10.7 GB."""
    command = [sys.executable, "-c", WIDE]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    megabytes, lost = map(float, answer[-2:])
    assert lost <= 1e-2
    assert megabytes < 400
