"""Fit NIST's regressions from both starts, by ours and by others: digits, updates and seconds.

Run with ``python -m benchmarks.nist.fits``. An update is a point that a method moves to and
differentiates at; those until six digits of every parameter are right are counted. Seconds are CPU
seconds of one thread, from the start to where the method ends by itself, torch's first calls not
counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from time import process_time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jacfwd

from benchmarks.nist.regressions import MODELS, Regression, digits, regression
from benchmarks.problem import Problem
from benchmarks.training.installed_packages import is_missing, start_torch_lm
from benchmarks.training.instances import Instance
from benchmarks.training.updates import Finished
from ddnewton import directional_newton, prepare

WANTED = 6.0
"""Digits of the worst parameter that make a fit right."""
MOST_UPDATES = 500
PATIENCE = 8
"""So many updates that lower the loss no further end a method that does not end by itself."""


class Fit(NamedTuple):
    """How a run ended: digits of the worst parameter, updates until six of them, CPU seconds."""

    digits: float
    updates: float
    seconds: float


def ours(fit: Regression, start: Tensor) -> Iterator[Tensor]:
    """Yield the iterates of the optimizer as shipped."""
    params = start
    optimizer = directional_newton(prepare(fit.model, params, fit.X), nn.MSELoss())
    state = optimizer.init(params)
    while True:
        params, state, _ = optimizer.update(params, state, fit.X, fit.y)
        yield params


def torch_lm(fit: Regression, start: Tensor, mode: str = "fletcher") -> Iterator[Tensor]:
    """Yield the iterates of torch-levenberg-marquardt, damped in units of the columns' sizes."""

    def model_fn(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return fit.model(params["b"], X)

    problem = Problem(model_fn, {"b": start}, fit.X, fit.y, nn.MSELoss())
    update = start_torch_lm(Instance(problem, None, dict), mode=mode)
    while True:
        try:
            params, _ = update(fit.X, fit.y, 0.0)
        except Finished:
            return
        yield params["b"].clone()


def until_at_rest(fit: Regression, iterates: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield iterates until the loss has stopped to fall, or for as long as they may go on."""
    lowest, idle = math.inf, 0
    for b in islice(iterates, MOST_UPDATES):
        yield b
        loss = float((fit.model(b, fit.X) - fit.y).square().sum())
        idle = 0 if loss < lowest * (1 - 1e-12) else idle + 1
        lowest = min(lowest, loss)
        if idle == PATIENCE:
            return


def scipy_least_squares(fit: Regression, start: Tensor, method: str) -> Iterator[Tensor]:
    """Yield the points at which SciPy's `least_squares` asks for the Jacobian."""
    from scipy.optimize import least_squares  # noqa: PLC0415  # no other method needs it

    points: list[Tensor] = []

    def model(b: Tensor) -> Tensor:
        return fit.model(b, fit.X)

    def residual(b: object) -> object:
        return (model(torch.as_tensor(b)) - fit.y).numpy()

    def jacobian(b: object) -> object:
        points.append(torch.tensor(b))
        return jacfwd(model)(points[-1]).numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # trial points may overflow
        answer = least_squares(
            residual,
            start.numpy(),
            jacobian,
            method=method,
            x_scale="jac",
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
            max_nfev=MOST_UPDATES * 10,
        )
    yield from points[1:]
    yield torch.tensor(answer.x)


METHODS_OF_FITS: dict[str, Callable[[Regression, Tensor], Iterator[Tensor]]] = {
    "SciPy trf": partial(scipy_least_squares, method="trf"),
    "MINPACK": partial(scipy_least_squares, method="lm"),
    "torch-LM": lambda fit, start: until_at_rest(fit, torch_lm(fit, start)),
    "ddnewton, as shipped": lambda fit, start: until_at_rest(fit, ours(fit, start)),
}


def followed(method: str, fit: Regression, start: Tensor) -> Fit:
    """Return how a method's run from one start ends."""
    began = process_time()
    try:
        iterates = list(METHODS_OF_FITS[method](fit, start))
    except (RuntimeError, ValueError, ArithmeticError):
        iterates = []
    seconds = process_time() - began
    reached = [digits(b, fit.certified) for b in iterates]
    updates = next((count for count, d in enumerate(reached, 1) if d >= WANTED), math.inf)
    return Fit(reached[-1] if reached else 0.0, updates, seconds)


def all_fits(methods: list[str], names: list[str]) -> dict[str, dict[str, Fit]]:
    """Return the runs of every method by data set and start: "Misra1a/2"."""
    fits: dict[str, dict[str, Fit]] = {}
    for method in methods:
        followed(method, regression("Misra1a"), regression("Misra1a").starts[0])  # first calls
        fits[method] = {}
        for name in names:
            fit = regression(name)
            for number, start in enumerate(fit.starts, 1):
                fits[method][f"{name}/{number}"] = followed(method, fit, start)
    return fits


def table_of_fits(fits: dict[str, dict[str, Fit]]) -> list[str]:
    """Return a markdown table of the methods, and one of every run."""
    heads = "| method | six digits | median updates | longest run, s | missed |"
    lines = [heads, "|---|---|---|---|---|"]
    for method, runs in fits.items():
        missed = [name for name, run in runs.items() if run.digits < WANTED]
        updates = statistics.median(run.updates for run in runs.values())
        slowest = max(run.seconds for run in runs.values())
        lines.append(
            f"| {method} | {len(runs) - len(missed)} of {len(runs)} | {updates:g} "
            f"| {slowest:.2g} | {', '.join(missed) or '–'} |"
        )
    lines += [f"{method}: not installed" for method in METHODS_OF_FITS if is_missing(method)]
    lines += ["", f"| run | {' | '.join(fits)} |", f"|{'---|' * (1 + len(fits))}"]
    for name in next(iter(fits.values()), {}):
        cells = [f"{runs[name].digits:.1f}, {runs[name].updates:g}" for runs in fits.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Fit what the command line asks for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", nargs="+", choices=METHODS_OF_FITS)
    parser.add_argument("--out", type=Path, help="a file for the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = options.method or [name for name in METHODS_OF_FITS if not is_missing(name)]
    lines = table_of_fits(all_fits(methods, options.data))
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
