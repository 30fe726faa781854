"""The damping rules against loops that know nothing of them, and what must hold for any numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.func import vmap

from ddnewton import newton_step, newton_step_and_info, resampling, top_k
from ddnewton.damping import bootstrap, constant, relative, signal_to_noise
from tests.methods import DTYPES, FLOAT64, GRID, RULES, seeded


def call(rule, gammas, lambdas, evals=None):
    """The dampings of a rule, which must do without eigenvectors."""
    evals = lambdas.mean(0) if evals is None else evals
    return rule(evals, None, gammas, lambdas)


def noisy(n=12, n2=None, k=7, dtype=FLOAT64, seed=1):
    """Slopes from clear to mere noise, and positive curvatures."""
    generator = seeded(seed)
    gammas = torch.randn(n, k, generator=generator, dtype=FLOAT64) + torch.linspace(0, 3, k)
    lambdas = torch.randn(n2 or n, k, generator=generator, dtype=FLOAT64).square()
    return gammas.to(dtype), lambdas.to(dtype)


every_rule = pytest.mark.parametrize("make", [one.make for one in RULES.values()], ids=RULES)
sizes = pytest.mark.parametrize(("n", "n2"), [(12, 12), (12, 5), (2, 9)])


# --- the formulas, in loops -----------------------------------------------------------------


def loop_signal_to_noise(gammas, lambdas, caution):
    result = []
    for gamma, lambda_ in zip(gammas.T.tolist(), lambdas.T.tolist(), strict=True):
        slope, curvature = math.fsum(gamma) / len(gamma), math.fsum(lambda_) / len(lambda_)
        variance = math.fsum((g - slope) ** 2 for g in gamma) / (len(gamma) - 1)
        spread = math.fsum((x - curvature) ** 2 for x in lambda_) / (len(lambda_) - 1)
        if slope**2 <= variance / len(gamma):
            result.append(math.inf)
            continue
        shrink = 1 - variance / (len(gamma) * slope**2)
        error = math.sqrt(spread / len(lambda_))
        result.append((curvature + caution * error) / shrink - curvature)
    return torch.tensor(result, dtype=FLOAT64)


def loop_counts(n, resamples, generator):
    drawn = torch.randint(n, (resamples, n), generator=generator).numpy()
    return [np.bincount(row, minlength=n) for row in drawn]


def loop_bootstrap(gammas, lambdas, grid, seed, resamples, quantile):
    generator = seeded(seed)
    counts = others = loop_counts(len(gammas), resamples, generator)
    if len(lambdas) != len(gammas):
        others = loop_counts(len(lambdas), resamples, generator)
    result = []
    for gamma, lambda_ in zip(gammas.double().T.numpy(), lambdas.double().T.numpy(), strict=True):
        best, chosen = -math.inf, math.inf
        for delta in sorted(grid):
            if gamma.mean() != 0 and lambda_.mean() + delta == 0:
                continue
            tau = -gamma.mean() / (lambda_.mean() + delta)
            gains = []
            for count, other in zip(counts, others, strict=True):
                slope, curvature = count @ gamma / len(gamma), other @ lambda_ / len(lambda_)
                gains.append(-slope * tau - curvature * tau**2 / 2)
            gain = np.quantile(gains, quantile)
            if gain >= 0 and gain > best:
                best, chosen = gain, delta
        result.append(chosen)
    return torch.tensor(result, dtype=FLOAT64)


@DTYPES
@sizes
def test_relative_is_a_fraction_of_the_largest_eigenvalue(n, n2, dtype):
    gammas, lambdas = noisy(n, n2, 3, dtype)
    evals = torch.tensor([0.5, 4.0, 2.0], dtype=dtype)
    expected = torch.tensor([1.0, 1.0, 1.0], dtype=dtype)
    assert torch.equal(call(relative(0.25), gammas, lambdas, evals), expected)
    fraction = torch.tensor(0.25, dtype=FLOAT64)
    assert torch.equal(call(relative(fraction), gammas, lambdas, evals), expected)


@DTYPES
@sizes
@pytest.mark.parametrize("caution", [0.0, 0.5, 1.0, 3.0])
def test_signal_to_noise_is_its_formula(caution, n, n2, dtype):
    gammas, lambdas = noisy(n, n2, dtype=dtype)
    result = call(signal_to_noise(caution), gammas, lambdas)
    expected = loop_signal_to_noise(gammas, lambdas, caution)
    assert expected.isfinite().any()
    assert expected.isinf().any()
    torch.testing.assert_close(result, expected.to(dtype))


@sizes
def test_signal_to_noise_shrinks_the_slope_and_raises_the_curvature(n, n2):
    gammas, lambdas = noisy(n, n2)
    delta = call(signal_to_noise(2.0), gammas, lambdas)
    slope, curvature = gammas.mean(0), lambdas.mean(0)
    shrink = (1 - gammas.var(0) / n / slope**2).clamp(min=0)
    expected = -slope * shrink / (curvature + 2.0 * lambdas.std(0) / math.sqrt(n2))
    torch.testing.assert_close(-slope / (curvature + delta), expected)


@DTYPES
@sizes
@pytest.mark.parametrize(
    ("quantile", "resamples"), [(0.05, 40), (0.05, 21), (0.5, 30), (0.0, 10), (1.0, 10), (0.3, 1)]
)
def test_bootstrap_is_its_loop(quantile, resamples, n, n2, dtype):
    gammas, lambdas = noisy(n, n2, dtype=dtype)
    rule = bootstrap(GRID, seeded(3), resamples, quantile)
    expected = loop_bootstrap(gammas, lambdas, GRID, 3, resamples, quantile)
    assert torch.equal(call(rule, gammas, lambdas), expected.to(dtype))


def test_bootstrap_on_many_random_problems_is_its_loop():
    for seed in range(20):
        gammas, lambdas = noisy(6, k=9, seed=seed)
        result = call(bootstrap(GRID, seeded(seed), 25), gammas, lambdas)
        assert torch.equal(result, loop_bootstrap(gammas, lambdas, GRID, seed, 25, 0.05))


@pytest.mark.parametrize("piece", [1, 8 * 30, 8 * 30 * 3, 2**22])
def test_bootstrap_is_the_same_in_pieces(piece, monkeypatch):
    gammas, lambdas = noisy()
    monkeypatch.setattr(resampling, "GAINS_AT_ONCE", piece)
    result = call(bootstrap(GRID, seeded(), 30), gammas, lambdas)
    assert torch.equal(result, loop_bootstrap(gammas, lambdas, GRID, 0, 30, 0.05))


@pytest.mark.parametrize(
    "grid",
    [
        (10.0, 0.1, math.inf, 0.0, 0.5, 3, 1.0, 0.01),
        np.array(GRID),
        torch.tensor(GRID, dtype=FLOAT64),
        [torch.tensor(delta, dtype=FLOAT64) for delta in GRID],
        GRID + GRID,
    ],
    ids=["shuffled tuple", "array", "tensor", "scalars", "repeats"],
)
def test_bootstrap_takes_a_grid_in_any_form(grid):
    gammas, lambdas = noisy()
    expected = call(bootstrap(GRID, seeded()), gammas, lambdas)
    assert torch.equal(call(bootstrap(grid, seeded()), gammas, lambdas), expected)


def test_bootstrap_keeps_the_grid_it_was_given():
    gammas, lambdas = noisy()
    grid = torch.tensor(GRID, dtype=FLOAT64)
    rule = bootstrap(grid, seeded())
    grid.fill_(100.0)
    assert torch.equal(
        call(rule, gammas, lambdas), call(bootstrap(GRID, seeded()), gammas, lambdas)
    )


# --- what must hold for any numbers ---------------------------------------------------------

NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))
CAUTIONS = st.floats(0, 10)
SCALES = st.integers(-10, 10).map(lambda power: 2.0**power)  # powers of 2 do not round


@st.composite
def samples(draw):
    """Slopes, and curvatures ≥ 0, of as many samples or not."""
    k = draw(st.integers(0, 4))
    n, n2 = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    gammas = torch.from_numpy(draw(arrays.arrays(float, (n, k), elements=NUMBERS)))
    lambdas = torch.from_numpy(draw(arrays.arrays(float, (n2, k), elements=NUMBERS)))
    return gammas, lambdas.abs()


def rules(caution, scale=1.0):
    """The rules whose damping is a curvature."""
    grid = [scale * delta for delta in GRID]
    return [relative(caution), signal_to_noise(caution), bootstrap(grid, seeded(), 20)]


@given(samples(), CAUTIONS)
def test_dampings_are_never_negative_and_never_nan(problem, caution):
    gammas, _ = problem
    for rule in rules(caution):
        delta = call(rule, *problem)
        assert delta.shape == gammas.shape[1:]
        assert (delta >= 0).all()


@given(samples(), CAUTIONS, SCALES)
def test_dampings_have_the_units_of_curvature(problem, caution, scale):
    gammas, lambdas = problem
    for rule, scaled in zip(rules(caution), rules(caution, scale), strict=True):
        expected = scale * call(rule, gammas, lambdas)
        torch.testing.assert_close(call(scaled, scale * gammas, scale * lambdas), expected)


@given(samples(), SCALES)
def test_dampings_do_not_depend_on_the_scale_of_the_slopes(problem, scale):
    gammas, lambdas = problem
    for rule, again in zip(rules(1.0), rules(1.0), strict=True):
        expected = call(rule, gammas, lambdas)
        torch.testing.assert_close(call(again, -scale * gammas, lambdas), expected)


@given(samples(), CAUTIONS, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_is_nothing_to_signal_to_noise(problem, caution, random):
    gammas, lambdas = problem
    rows, rows2 = list(range(len(gammas))), list(range(len(lambdas)))
    random.shuffle(rows)
    random.shuffle(rows2)
    here = call(signal_to_noise(caution), gammas, lambdas)
    there = call(signal_to_noise(caution), gammas[rows], lambdas[rows2])
    # On the very line of 1/N rounding decides, so only steps can be compared.
    steps = [-gammas.mean(0) / (1e-9 + lambdas.mean(0) + delta) for delta in (here, there)]
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-6)


@given(samples(), CAUTIONS, st.floats(1, 10), st.sampled_from(["slopes", "curvatures"]))
def test_more_spread_means_more_damping(problem, caution, factor, which):
    gammas, lambdas = problem
    before = call(signal_to_noise(caution), gammas, lambdas)
    if which == "slopes":
        gammas = gammas.mean(0) + factor * (gammas - gammas.mean(0))
    else:
        lambdas = lambdas.mean(0) + factor * (lambdas - lambdas.mean(0))
    after = call(signal_to_noise(caution), gammas, lambdas)
    rounding = 1e-9 * (1 + lambdas.mean(0))
    assert (after * (1 + 1e-9) + rounding >= before).logical_or(before > 1e9).all()


@given(samples(), CAUTIONS)
def test_more_caution_means_more_damping(problem, caution):
    less = call(signal_to_noise(caution), *problem)
    more = call(signal_to_noise(caution + 1), *problem)
    # Without curvature even caution skips: only where there is some can dampings be compared.
    assert (more >= less).logical_or(problem[1].sum(0) == 0).logical_or(less.isinf()).all()


@given(st.integers(-100, 100).filter(bool), st.integers(1, 100), st.integers(2, 6))
def test_equal_slopes_need_no_damping_without_caution(slope, curvature, n):
    gammas = torch.full((n, 1), float(slope), dtype=FLOAT64)
    lambdas = torch.tensor([0.0, 2.0 * curvature], dtype=FLOAT64)[:, None]
    assert call(signal_to_noise(0.0), gammas, lambdas).item() == 0
    standard_error = math.sqrt(lambdas.var() / 2)
    assert call(signal_to_noise(1.0), gammas, lambdas).item() == pytest.approx(standard_error)


@given(st.integers(-100, 100).filter(bool), st.integers(1, 100), st.integers(1, 6))
def test_samples_that_agree_get_the_smallest_damping_of_the_grid(slope, curvature, n):
    gammas = torch.full((n, 1), float(slope), dtype=FLOAT64)
    lambdas = torch.full((n, 1), float(curvature), dtype=FLOAT64)
    assert call(bootstrap([3.0, 0.5, 1.0], seeded(), 10), gammas, lambdas).item() == 0.5


# --- noise and signal -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [signal_to_noise, lambda: bootstrap(GRID, seeded())])
def test_noise_is_skipped_and_signals_are_not(make):
    generator, n, k = seeded(5), 100, 200
    noise = torch.randn(n, k, generator=generator, dtype=FLOAT64)
    lambdas = 1 + torch.rand(n, k, generator=generator, dtype=FLOAT64)
    # One mean in three of pure noise lies above the line of 1/N, by little: its step is short.
    delta = call(make(), noise, lambdas)
    assert delta.isinf().double().mean() > 0.6
    full = noise.mean(0).square() / lambdas.mean(0)
    assert (noise.mean(0).square() / (lambdas.mean(0) + delta)).sum() < 0.65 * full.sum()
    pure = noise - noise.mean(0)
    assert (pure.mean(0) / (lambdas.mean(0) + call(make(), pure, lambdas)) == 0).all()
    assert (call(make(), noise + 3.0, lambdas) <= 0.1).all()


def test_bootstrap_damps_the_more_the_less_it_knows():
    generator = seeded(2)
    noise = torch.randn(50, 1, generator=generator, dtype=FLOAT64)
    noise = (noise - noise.mean()) / noise.std()
    gammas = 1 + noise * torch.tensor([0.0, 1.0, 3.0, 4.0, 10.0])
    grid = torch.linspace(0, 5, 51)
    delta = call(bootstrap(grid, seeded()), gammas, torch.ones_like(gammas))
    assert (delta.diff()[:-1] > 0).all()
    assert delta[0] == 0
    assert delta[-1] == math.inf


# --- the edges ------------------------------------------------------------------------------


@every_rule
@DTYPES
@sizes
def test_every_rule_returns_a_damping_a_direction(make, n, n2, dtype):
    gammas, lambdas = noisy(n, n2, dtype=dtype)
    delta = call(make(), gammas, lambdas)
    assert delta.shape == (7,)
    assert delta.dtype == dtype
    delta.add_(1)  # its own memory


@every_rule
def test_no_directions_no_dampings(make):
    assert call(make(), torch.zeros(3, 0), torch.zeros(3, 0)).shape == (0,)


@pytest.mark.parametrize("name", [name for name, one in RULES.items() if not one.spread])
def test_one_sample_is_enough_for_rules_that_need_no_spread(name):
    assert call(RULES[name].make(), *noisy(1)).isfinite().any()


@pytest.mark.parametrize(("n", "n2"), [(1, 1), (1, 4), (4, 1)])
def test_one_sample_has_no_spread(n, n2):
    message = rf"^signal_to_noise: .* two samples; got gammas: {n}, lambdas: {n2}\. Pass a larger"
    with pytest.raises(ValueError, match=message):
        call(signal_to_noise(), *noisy(n, n2))


def test_signal_to_noise_without_slope_or_curvature_skips():
    gammas = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    lambdas = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0]])
    delta = call(signal_to_noise(), gammas, lambdas)
    assert delta.tolist() == [math.inf, math.inf, 1.0, math.inf]


def test_bootstrap_never_divides_by_zero():
    gammas = torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, 1.0]])
    lambdas = torch.zeros(2, 3)
    assert call(bootstrap([0.0, 2.0], seeded()), gammas, lambdas).tolist() == [2.0, 2.0, 2.0]
    assert call(bootstrap([0.0], seeded()), gammas, lambdas).isinf().all()


def test_bootstrap_skips_what_may_rise_and_takes_what_may_not():
    gammas = torch.tensor([[-2.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    delta = call(bootstrap([1.0, 4.0], seeded()), gammas, torch.ones(2, 3))
    assert delta.tolist() == [math.inf, 1.0, 1.0]


def test_bootstrap_redraws_slopes_and_curvatures_together():
    """Where a sample's curvature is as large as its slope, the same step suits every resample."""
    lambdas = 1 + noisy(10, k=20)[1]
    grid, others = [0.0, 1.0, 3.0], lambdas[torch.randperm(10, generator=seeded())]
    together = call(bootstrap(grid, seeded(), quantile=0.0), lambdas, lambdas)
    apart = call(bootstrap(grid, seeded(), quantile=0.0), lambdas, others)
    assert (together == 0).all()
    assert (apart > 0).any()


