"""One Krylov space for all dampings: solutions, lengths and bounds against dense systems."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ddnewton.errors import NotFinite
from ddnewton.iterative.krylov import Krylov, grown
from tests.methods import FLOAT64, seeded

DELTAS = (1e-8, 1e-4, 1e-2, 1.0, 100.0)


def system(side=40, rank=25, decades=4, seed=0):
    """A semidefinite matrix of a rank, and a right side, in its range or not."""
    generator = seeded(seed)
    basis, _ = torch.linalg.qr(torch.randn(side, side, dtype=FLOAT64, generator=generator))
    evals = torch.logspace(0, -decades, rank, dtype=FLOAT64)
    G = basis[:, :rank] * evals @ basis[:, :rank].mT
    right = torch.randn(side, dtype=FLOAT64, generator=generator)
    return G, right, G @ right


def space_of(G, right, limit=1000):
    return Krylov(product=lambda v: G @ v, right=right, rounding=0.0, limit=limit)


def solved(G, right, delta):
    return torch.linalg.solve(G + delta * torch.eye(len(G), dtype=FLOAT64), right)


def lost_of(G, right, x, delta):
    """‖x − x*‖² of ‖x*‖², in the norm of G + δI."""
    A, exact = G + delta * torch.eye(len(G), dtype=FLOAT64), solved(G, right, delta)
    return float((x - exact) @ A @ (x - exact) / (exact @ A @ exact))


@given(
    st.integers(0, 9),
    st.integers(2, 30),
    st.integers(0, 6),
    st.integers(1, 30),
    st.floats(-6, 3).map(lambda power: 10.0**power),
    st.booleans(),
)
def test_no_more_is_lost_than_is_told(seed, rank, decades, vectors, delta, inside):
    G, anywhere, in_range = system(30, rank, decades, seed)
    right = in_range if inside else anywhere
    space = space_of(G, right)
    for _ in range(vectors):
        if not space.is_complete:
            space.grow()
    x = space.solution(torch.tensor(delta, dtype=FLOAT64))
    assert lost_of(G, right, x, delta) <= space.lost(delta) * (1 + 1e-6) + 1e-12


@given(
    st.integers(0, 9),
    st.integers(2, 30),
    st.integers(0, 5),
    st.integers(1, 30),
    st.floats(-6, 3).map(lambda power: 10.0**power),
    st.floats(1, 3),
)
def test_no_more_is_lost_than_is_told_of_a_gradient(seed, rank, decades, vectors, delta, factor):
    G, _, right = system(30, rank, decades, seed)
    squared = factor * float(right @ torch.linalg.pinv(G, rtol=1e-10, hermitian=True) @ right)
    space = space_of(G, right)
    space.squared = squared
    for _ in range(vectors):
        if not space.is_complete:
            space.grow()
    x = space.solution(torch.tensor(delta, dtype=FLOAT64))
    assert lost_of(G, right, x, delta) <= space.lost(delta) * (1 + 1e-6) + 1e-12


def test_what_is_known_of_a_gradient_saves_products():
    G, _, right = system(200, 200, 1)
    alone, told = space_of(G, right), space_of(G, right)
    told.squared = float(right @ torch.linalg.solve(G, right))
    counts = [grown(space, 1e-6, 1e-2) and len(space.vectors) for space in (alone, told)]
    assert counts[1] < 0.7 * counts[0]
    delta = torch.tensor(1e-6, dtype=FLOAT64)
    assert lost_of(G, right, told.solution(delta), 1e-6) <= 1e-2


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-6])
@pytest.mark.parametrize("delta", DELTAS)
def test_a_space_grows_until_its_solution_is_accurate(delta, tol):
    G, right, _ = system()
    space = space_of(G, right)
    told = grown(space, delta, tol)
    x = space.solution(torch.tensor(delta, dtype=FLOAT64))
    assert lost_of(G, right, x, delta) <= told * (1 + 1e-6) + 1e-12
    assert told <= tol
    # Larger dampings take no further product.
    count = len(space.vectors)
    for larger in (2 * delta, 10 * delta):
        assert grown(space, larger, tol) <= tol
        x = space.solution(torch.tensor(larger, dtype=FLOAT64))
        assert lost_of(G, right, x, larger) <= tol
    assert len(space.vectors) == count


def test_the_bound_is_that_of_dense_matrices():
    """Gauss-Radau quadrature, with an eigenvalue prescribed a little below zero."""
    G, right, _ = system()
    space = space_of(G, right)
    for _ in range(9):
        space.grow()
        for delta in DELTAS:
            T, beta, m = space.tridiagonal(), space.further[-1], len(space.vectors)
            node, identity = 1e-4 * delta, torch.eye(m + 1, dtype=FLOAT64)
            extended = torch.zeros(m + 1, m + 1, dtype=FLOAT64)
            extended[:m, :m] = T
            extended[m, m - 1] = extended[m - 1, m] = beta
            last = torch.linalg.inv(T + node * identity[:m, :m])[-1, -1]
            extended[m, m] = beta**2 * last - node
            lower = torch.linalg.inv(T + delta * identity[:m, :m])[0, 0]
            upper = torch.linalg.inv(extended + delta * identity)[0, 0]
            expected = min(1.0, float((upper - lower) / upper))
            assert abs(space.lost(delta) - expected) < 1e-9


@pytest.mark.parametrize("inside", [True, False])
def test_solutions_and_lengths_of_a_complete_space(inside):
    G, anywhere, in_range = system(side=12, rank=7, decades=1)
    right = in_range if inside else anywhere
    space = space_of(G, right)
    while not space.is_complete:
        space.grow()
    assert len(space.vectors) <= 9  # one of rounding among them
    deltas = torch.tensor(DELTAS, dtype=FLOAT64)
    exact = [solved(G, right, delta) for delta in DELTAS]
    for delta, x in zip(deltas, exact, strict=True):
        assert (space.solution(delta) - x).norm() < 1e-7 * x.norm()
        assert space.lost(float(delta)) == 0
    lengths = torch.stack([x.norm() for x in exact])
    assert (space.lengths(deltas) / lengths - 1).abs().amax() < 1e-7
    if inside:
        least = space.solution(torch.zeros((), dtype=FLOAT64))
        assert (least - torch.linalg.pinv(G, rtol=1e-10) @ right).norm() < 1e-9 * least.norm()


def test_lengths_fall_with_the_damping():
    G, right, _ = system()
    space = space_of(G, right)
    for _ in range(6):
        space.grow()
    lengths = space.lengths(torch.logspace(-6, 3, 30, dtype=FLOAT64))
    assert (lengths.diff() < 0).all()
    x = space.solution(torch.tensor(0.1, dtype=FLOAT64))
    (length,) = space.lengths(torch.tensor([0.1], dtype=FLOAT64))
    assert abs(x.norm() / length - 1) < 1e-12


def test_nothing_to_solve_for_and_no_product_left():
    G, right, _ = system()
    zero = space_of(G, 0 * right)
    assert grown(zero, 0.1, 1e-2) == 0
    assert not zero.vectors
    assert not zero.solution(torch.tensor(0.1, dtype=FLOAT64)).any()
    assert not zero.lengths(torch.tensor([0.1], dtype=FLOAT64)).any()
    short = space_of(G, right, limit=2)
    assert short.lost(0.1) == 1
    told = grown(short, 1e-4, 1e-6)
    assert len(short.vectors) == 2
    x = short.solution(torch.tensor(1e-4, dtype=FLOAT64))
    assert 1e-6 < lost_of(G, right, x, 1e-4) <= told <= 1
    assert short.lost(0.0) == 1


def test_products_must_be_finite():
    space = Krylov(lambda v: v * torch.nan, torch.ones(3, dtype=FLOAT64), 0.0, 10)
    with pytest.raises(NotFinite, match="the derivatives must be finite"):
        space.grow()
