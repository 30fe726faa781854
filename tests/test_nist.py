"""The models of NIST's nonlinear regressions are those whose answers are certified."""

import json
import math

import pytest
import torch
from torch.func import jacfwd

from benchmarks.nist import fits
from benchmarks.nist.regressions import FILE, MODELS, digits, regression
from benchmarks.training.installed_packages import is_missing


def test_every_data_set_of_the_file_has_its_model():
    assert len(MODELS) == 27
    assert set(json.loads(FILE.read_text(encoding="utf-8"))) == set(MODELS) | {"_source"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_certified_squares_at_the_certified_parameters(name):
    fit = regression(name)
    squares = float((fit.model(fit.certified, fit.X) - fit.y).square().sum())
    if name == "Lanczos1":  # residuals of rounding alone: 24 values of 14 digits
        assert squares < 1e-20
    else:
        assert abs(squares / fit.squares - 1) < 1e-8


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_certified_deviations_and_no_slope_left(name):
    fit = regression(name)
    n, p = len(fit.y), len(fit.certified)
    # In units of the certified parameters, which differ by up to fourteen orders of magnitude.
    J = jacfwd(lambda b: fit.model(b, fit.X))(fit.certified) * fit.certified
    U, sizes, V = torch.linalg.svd(J, full_matrices=False)
    deviations = (fit.squares / (n - p)) ** 0.5 * (V / sizes[:, None]).norm(dim=0)
    expected = fit.deviations / fit.certified.abs()
    torch.testing.assert_close(deviations, expected, rtol=1e-5, atol=0.0)
    residual = fit.model(fit.certified, fit.X) - fit.y
    # What a further Gauss-Newton step would change is below the certified digits.
    step = V.T @ (U.T @ residual / sizes)
    assert step.abs().max() < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_defined_at_both_starts_and_for_one_sample_as_for_all(name):
    fit = regression(name)
    for start in fit.starts:
        outputs = fit.model(start, fit.X)
        assert outputs.shape == fit.y.shape
        assert outputs.isfinite().all()
        single = torch.cat([fit.model(start, x[None]) for x in fit.X])
        torch.testing.assert_close(single, outputs, rtol=1e-13, atol=0.0)
        assert start.shape == fit.certified.shape == fit.deviations.shape


def test_digits_are_those_of_the_worst_parameter():
    certified = torch.tensor([1.0, -200.0], dtype=torch.float64)
    assert digits(certified, certified) == 11
    off = certified * torch.tensor([1 + 1e-9, 1 - 1e-4], dtype=torch.float64)
    assert abs(digits(off, certified) - 4) < 1e-6
    assert digits(certified * torch.nan, certified) == 0 == digits(3 * certified, certified)


@pytest.mark.parametrize("method", fits.METHODS_OF_FITS)
def test_a_method_fits_an_easy_data_set_from_both_starts(method):
    if is_missing(method):
        pytest.skip("not installed")
    runs = fits.all_fits([method], ["DanWood", "Chwirut2"])
    assert set(runs[method]) == {"DanWood/1", "DanWood/2", "Chwirut2/1", "Chwirut2/2"}
    for run in runs[method].values():
        assert run.digits >= fits.WANTED
        assert 1 <= run.updates < 100
    lines = "\n".join(fits.table_of_fits(runs))
    assert f"| {method} | 4 of 4 |" in lines
    assert "| Chwirut2/2 |" in lines


def test_what_raises_or_misses_is_a_miss(monkeypatch):
    def broken(fit, start):
        yield fit.certified
        raise RuntimeError("no factorization")

    monkeypatch.setitem(fits.METHODS_OF_FITS, "broken", broken)
    monkeypatch.setitem(fits.METHODS_OF_FITS, "idle", lambda fit, start: iter([start] * 3))
    runs = fits.all_fits(["broken", "idle"], ["DanWood"])
    for method in ("broken", "idle"):
        assert all(run.updates == math.inf for run in runs[method].values())
    table = "\n".join(fits.table_of_fits(runs))
    assert "| broken | 0 of 2 | inf |" in table


def test_a_method_at_rest_is_ended():
    fit = regression("DanWood")
    endless = iter(lambda: fit.certified, None)
    assert len(list(fits.until_at_rest(fit, endless))) == fits.PATIENCE + 1
