"""Sketches as preconditioners, the solutions that they help to, and refined ones."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddnewton.errors import NotFinite
from ddnewton.iterative.conjugate_gradients import conjugate_gradients
from ddnewton.iterative.refinement import refined
from ddnewton.iterative.sketch import SKETCH_COPIES, preconditioner, sketch
from ddnewton.iterative.solve import PLAIN_PRODUCTS, SKETCH_RANK, solve
from tests.iterative.spectra import FLOAT64, POWERS, SPECTRA, matrix_and_right, true_loss
from tests.reference import error

FLOAT32 = torch.float32
ROUNDINGS = {FLOAT64: 0.0, FLOAT32: 2.0**-23}
REFERENCE = 1e-18
"""A share of the energy that a dense solve itself gives away, or nearly."""

problems = st.tuples(
    st.sampled_from(list(SPECTRA)),
    st.sampled_from(list(POWERS)),
    st.integers(1, 120),
    st.integers(0, 1000),
)
"""Spectrum, power, side and seed."""
dtypes = st.sampled_from([FLOAT64, FLOAT32])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counted(G, dtype=FLOAT64):
    """Return v ↦ G v in some dtype, and the list that grows with each product."""
    calls, entries = [], G.to(dtype)

    def product(V):
        calls.extend([1] * (V.shape[1] if V.ndim == 2 else 1))
        return (entries @ V.to(dtype)).to(FLOAT64)

    return product, calls


@given(problems, st.integers(1, 130), st.floats(-6, 1), dtypes, dtypes)
def test_the_damped_matrix_is_above_its_preconditioner(problem, rank, exponent, dtype, stored):
    G, *_ = matrix_and_right(*problem)
    side, delta, (product, calls) = len(G), 10**exponent, counted(G, dtype)
    made = sketch(product, side, rank, seeded(), rounding=ROUNDINGS[dtype], dtype=stored)
    assert made.products == len(calls) == made.vectors.shape[1] == min(rank, side)
    assert made.vectors.dtype == stored
    assert (made.evals >= 0).all()
    inverse = preconditioner(made, delta)
    columns = [inverse(column) for column in torch.eye(side, dtype=FLOAT64)]
    P_inverse = torch.stack(columns, 1)
    assert error(P_inverse, P_inverse.T) < (1e-12 if stored == FLOAT64 else 1e-6)
    # A ≥ δP where P^(-1/2) A P^(-1/2) ≥ δ.
    root = torch.linalg.cholesky((P_inverse + P_inverse.T) / 2)
    A = G + delta * torch.eye(side, dtype=FLOAT64)
    smallest = torch.linalg.eigvalsh(root.T @ A @ root)[0]
    assert smallest >= delta * (1 - 1e-6) - 1e-14


def test_the_sketch_of_a_matrix_of_low_rank_is_the_matrix():
    G, evals, *_ = matrix_and_right("deficient", "range", 100)
    product, _ = counted(G)
    made = sketch(product, 100, 40, seeded())
    assert error(made.vectors * made.evals @ made.vectors.T, G) < 1e-12
    assert (made.evals - evals[:40]).abs().max() < 1e-13


def test_the_sketch_of_nothing_is_nothing():
    made = sketch(torch.zeros_like, 30, 5, seeded())
    assert made.evals.max() < 1e-300
    v = torch.randn(30, dtype=FLOAT64)
    assert error(preconditioner(made, 1e-3)(v), v) < 1e-12


def test_a_sketch_fits_into_the_memory():
    G, *_ = matrix_and_right("geometric", "range", 100)
    memory = 12.5 * SKETCH_COPIES * 8 * 100
    made = sketch(lambda V: G @ V, 100, 40, seeded(), memory=memory)
    assert made.vectors.shape == (100, 12)


def test_products_of_a_sketch_must_be_finite():
    with pytest.raises(NotFinite, match="derivatives must be finite"):
        sketch(lambda V: V * math.nan, 30, 5, seeded())


@given(problems, st.integers(1, 60), st.floats(-6, 1), dtypes, dtypes)
def test_with_a_sketch_never_less_is_told_than_is_lost(problem, rank, exponent, dtype, stored):
    G, _, _, b = matrix_and_right(*problem)
    delta, (product, _) = 10**exponent, counted(G, dtype)
    rounding = ROUNDINGS[dtype]
    made = sketch(product, len(G), rank, seeded(), rounding=rounding, dtype=stored)
    for limit in (1, 2, 3, 5, 10, 30, 100):
        solution, used = solve(
            product,
            b,
            delta,
            tol=1e-8,
            limit=limit,
            generator=seeded(),
            rounding=rounding,
            approximation=made,
        )
        assert used is made
        assert solution.products <= limit
        assert solution.lost >= true_loss(G, b, delta, solution.x) * (1 - 1e-6) - REFERENCE


@pytest.mark.parametrize("dtype", ROUNDINGS)
def test_one_sketch_serves_all_dampings(dtype):
    G, _, _, b = matrix_and_right("steep", "gradient", 400)
    product, _ = counted(G, dtype)
    rounding = ROUNDINGS[dtype]
    made = sketch(product, 400, 150, seeded(), rounding=rounding)
    for delta in (1e-5, 1e-4, 1e-3, 1e-2):
        with_sketch, plain = (
            conjugate_gradients(
                product,
                b,
                delta,
                tol=1e-2,
                limit=2000,
                rounding=rounding,
                preconditioner=inverse,
            )
            for inverse in (preconditioner(made, delta), None)
        )
        assert with_sketch.converged
        assert with_sketch.products < 8
        assert with_sketch.products < plain.products


def test_a_sketch_is_made_where_plain_iterations_take_long():
    G, _, _, b = matrix_and_right("steep", "gradient", 400)
    (product, calls), delta = counted(G), 1e-6
    solution, made = solve(product, b, delta, tol=1e-6, limit=2000, generator=seeded())
    assert solution.converged
    assert solution.products == len(calls) < PLAIN_PRODUCTS + SKETCH_RANK + 30
    assert made.products == SKETCH_RANK
    assert true_loss(G, b, delta, solution.x) <= solution.lost <= 1e-6
    # The next one goes with it from the beginning.
    again, used = solve(
        product, b, 2 * delta, tol=1e-6, limit=99, generator=seeded(), approximation=made
    )
    assert used is made
    assert again.converged
    assert again.products < 30


@pytest.mark.parametrize("limit", [99, 100, 101, 110, 130, 300])
@pytest.mark.parametrize("memory", [None, 0.0, 1e6])
def test_the_limit_is_kept_with_a_sketch_and_without(limit, memory):
    G, _, _, b = matrix_and_right("geometric", "anywhere", 400)
    product, calls = counted(G)
    solution, made = solve(
        product, b, 1e-6, tol=1e-10, limit=limit, generator=seeded(), memory=memory
    )
    assert not solution.converged
    assert len(calls) == solution.products == limit
    assert (made is None) == (memory == 0 or limit < PLAIN_PRODUCTS + 16)
    assert true_loss(G, b, 1e-6, solution.x) <= solution.lost


def test_what_converges_soon_needs_no_sketch():
    G, _, _, b = matrix_and_right("geometric", "anywhere", 100)
    solution, made = solve(lambda v: G @ v, b, 0.1, tol=1e-2, limit=500, generator=seeded())
    assert made is None
    assert solution.converged


def test_without_damping_there_is_no_sketch():
    G, _, _, b = matrix_and_right("quadratic", "range", 100)
    solution, made = solve(lambda v: G @ v, b, 0.0, tol=1e-8, limit=5000, generator=seeded())
    assert made is None
    assert solution.converged


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
def test_refined_solutions_have_all_digits(spectrum, power, delta):
    G, _, _, b = matrix_and_right(spectrum, power, 150)
    (cheap, few), (precise, many) = counted(G, FLOAT32), counted(G)
    solution = refined(cheap, precise, b, delta, tol=1e-20, limit=2000, rounding=ROUNDINGS[FLOAT32])
    assert solution.converged
    assert solution.products == len(few) + len(many)
    assert len(many) <= 4
    A = G + delta * torch.eye(150, dtype=FLOAT64)
    assert error(solution.x, torch.linalg.solve(A, b)) < 1e-9


@given(problems, st.floats(-6, 1), st.integers(1, 60))
def test_a_refined_solution_tells_no_less_than_is_lost(problem, exponent, limit):
    G, _, _, b = matrix_and_right(*problem)
    delta, (cheap, few), (precise, many) = 10**exponent, counted(G, FLOAT32), counted(G)
    solution = refined(
        cheap, precise, b, delta, tol=1e-16, limit=limit, rounding=ROUNDINGS[FLOAT32]
    )
    assert len(few) + len(many) == solution.products <= limit
    assert solution.lost >= true_loss(G, b, delta, solution.x) * (1 - 1e-6) - REFERENCE
    assert solution.converged == (solution.lost <= 1e-16)


def test_refinement_without_damping():
    G, _, _, b = matrix_and_right("quadratic", "range", 40)
    (cheap, _), (precise, _) = counted(G, FLOAT32), counted(G)
    solution = refined(cheap, precise, b, 0.0, tol=1e-10, limit=3000, rounding=ROUNDINGS[FLOAT32])
    assert solution.converged
    assert error(G @ solution.x, b) < 1e-9


def test_nothing_to_refine_takes_no_product():
    cheap, calls = counted(torch.eye(3, dtype=FLOAT64))
    zero = torch.zeros(3, dtype=FLOAT64)
    solution = refined(cheap, cheap, zero, 1.0, tol=1e-9, limit=9, rounding=1e-7)
    assert (solution.lost, solution.converged, calls) == (0, True, [])
