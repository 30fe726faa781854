"""What leading eigenpairs of a Gram matrix cost, beside all of them and LAPACK's subset driver.

Run with ``python -m benchmarks.leading_directions``: medians of CPU time on one thread, the solvers
taking turns, since a busy machine is slow for all of them alike; with ``--device cuda`` of seconds.
A matrix is the Gram matrix of the perceptron 784-512-256-10: nine eigenvalues are large, and from
the tenth on they are close. ``×`` is in units of `torch.linalg.eigh`.
The solvers, each of k leading eigenvectors:

- subset: `scipy.linalg.eigh` with ``subset_by_index``, where SciPy is installed, on a CPU.
- rule: as ddnewton solves for `top_k`; all eigenpairs where these are cheaper.
- function: as for a caller's own ``select``, which is shown all eigenvalues first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.recipes import build
from ddnewton import gram_matrix, top_k
from ddnewton.iterative.dense_lanczos import PAIRS_SHARE, leading_pairs
from ddnewton.quadratic.leading import EIGENVALUES_FROM, LEADING_FROM

SIDES, QUICK_SIDES = (64, 128, 256, 576, 1152, 2304), (32, 400)
COUNTS = (1, 10, 50, 100)
COLUMNS = 9
"""How many a sample of ten classes has."""

Solver = Callable[[], object]


def gram(side: int, device: str) -> Tensor:
    """Return the Gram matrix of so many columns of the MLP."""
    problem = build("mlp", samples=-(-side // COLUMNS)).problem
    matrix = gram_matrix(*problem)[:side, :side]
    return matrix.to(device, torch.float64).contiguous()


def by_rule(K: Tensor, k: int) -> object:
    """Solve as for `top_k`."""
    cheap = len(K) >= LEADING_FROM and k * PAIRS_SHARE <= len(K)
    return (leading_pairs(K, top_k(k).asked) if cheap else None) or torch.linalg.eigh(K)


def by_function(K: Tensor, k: int) -> object:
    """Solve as for a caller's ``select`` that takes the k largest of all eigenvalues."""
    if len(K) < EIGENVALUES_FROM:
        return torch.linalg.eigh(K)
    evals = torch.linalg.eigvalsh(K)
    cheap = k * PAIRS_SHARE <= len(K)
    return (leading_pairs(K, top_k(k).asked, evals) if cheap else None) or torch.linalg.eigh(K)


def solvers(K: Tensor, k: int) -> dict[str, Solver]:
    """Return the solvers of k leading eigenpairs, those that are at hand."""
    ways: dict[str, Solver] = {
        "eigh": lambda: torch.linalg.eigh(K),
        "rule": lambda: by_rule(K, k),
        "function": lambda: by_function(K, k),
    }
    if find_spec("scipy") and not K.is_cuda:
        from scipy.linalg import eigh  # noqa: PLC0415 - where it is installed

        subset = (len(K) - k, len(K) - 1)
        ways["subset"] = lambda: eigh(K.numpy(), subset_by_index=subset, driver="evr")
    return ways


def medians(ways: dict[str, Solver], runs: int, device: str) -> dict[str, float]:
    """Return the median seconds of every solver, in turns; a first round warms up."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, solve in ways.items():
            start = clock()
            solve()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(of_way[1:]) for name, of_way in times.items()}


def main() -> None:
    """Print a table, a line for each matrix and number of eigenpairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a run of two small matrices")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = 1 if options.quick else options.runs
    print(f"Medians of {runs} on {options.device}, milliseconds; torch {torch.__version__}\n")
    print("| side | k | eigh | subset | rule | function | rule × | function × |")
    print("|---|---|---|---|---|---|---|---|")
    for side in QUICK_SIDES if options.quick else options.sides:
        K = gram(side, options.device)
        for k in COUNTS:
            if k > side:
                continue
            times = medians(solvers(K, k), runs, options.device)
            cells = [
                f"{1e3 * times[name]:.2f}" if name in times else "–"
                for name in ("eigh", "subset", "rule", "function")
            ]
            ratios = [f"{times[name] / times['eigh']:.2f}" for name in ("rule", "function")]
            print("|", " | ".join([str(side), str(k), *cells, *ratios]), "|", flush=True)


if __name__ == "__main__":
    main()