# --- randomness -----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_dampings_and_a_call_draws_anew():
    gammas, lambdas = noisy(k=30)
    generator = seeded()
    rule = bootstrap(np.linspace(0, 5, 200), generator, 10)
    before = generator.get_state()
    first = call(rule, gammas, lambdas)
    between = generator.get_state()
    assert not torch.equal(between, before)
    assert not torch.equal(call(rule, gammas, lambdas), first)
    generator.manual_seed(0)
    assert torch.equal(call(rule, gammas, lambdas), first)
    assert torch.equal(generator.get_state(), between)


def test_draws_come_from_the_generator_alone():
    state = torch.get_rng_state()
    call(bootstrap(GRID, seeded()), *noisy())
    assert torch.equal(torch.get_rng_state(), state)


@every_rule
@pytest.mark.parametrize("n2", [12, 5])
def test_an_ensemble_is_its_members(make, n2):
    members = [noisy(12, n2, seed=seed) for seed in range(3)]
    gammas, lambdas = (torch.stack(parts) for parts in zip(*members, strict=True))
    together = vmap(lambda g, x: call(make(), g, x))(gammas, lambdas)
    torch.testing.assert_close(together, torch.stack([call(make(), *each) for each in members]))


def test_an_ensemble_draws_once():
    gammas, lambdas = noisy()
    one, many = seeded(), seeded()
    call(bootstrap(GRID, one), gammas, lambdas)
    rule = bootstrap(GRID, many)
    vmap(lambda g: call(rule, g, lambdas))(torch.stack([gammas, gammas + 1]))
    assert torch.equal(one.get_state(), many.get_state())


