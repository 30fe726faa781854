"""Leading eigenpairs of a matrix that is at hand, against all of its eigenpairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddnewton import above, energy, top_k
from ddnewton.iterative.dense_lanczos import PAIRS_SHARE, leading_pairs
from tests.iterative.spectra import FLOAT64, SPECTRA

SIDES = (256, 400)


def leading(*values):
    """Return a spectrum of some large eigenvalues and many small ones."""
    return lambda side: torch.cat([torch.tensor(values), 0.1 / torch.arange(2, side + 2)])[:side]


MORE_SPECTRA = SPECTRA | {
    "one large": leading(1.0),
    "apart": leading(*(1 - 0.07 * i for i in range(9))),
    "double": leading(1.0, 1.0, 0.5, 0.4),
    "double below": leading(1.0, 0.7, 0.5, 0.5, 0.4),
    "fivefold": leading(*5 * [1.0], 0.4),
    "all but the same": leading(1.0, 1 - 1e-9, 1 - 1e-10, 0.5),
    "rank 1": lambda side: torch.eye(side)[0],
    "rank 3": lambda side: torch.eye(side)[:3].sum(0) * torch.arange(side, 0, -1),
    "zero": torch.zeros,
    "one value": lambda side: torch.full((side,), 0.3),
    "tiny": lambda side: 1e-200 * 0.5 ** torch.arange(side, dtype=FLOAT64),
}
QUICK = ("geometric", "steep", "quadratic", "one large", "apart")
"""Where the ten largest eigenvalues must be found without the others."""


def matrix(spectrum, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    evals = MORE_SPECTRA[spectrum](side).to(FLOAT64)
    evecs, _ = torch.linalg.qr(torch.randn(side, side, dtype=FLOAT64, generator=generator))
    K = (evecs * evals) @ evecs.T
    return (K + K.T) / 2


def check(K, pairs, expected):
    """Assert that pairs are as accurate as those of a decomposition, and none is missing."""
    scale, k = float(expected[-1].abs()), len(pairs.evals)
    assert pairs.vectors.shape == (len(K), k)
    assert (pairs.evals.diff() >= 0).all()
    assert (pairs.evals - expected[-k:]).abs().max() <= 2e-13 * scale
    residuals = (K @ pairs.vectors - pairs.vectors * pairs.evals).norm(dim=0)
    assert (residuals <= 1e-13 * scale).all()
    gram = pairs.vectors.T @ pairs.vectors
    assert (gram - torch.eye(k, dtype=FLOAT64)).abs().max() <= 1e-13


@pytest.mark.parametrize("at_hand", [False, True], ids=["alone", "with eigenvalues"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("spectrum", MORE_SPECTRA)
def test_what_is_returned_is_leading(spectrum, side, at_hand):
    K = matrix(spectrum, side)
    expected = torch.linalg.eigvalsh(K)
    for k in (1, 2, 3, 5, 10, side // PAIRS_SHARE, side // PAIRS_SHARE + 1, side):
        pairs = leading_pairs(K, top_k(k).asked, expected if at_hand else None)
        if spectrum in QUICK and k <= 10:
            assert pairs is not None
        if k > side // PAIRS_SHARE or spectrum == "zero":
            assert pairs is None
        if pairs is not None:
            assert len(pairs.evals) == pairs.asked_for == k
            check(K, pairs, expected)


@given(
    st.sampled_from(list(MORE_SPECTRA)),
    st.integers(40, 300),
    st.integers(1, 18),
    st.integers(0, 99),
)
def test_any_matrix(spectrum, side, k, seed):
    K = matrix(spectrum, side, seed)
    pairs = leading_pairs(K, top_k(k).asked)
    if pairs is not None:
        check(K, pairs, torch.linalg.eigvalsh(K))


def test_a_start_without_the_leading_vector():
    """The first vector is the same every time; here it is orthogonal to the leading one."""
    start = torch.randn(300, dtype=FLOAT64, generator=torch.Generator().manual_seed(0))
    vector = torch.linspace(-1, 1, 300, dtype=FLOAT64)
    vector = vector - start * (vector @ start) / (start @ start)
    K = matrix("apart", 300) + 5 * torch.outer(vector, vector) / (vector @ vector)
    pairs = leading_pairs(K, top_k(2).asked)
    assert pairs is None or abs(pairs.evals[-1] - torch.linalg.eigvalsh(K)[-1]) < 1e-12


@pytest.mark.parametrize(
    "rule",
    [
        *(above(threshold) for threshold in (0.99, 0.8, 0.45, 0.2, 0.05, 0.0)),
        *(above(threshold, relative=False) for threshold in (9.0, 1.0, 0.4)),
        *(energy(fraction) for fraction in (0.05, 0.3, 0.8, 1.0)),
        *map(top_k, (1, 7)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("spectrum", ["steep", "apart", "double below", "uniform", "rank 3"])
def test_rules_take_what_they_take_of_all(spectrum, rule):
    K = matrix(spectrum, 400)
    expected = torch.linalg.eigvalsh(K)
    taken = rule(expected)
    count = int(taken.sum()) if taken.dtype == torch.bool else len(taken)
    pairs = leading_pairs(K, rule.asked)
    if pairs is None:
        assert spectrum not in QUICK or count > 10
        return
    assert pairs.asked_for == count
    assert len(pairs.evals) == max(count, 1)
    check(K, pairs, expected)


def test_the_same_matrix_gives_the_same_pairs_and_stays():
    K = matrix("geometric", 300)
    before = K.clone()
    torch.manual_seed(1)
    first, state = leading_pairs(K, top_k(5).asked), torch.random.get_rng_state()
    second = leading_pairs(K, top_k(5).asked)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(K, before)
