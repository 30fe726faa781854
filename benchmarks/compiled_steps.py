"""What `torch.compile` makes of steps and updates, by inductor.

Run with ``python -m benchmarks.compiled_steps``: medians of CPU time on one thread, the rows of
a problem taking turns, and the seconds of the first call, most of them a C++ compiler's; a second
process finds what it needs in torch's cache. ViViT and netket are measured where they are
installed. The problems:

- reference: the example of ViViT, 4 samples in float32, a step along four directions.
- tiny: a net 9-8-5 of 89 parameters on 6 samples, all directions.
- digits: a net 64-32-10 on 128 samples in float32, all directions.
- Levenberg-Marquardt: the first update of both nets.
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
from ddnewton import directional_newton, levenberg_marquardt, newton_step, prepare, top_k

Call = Callable[[], object]

WARM_UP, TURN = 3, 10
EAGER, COMPILED = "ddnewton, prepared", "ddnewton, compiled"
UNGUARDED = "ddnewton, compiled, without guards on globals"
FEWER_GUARDS = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
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


def stepping(
    problem: Problem, damping: float, *, compiled: dict[str, Any] | None, **options: Any
) -> Call:
    """Return a step on a prepared model, as it comes or compiled with some options of torch's."""
    model_fn, params, X, y, criterion = with_layers(problem)

    def step(params: Any, X: Any, y: Any) -> Any:
        return newton_step(model_fn, params, X, y, criterion, damping, **options)

    run = step if compiled is None else torch.compile(step, fullgraph=True, options=compiled)
    return lambda: run(params, X, y)


def updating(problem: Problem, *, compiled: bool) -> Call:
    """Return an update of Levenberg-Marquardt, the first one of a fit, whose step is taken."""
    model_fn, params, X, y, criterion = with_layers(problem)
    optimizer = directional_newton(model_fn, criterion, levenberg_marquardt())
    state = optimizer.init(params)
    update = torch.compile(optimizer.update) if compiled else optimizer.update

    return lambda: update(params, state, X, y)


def reference() -> dict[str, Call]:
    """Return the rows of the reference example."""
    case = recipes.build("reference")
    rows = {
        name: stepping(case.problem, case.damping, compiled=compiled, select=top_k(4))
        for name, compiled in ((EAGER, None), (COMPILED, {}), (UNGUARDED, FEWER_GUARDS))
    }
    for name, (module, peer) in PEERS.items():
        if find_spec(module):  # on nets of their own: ViViT's hooks stay in its net
            rows[name] = peers.PEERS[peer].make(recipes.build("reference"), "top10")
    return rows


def steps(problem: Problem) -> dict[str, Call]:
    """Return the rows of steps along all directions."""
    return {
        EAGER: stepping(problem, 0.1, compiled=None),
        COMPILED: stepping(problem, 0.1, compiled={}),
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
    """Return the seconds of every row's first call, and the median of those after it.

    Rows take turns of several calls, as loops make them: what is between two calls of another row
    has left the processor's cache.
    """
    first = {name: seconds(call, time.perf_counter) for name, call in rows.items()}
    later: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(count):
        for name, call in rows.items():
            turn = [seconds(call, time.process_time) for _ in range(WARM_UP + TURN)]
            later[name] += turn[WARM_UP:]
    return {name: (first[name], statistics.median(later[name])) for name in rows}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--turns", type=int, default=10, help="how many of each row, of 10 calls")
    options = parser.parse_args()
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        parser.error("inductor needs a C++ compiler; got none. Install g++.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count = TURN * options.turns
    print(f"Medians of {count} calls, CPU time on one thread; torch {torch.__version__}\n")
    print("| problem | | ms | first call, s |\n|---|---|---|---|")
    for problem in options.problem:
        torch.compiler.reset()
        for name, (first, later) in measured(PROBLEMS[problem](), options.turns).items():
            print(f"| {problem} | {name} | {1e3 * later:.2f} | {first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