# --- refusals -------------------------------------------------------------------------------


def booted(**changes):
    return lambda: bootstrap(**{"grid": [1.0], "generator": seeded()} | changes)


REFUSALS = {
    "constant": (lambda: constant(-1.0), ValueError, "damping must be a number ≥ 0; got -1.0"),
    "fraction": (lambda: relative(-1.0), ValueError, "^relative: fraction must be .* ≥ 0; got -1"),
    "fraction nan": (lambda: relative(math.nan), ValueError, "fraction must be .*; got nan"),
    "fraction type": (lambda: relative("1"), TypeError, "^relative: fraction must be .* got '1'"),
    "fraction vector": (lambda: relative(torch.ones(2)), TypeError, r"shape \[2\]"),
    "caution": (
        lambda: signal_to_noise(-0.5),
        ValueError,
        r"^signal_to_noise: caution must be a number ≥ 0; got -0\.5",
    ),
    "caution nan": (lambda: signal_to_noise(math.nan), ValueError, "caution must.*got nan"),
    "caution type": (lambda: signal_to_noise(None), TypeError, "caution must.*got None"),
    "grid empty": (booted(grid=[]), ValueError, r"^bootstrap: grid .*at least one; got \[\]"),
    "grid negative": (booted(grid=[1.0, -2.0]), ValueError, r"numbers ≥ 0.*got \[1\.0, -2\.0\]"),
    "grid nan": (booted(grid=[math.nan]), ValueError, r"numbers ≥ 0.*got \[nan\]\. Pass some"),
    "grid number": (booted(grid=1.0), ValueError, "must be a sequence .*got 1.0"),
    "grid matrix": (booted(grid=torch.ones(1, 2)), ValueError, "must be a sequence"),
    "grid None": (booted(grid=None), TypeError, "^bootstrap: grid must be .* got None"),
    "grid string": (booted(grid="ab"), TypeError, "grid must be .* got 'ab'"),
    "grid strings": (booted(grid=["1"]), TypeError, r"grid must be .* got \['1'\]"),
    "grid ragged": (booted(grid=[[1.0], 2.0]), (TypeError, ValueError), "grid must be"),
    "generator": (booted(generator=0), TypeError, "^bootstrap: generator must be .*; got 0"),
    "generator None": (booted(generator=None), TypeError, "a torch.Generator; got None. Make one"),
    "resamples": (booted(resamples=0), ValueError, "^bootstrap: resamples .* ≥ 1; got 0. Pass"),
    "resamples float": (booted(resamples=10.0), TypeError, "an integer ≥ 1; got 10.0"),
    "resamples bool": (booted(resamples=True), TypeError, "an integer ≥ 1; got True"),
    "quantile below": (booted(quantile=-0.1), ValueError, "^bootstrap: quantile .*; got -0.1. P"),
    "quantile above": (booted(quantile=5), ValueError, "must lie in 0 to 1; got 5"),
    "quantile nan": (booted(quantile=math.nan), ValueError, "must lie in 0 to 1; got nan"),
    "quantile type": (booted(quantile="5%"), TypeError, "must lie in 0 to 1; got '5%'"),
    "quantile bool": (booted(quantile=True), TypeError, "must lie in 0 to 1; got True"),
}


