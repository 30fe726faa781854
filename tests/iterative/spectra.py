"""Matrices of given eigenvalues, and right sides, for the iterative solvers."""

import torch

FLOAT64 = torch.float64


def fraction(side):
    return torch.arange(side, dtype=FLOAT64) / max(side - 1, 1)


SPECTRA = {
    "geometric": lambda side: 10 ** (-6 * fraction(side)),
    "steep": lambda side: 10 ** (-12 * fraction(side)),
    "flat": lambda side: torch.ones(side, dtype=FLOAT64),
    "uniform": lambda side: 1 - 0.999 * fraction(side),
    "clustered": lambda side: 10 ** (-2.5 * (fraction(side) * 2.99).floor()),
    "deficient": lambda side: torch.where(
        fraction(side) <= 0.3, 10 ** (-12 * fraction(side)), torch.zeros(())
    ),
    "quadratic": lambda side: 1 / (1 + side * fraction(side)) ** 2,
}

POWERS = {"anywhere": 0.0, "gradient": 0.5, "range": 1.0}
"""Which power of λ the right side's coordinates go with."""

SIDES = (1, 2, 3, 17, 60, 150, 400)


def matrix_and_right(spectrum, power, side, seed=0):
    """Return G [side side], its eigenvalues, its eigenvectors, and b [side]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=FLOAT64, generator=generator)

    evals = SPECTRA[spectrum](side)
    evecs, _ = torch.linalg.qr(normal(side, side))
    G = (evecs * evals) @ evecs.T
    b = evecs @ (evals ** POWERS[power] * normal(side))
    return (G + G.T) / 2, evals, evecs, b


def true_loss(G, b, delta, x):
    """Return ‖x − x*‖²_A / ‖x*‖²_A, by a dense solve."""
    A = G + delta * torch.eye(len(G), dtype=FLOAT64)
    exact = torch.linalg.solve(A, b)
    e = x - exact
    return float(e @ A @ e) / float(exact @ A @ exact)
