"""What `torch.compile` makes of steps and updates, by inductor.

Run with ``python -m benchmarks.compiled_steps``: medians of CPU time on one thread, all rows of a
problem taking turns, and the seconds of the first call, most of them a C++ compiler's; a second
process finds what it needs in torch's cache. ViViT and netket are measured where they are
installed. The problems:

- reference: the example of ViViT, 4 samples in float32, a step along four directions.
- tiny: a net 9-8-5 of 89 parameters on 6 samples, all directions.
- digits: a net 64-32-10 on 128 samples in float32, all directions.
- Levenberg-Marquardt: updates of both nets, one after the other.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from benchmarks import nets, peers, recipes
from benchmarks.problem import Problem
from benchmarks.recipes import Case
from ddnewton import directional_newton, levenberg_marquardt, newton_step, prepare, top_k

Call = Callable[[], object]

WARM_UP = 3
EAGER, COMPILED = "ddnewton, prepared", "ddnewton, compiled"
PEERS = {"vmap(jacrev)": ("torch", "jacrev"), "ViViT": ("vivit", "vivit")}
PEERS |= {"netket": ("netket", "netket")}
"""The module that a peer needs, and its name in `benchmarks.peers`."""


def of_digits() -> Problem:
    """Return a net for digits of 8 × 8 pixels, on samples of random numbers."""
    torch.manual_seed(0)
    net, X, y = nets.mlp(64, 32, 10), torch.rand(128, 64), torch.randint(10, (128,))
    params = {name: p.detach() for name, p in net.named_parameters()}
    return Problem(lambda p, x: functional_call(net, p, (x,)), params, X, y, nn.CrossEntropyLoss())


def with_layers(problem: Problem) -> Problem:
    """Return a problem with its model prepared."""
    return problem._replace(model_fn=prepare(problem.model_fn, problem.params, problem.X))


def stepping(problem: Problem, damping: float, *, compiled: bool, **options: Any) -> Call:
    """Return a step on a prepared model, as it comes or compiled."""
    model_fn, params, X, y, criterion = with_layers(problem)

    def step(params: Any, X: Any, y: Any) -> Any:
        return newton_step(model_fn, params, X, y, criterion, damping, **options)

    run = torch.compile(step, fullgraph=True) if compiled else step
    return lambda: run(params, X, y)


def updating(problem: Problem, *, compiled: bool) -> Call:
    """Return updates of Levenberg-Marquardt, each from where the last one led."""
    model_fn, params, X, y, criterion = with_layers(problem)
    optimizer = directional_newton(model_fn, criterion, levenberg_marquardt())
    state = optimizer.init(params)
    update = torch.compile(optimizer.update) if compiled else optimizer.update

    def updated() -> object:
        nonlocal params, state
        params, state, info = update(params, state, X, y)
        return info

    return updated


def reference() -> dict[str, Call]:
    """Return the rows of the reference example."""
    case = recipes.build("reference")
    rows = {
        name: stepping(case.problem, case.damping, compiled=compiled, select=top_k(4))
        for name, compiled in ((EAGER, False), (COMPILED, True))
    }
    for name, (module, peer) in PEERS.items():
        if find_spec(module):
            rows[name] = peers.PEERS[peer].make(Case(*case), "top10")
    return rows


def steps(problem: Problem) -> dict[str, Call]:
    """Return the rows of steps along all directions."""
    return {
        EAGER: stepping(problem, 0.1, compiled=False),
        COMPILED: stepping(problem, 0.1, compiled=True),
    }


def updates(problem: Problem) -> dict[str, Call]:
    """Return the rows of updates of Levenberg-Marquardt."""
    return {EAGER: updating(problem, compiled=False), COMPILED: updating(problem, compiled=True)}


PROBLEMS: dict[str, Callable[[], dict[str, Call]]] = {
    "reference": reference,
    "tiny": lambda: steps(recipes.build("tiny-mlp").problem),
    "digits": lambda: steps(of_digits()),
    "tiny, Levenberg-Marquardt": lambda: updates(recipes.build("tiny-mlp").problem),
    "digits, Levenberg-Marquardt": lambda: updates(of_digits()),
}


def seconds(call: Call, clock: Callable[[], float]) -> float:
    """Return the time of a call by a clock."""
    start = clock()
    call()
    return clock() - start


def measured(rows: dict[str, Call], count: int) -> dict[str, tuple[float, float]]:
    """Return the seconds of every row's first call, and the median of those after it."""
    first = {name: seconds(call, time.perf_counter) for name, call in rows.items()}
    rounds = [
        {name: seconds(call, time.process_time) for name, call in rows.items()}
        for _ in range(count + WARM_UP)
    ]
    later = {name: statistics.median(r[name] for r in rounds[WARM_UP:]) for name in rows}
    return {name: (first[name], later[name]) for name in rows}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--calls", type=int, default=100, help="how many of each row")
    options = parser.parse_args()
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        parser.error("inductor needs a C++ compiler; got none. Install g++.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"Medians of {options.calls}, CPU time on one thread; torch {torch.__version__}\n")
    print("| problem | | ms | first call, s |\n|---|---|---|---|")
    for problem in options.problem:
        torch.compiler.reset()
        for name, (first, later) in measured(PROBLEMS[problem](), options.calls).items():
            print(f"| {problem} | {name} | {1e3 * later:.2f} | {first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
