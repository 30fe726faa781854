"""Conjugate gradients: against dense solves, and the share that is told against the true one."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddnewton.errors import BadValue, NotFinite
from ddnewton.iterative.conjugate_gradients import conjugate_gradients
from tests.iterative.spectra import FLOAT64, POWERS, SIDES, SPECTRA, matrix_and_right, true_loss
from tests.reference import error

DELTAS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)
FLOAT32_ROUNDING = 2.0**-23
REFERENCE = 1e-18
"""A share of the energy that a dense solve itself gives away, or nearly."""


def counted(G, dtype=FLOAT64):
    """Return v ↦ G v in some dtype, and the list that grows with each product."""
    calls, matrix = [], G.to(dtype)

    def product(v):
        calls.append(1)
        return (matrix @ v.to(dtype)).to(FLOAT64)

    return product, calls


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_solution_is_that_of_a_dense_solve(spectrum, side):
    G, _, _, b = matrix_and_right(spectrum, "anywhere", side)
    for delta in DELTAS[1:]:
        product, calls = counted(G)
        solution = conjugate_gradients(product, b, delta, tol=1e-20, limit=5000)
        assert solution.converged
        assert solution.products == len(calls)
        A = G + delta * torch.eye(side, dtype=FLOAT64)
        assert error(solution.x, torch.linalg.solve(A, b)) < 1e-7
        assert solution.residual == pytest.approx(
            float((b - A @ solution.x).norm() / b.norm()), rel=0.03, abs=1e-11
        )


problems = st.tuples(
    st.sampled_from(list(SPECTRA)),
    st.sampled_from(list(POWERS)),
    st.integers(1, 120),
    st.integers(0, 1000),
)
"""Spectrum, power, side and seed."""
in_range = problems.filter(lambda problem: problem[1] != "anywhere")


def least_squared(evals, evecs, b):
    """Return bᵀG⁺b."""
    coordinates = evecs.T @ b
    return float((coordinates.square() / torch.where(evals > 0, evals, math.inf)).sum())


@pytest.mark.parametrize(("dtype", "rounding"), [(FLOAT64, 0.0), (torch.float32, FLOAT32_ROUNDING)])
@given(problem=problems, exponent=st.floats(-6, 1))
def test_never_less_is_told_than_is_lost(dtype, rounding, problem, exponent):
    G, _, _, b = matrix_and_right(*problem)
    product, _ = counted(G, dtype)
    delta = 10**exponent
    for limit in (*range(1, 12), 20, 50, 150):
        solution = conjugate_gradients(product, b, delta, tol=1e-10, limit=limit, rounding=rounding)
        true = true_loss(G, b, delta, solution.x)
        assert 0 <= solution.lost <= 1
        assert solution.lost >= true * (1 - 1e-6) - REFERENCE
        assert solution.products <= limit
        assert solution.converged == (solution.lost <= 1e-10)


@pytest.mark.parametrize(("dtype", "rounding"), [(FLOAT64, 0.0), (torch.float32, FLOAT32_ROUNDING)])
@given(problem=in_range, exponent=st.floats(-6, 1), excess=st.floats(0, 2))
def test_nor_with_what_is_known_of_a_gradient(dtype, rounding, problem, exponent, excess):
    G, evals, evecs, b = matrix_and_right(*problem)
    product, _ = counted(G, dtype)
    delta, squared = 10**exponent, least_squared(evals, evecs, b) * 10**excess * (1 + 1e-9)
    for limit in (*range(1, 12), 20, 50, 150):
        solution, without = (
            conjugate_gradients(
                product, b, delta, tol=1e-10, limit=limit, rounding=rounding, squared=size
            )
            for size in (squared, math.inf)
        )
        true = true_loss(G, b, delta, solution.x)
        assert solution.lost >= true * (1 - 1e-6) - REFERENCE
        assert solution.products <= without.products


@pytest.mark.parametrize("power", ["gradient", "range"])
@pytest.mark.parametrize("spectrum", ["geometric", "steep", "deficient", "quadratic", "uniform"])
def test_of_a_gradient_within_three_times_the_truth_is_told(spectrum, power):
    ratios = []
    G, evals, evecs, b = matrix_and_right(spectrum, power, 200)
    product, _ = counted(G)
    squared = least_squared(evals, evecs, b)
    for delta in DELTAS[1:]:
        for limit in (*range(1, 40), 60, 100, 150):
            solution = conjugate_gradients(
                product, b, delta, tol=1e-6, limit=limit, squared=squared
            )
            true = true_loss(G, b, delta, solution.x)
            ratios += [solution.lost / true] * (1e-6 < true < 0.1)
            if solution.converged:
                break
    assert statistics.median(ratios) < 2
    assert max(ratios) < 3


@pytest.mark.parametrize("power", ["anywhere", "gradient"])
def test_what_is_told_is_mostly_within_three_times_the_truth(power):
    ratios = []
    for spectrum in ("geometric", "steep", "deficient", "quadratic"):
        G, _, _, b = matrix_and_right(spectrum, power, 200)
        product, _ = counted(G)
        for delta in DELTAS[2:]:
            for limit in range(1, 40):
                solution = conjugate_gradients(product, b, delta, tol=1e-8, limit=limit)
                true = true_loss(G, b, delta, solution.x)
                ratios += [solution.lost / true] * (true < 0.1)
                if solution.converged:
                    break
    assert statistics.median(ratios) < 2
    assert statistics.quantiles(ratios, n=10)[-1] < 3
    assert max(ratios) < 6


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("delta", [1e-3, 0.1])
def test_products_in_float32_are_enough_for_a_step(power, delta):
    G, _, _, b = matrix_and_right("steep", power, 150)
    product, _ = counted(G, torch.float32)
    solution = conjugate_gradients(
        product, b, delta, tol=1e-3, limit=300, rounding=FLOAT32_ROUNDING
    )
    assert solution.converged
    assert true_loss(G, b, delta, solution.x) <= solution.lost <= 1e-3


def test_beyond_its_rounding_nothing_is_claimed():
    G, _, _, b = matrix_and_right("steep", "anywhere", 100)
    product, calls = counted(G, torch.float32)
    solution = conjugate_gradients(
        product, b, 1e-4, tol=1e-12, limit=3000, rounding=FLOAT32_ROUNDING
    )
    assert not solution.converged
    assert len(calls) == solution.products < 1500
    assert true_loss(G, b, 1e-4, solution.x) <= solution.lost < 1e-4


@pytest.mark.parametrize("power", POWERS)
@given(seed=st.integers(0, 100), exponent=st.floats(-5, 0), scale=st.floats(-2, 2))
def test_a_start_is_used_and_its_share_told(power, seed, exponent, scale):
    G, _, _, b = matrix_and_right("steep", power, 40, seed)
    delta, (product, _) = 10**exponent, counted(G)
    start = scale * conjugate_gradients(product, b, delta, tol=0.1, limit=30).x
    start = start + 0.01 * torch.randn(40, dtype=FLOAT64)
    for limit in (1, 2, 5, 20, 60):
        solution = conjugate_gradients(product, b, delta, tol=1e-10, limit=limit, start=start)
        assert solution.products <= limit
        assert solution.lost >= true_loss(G, b, delta, solution.x) * (1 - 1e-6) - REFERENCE


def test_the_solution_itself_as_a_start_takes_two_products_at_most():
    G, _, _, b = matrix_and_right("geometric", "anywhere", 50)
    exact = torch.linalg.solve(G + 0.1 * torch.eye(50, dtype=FLOAT64), b)
    product, calls = counted(G)
    solution = conjugate_gradients(product, b, 0.1, tol=1e-6, limit=50, start=3 * exact)
    assert solution.converged
    assert len(calls) <= 2
    assert error(solution.x, exact) < 1e-10


@given(problem=problems, exponent=st.floats(-6, 1))
def test_with_a_preconditioner(problem, exponent):
    G, _, _, b = matrix_and_right(*problem)
    side, (product, _) = len(G), counted(G)
    delta, weights = 10**exponent, torch.linspace(0.05, 1, side, dtype=FLOAT64)
    # P = diag(weights) + half of G / δ is below A / δ.
    inverse = torch.linalg.inv(weights.diag() + G / (2 * delta))
    for limit in (1, 2, 3, 5, 10, 30):
        solution = conjugate_gradients(
            product, b, delta, tol=1e-10, limit=limit, preconditioner=lambda v: inverse @ v
        )
        true = true_loss(G, b, delta, solution.x)
        assert solution.lost >= true * (1 - 1e-6) - REFERENCE
    assert solution.converged or limit < side


@pytest.mark.parametrize("spectrum", ["deficient", "flat", "quadratic"])
def test_without_damping_the_residual_decides(spectrum):
    G, evals, evecs, b = matrix_and_right(spectrum, "range", 40)
    product, _ = counted(G)
    solution = conjugate_gradients(product, b, 0.0, tol=1e-9, limit=500)
    assert solution.converged
    assert solution.residual <= 1e-9
    coordinates = torch.where(evals > 0, evecs.T @ b / evals, 0)
    assert error(solution.x, evecs @ coordinates) < 1e-4
    assert solution.lost in {0.0, 1.0}


def test_without_damping_and_consistency_nothing_converges():
    G, _, _, b = matrix_and_right("deficient", "anywhere", 40)
    product, _ = counted(G)
    solution = conjugate_gradients(product, b, 0.0, tol=1e-9, limit=200)
    assert not solution.converged
    assert solution.lost == 1
    assert solution.x.isfinite().all()


def test_nothing_to_solve_takes_no_product():
    product, calls = counted(torch.eye(3, dtype=FLOAT64))
    solution = conjugate_gradients(product, torch.zeros(3, dtype=FLOAT64), 1.0, tol=0.1, limit=5)
    assert (solution.lost, solution.converged, solution.products, calls) == (0, True, 0, [])
    assert not solution.x.any()


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_a_right_side_without_curvature_is_told_of(delta):
    product, _ = counted(torch.diag(torch.tensor([1.0, 0.0], dtype=FLOAT64)))
    b = torch.tensor([0.0, 2.0], dtype=FLOAT64)
    solution = conjugate_gradients(product, b, delta, tol=1e-6, limit=5)
    assert not solution.curved
    assert solution.converged == (delta > 0)
    if delta:
        assert error(solution.x, b / delta) < 1e-15


def test_no_product_at_all_is_allowed():
    product, calls = counted(torch.eye(3, dtype=FLOAT64))
    solution = conjugate_gradients(product, torch.ones(3, dtype=FLOAT64), 1.0, tol=0.1, limit=0)
    assert (solution.lost, solution.residual, solution.converged, calls) == (1, 1, False, [])


def test_a_negative_curvature_is_refused():
    product, _ = counted(torch.diag(torch.tensor([1.0, -1e-3], dtype=FLOAT64)))
    with pytest.raises(BadValue, match=r"must be positive semidefinite; got a curvature of -0\.00"):
        conjugate_gradients(
            product, torch.tensor([0.01, 1.0], dtype=FLOAT64), 1e-4, tol=0.1, limit=9
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_products_that_are_not_finite_are_refused(value):
    product, _ = counted(torch.full((3, 3), value, dtype=FLOAT64))
    with pytest.raises(NotFinite, match="derivatives must be finite"):
        conjugate_gradients(product, torch.ones(3, dtype=FLOAT64), 1.0, tol=0.1, limit=5)


def test_an_interrupt_passes_through():
    def product(v):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conjugate_gradients(product, torch.ones(3, dtype=FLOAT64), 1.0, tol=0.1, limit=5)
