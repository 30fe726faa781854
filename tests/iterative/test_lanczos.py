"""Leading eigenpairs by the Lanczos method, against those of the dense matrix."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddnewton.errors import NotFinite
from ddnewton.iterative.lanczos import WHOLE_SPACE, leading_eigenpairs
from tests.iterative.spectra import FLOAT64, SPECTRA, fraction

FLOAT32_ROUNDING = 2.0**-23


def repeated(side):
    """Return eigenvalues that come up to five times, and do not break the iteration down."""
    evals = 10 ** (-3 * fraction(side))
    evals[:3], evals[3:8], evals[9:13] = 1.0, 0.7, 0.6
    return evals


def rank(count):
    return lambda side: torch.arange(side, 0, -1, dtype=FLOAT64) * (torch.arange(side) < count)


MORE_SPECTRA = SPECTRA | {
    "repeated": repeated,
    "blocks": lambda side: torch.where(fraction(side) < 0.1, 1.0, 0.5 * (fraction(side) < 0.3)),
    "zero": rank(0),
    "rank 1": rank(1),
    "rank 3": rank(3),
    "a few large ones": lambda side: (
        1 / (1 + torch.arange(side, dtype=FLOAT64)) + 30 * rank(7)(side)
    ),
}
SIDES = (1, 2, 9, WHOLE_SPACE, WHOLE_SPACE + 1, 150, 400)


def matrix(spectrum, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    evals = MORE_SPECTRA[spectrum](side).to(FLOAT64)
    evecs, _ = torch.linalg.qr(torch.randn(side, side, dtype=FLOAT64, generator=generator))
    G = (evecs * evals) @ evecs.T
    return (G + G.T) / 2, torch.randn(side, 2, dtype=FLOAT64, generator=generator)


def counted(G, dtype=FLOAT64):
    """Return V ↦ G V in some dtype, and the list of how many columns each product had."""
    calls, entries = [], G.to(dtype)

    def product(V):
        calls.append(V.shape[1])
        return (entries @ V.to(dtype)).to(FLOAT64)

    return product, calls


def check(G, pairs, k, tol):
    """Assert that the pairs are the leading ones of G."""
    evals = torch.linalg.eigvalsh(G)[-k:]
    scale = float(evals[-1])
    assert (pairs.evals.diff() >= 0).all()
    assert pairs.vectors.shape == (len(G), min(k, len(G)))
    assert (pairs.evals - evals).abs().max() <= tol * scale + 1e-13 * scale
    gram = pairs.vectors.T @ pairs.vectors
    assert (gram - torch.eye(len(gram), dtype=FLOAT64)).abs().max() < 1e-12
    # The residuals are told, and not too low.
    true = (G @ pairs.vectors - pairs.vectors * pairs.evals).norm(dim=0)
    assert (true <= pairs.residuals).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spectrum", MORE_SPECTRA)
def test_the_pairs_are_the_leading_ones(spectrum, side):
    G, start = matrix(spectrum, side)
    for k in (1, 2, 5, 10, 30):
        product, calls = counted(G)
        pairs = leading_eigenpairs(product, side, k, tol=1e-8, limit=5000, start=start)
        assert pairs.converged
        assert pairs.products == sum(calls)
        assert max(calls) <= 2
        check(G, pairs, k, 1e-10)
        assert (pairs.residuals <= 1e-8 * pairs.evals[-1]).all()


@given(
    st.sampled_from(list(MORE_SPECTRA)),
    st.integers(1, 160),
    st.integers(1, 40),
    st.integers(0, 1000),
    st.integers(1, 4),
)
def test_any_matrix_and_any_block(spectrum, side, k, seed, b):
    G, _ = matrix(spectrum, side, seed)
    start = torch.randn(side, b, dtype=FLOAT64)
    product, _ = counted(G)
    pairs = leading_eigenpairs(product, side, k, tol=1e-8, limit=5000, start=start)
    assert pairs.converged
    check(G, pairs, k, 1e-9)


@pytest.mark.parametrize("side", [100, 400])
def test_subspaces_of_separate_eigenvalues(side):
    G, start = matrix("a few large ones", side)
    product, _ = counted(G)
    pairs = leading_eigenpairs(product, side, 7, tol=1e-10, limit=3000, start=start)
    _, evecs = torch.linalg.eigh(G)
    cosines = torch.linalg.svdvals(evecs[:, -7:].T @ pairs.vectors)
    assert (1 - cosines).abs().max() < 1e-12


def test_a_start_without_a_direction_is_no_obstacle():
    G, _ = matrix("repeated", 200)
    for start in (torch.zeros(200, 2, dtype=FLOAT64), torch.ones(200, 2, dtype=FLOAT64)):
        product, _ = counted(G)
        pairs = leading_eigenpairs(product, 200, 9, tol=1e-8, limit=3000, start=start)
        assert pairs.converged
        check(G, pairs, 9, 1e-10)


def test_a_start_in_the_null_space_is_no_obstacle():
    evals, evecs = torch.linalg.eigh(matrix("rank 3", 200)[0])
    G = (evecs * evals.clamp(min=0)) @ evecs.T
    product, _ = counted(G)
    pairs = leading_eigenpairs(product, 200, 5, tol=1e-8, limit=3000, start=evecs[:, :2].clone())
    check(G, pairs, 5, 1e-10)


def test_the_same_start_gives_the_same_pairs():
    G, start = matrix("repeated", 200)
    torch.manual_seed(1)
    first = leading_eigenpairs(lambda V: G @ V, 200, 9, tol=1e-8, limit=3000, start=start)
    state = torch.random.get_rng_state()
    second = leading_eigenpairs(lambda V: G @ V, 200, 9, tol=1e-8, limit=3000, start=start)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize("spectrum", ["geometric", "repeated", "deficient", "rank 3"])
def test_products_in_float32(spectrum, tol):
    G, start = matrix(spectrum, 300)
    product, _ = counted(G, torch.float32)
    pairs = leading_eigenpairs(
        product, 300, 10, tol=tol, limit=3000, start=start, rounding=FLOAT32_ROUNDING
    )
    assert pairs.converged
    check(G, pairs, 10, tol)


def test_beyond_their_rounding_nothing_is_claimed():
    G, start = matrix("geometric", 300)
    product, calls = counted(G, torch.float32)
    pairs = leading_eigenpairs(
        product, 300, 10, tol=1e-10, limit=3000, start=start, rounding=FLOAT32_ROUNDING
    )
    assert not pairs.converged
    assert sum(calls) < 300
    check(G, pairs, 10, 1e-6)


@pytest.mark.parametrize("limit", [0, 12, 40])
def test_at_the_limit_the_pairs_so_far_come_out(limit):
    G, start = matrix("uniform", 400)
    product, calls = counted(G)
    pairs = leading_eigenpairs(product, 400, 10, tol=1e-8, limit=limit, start=start)
    assert not pairs.converged
    assert sum(calls) == pairs.products == max(limit, 10)
    assert pairs.vectors.shape == (400, 10)


def test_the_basis_fits_into_the_memory():
    G, start = matrix("geometric", 400)
    products = []
    for memory in (None, 8 * 400 * 16, 1):
        product, calls = counted(G)
        pairs = leading_eigenpairs(
            product, 400, 10, tol=1e-8, limit=9000, start=start, memory=memory
        )
        assert pairs.converged
        check(G, pairs, 10, 1e-10)
        products.append(sum(calls))
    assert products[0] < products[1] < products[2]


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(NotFinite, match="derivatives must be finite"):
        leading_eigenpairs(
            lambda V: V * math.nan,
            100,
            2,
            tol=0.1,
            limit=50,
            start=torch.ones(100, 2, dtype=FLOAT64),
        )