@pytest.mark.parametrize("case", REFUSALS, ids=REFUSALS)
def test_refusals_come_when_the_rule_is_made(case):
    make, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        make()


# --- through the step -----------------------------------------------------------------------


@every_rule
@DTYPES
@pytest.mark.parametrize("select", [None, top_k(2)], ids=["all", "top two"])
def test_every_rule_damps_a_regression(make, dtype, select):
    generator = seeded(4)
    X = torch.randn(20, 3, generator=generator, dtype=FLOAT64).to(dtype)
    y = X @ torch.tensor([[1.0], [-2.0], [0.0]], dtype=dtype) + X[:, :1].cos()
    w = torch.zeros(3, 1, dtype=dtype)
    step, info = newton_step_and_info(
        lambda w, X: X @ w, w, X, y, F.mse_loss, make(), select=select
    )
    delta = call(make(), info.gammas.double(), info.lambdas.double(), info.evals.double())
    torch.testing.assert_close(info.dampings, delta.to(dtype), rtol=1e-3, atol=1e-5)
    tau = -info.gammas.mean(0) / (info.lambdas.mean(0) + info.dampings)
    torch.testing.assert_close(info.coefficients, tau, rtol=1e-3, atol=1e-5)
    assert F.mse_loss(X @ (w + step), y) < F.mse_loss(X @ w, y)


@every_rule
def test_every_rule_damps_an_ensemble(make):
    """The third direction has no curvature, which under ``vmap`` nobody can leave out."""
    X = torch.randn(10, 3, generator=seeded(4), dtype=FLOAT64) * torch.tensor([1.0, 1.0, 0.0])
    y, members = X.sum(1, keepdim=True).cos(), torch.eye(3, dtype=FLOAT64)[:, :, None]

    def step(w):
        return newton_step(lambda w, X: X @ w, w, X, y, F.mse_loss, make())

    torch.testing.assert_close(vmap(step)(members), torch.stack(list(map(step, members))))


def test_a_step_of_one_sample_refuses_signal_to_noise():
    X, w = torch.ones(1, 3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"^newton_step_and_info: signal_to_noise: .*two samples"):
        newton_step_and_info(
            lambda w, X: X @ w, w, X, torch.ones(1, 1), F.mse_loss, signal_to_noise()
        )
