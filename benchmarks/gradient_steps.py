"""Steps and updates from one Monte-Carlo column, beside a gradient step of the same batch.

Run with ``python -m benchmarks.gradient_steps``: CPU time on one thread, all methods taking turns,
so that a busy machine is slow for all of them alike. A round is a whole period of `held_out`: as
many updates as there are from one choice of the damping to the next, in a run that goes on, and as
many steps of every other method. Inputs are random, labels are those of a teacher, batches are
shuffled. A gradient step is forward, backward and `torch.optim.Adam`. Calls of torch, and how many
of them read a value on the host, are counted in one more step, and in an update with a choice.
With ``--compile`` Monte-Carlo steps under `torch.compile` as well, the first of which takes tens of
seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import nets
from benchmarks.step_tables import machine
from benchmarks.waits import READS
from ddnewton import (
    directional_newton,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    prepare,
)

SAMPLES, BATCHES = 128, 16
DAMPING = 0.1
GRADIENT_STEP = "gradient step, Adam"
"""The method in units of which times are given."""

COMPILED = "Monte-Carlo step, compiled"
"""The method that makes no calls of torch to be counted."""

Batch = tuple[Tensor, Tensor]
Method = Callable[[Batch], object]
"""Makes one step on a batch, from where the last one left the parameters."""


class Net(NamedTuple):
    """A net, and the shape of its inputs."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]


NETS = {
    "digits": Net(lambda: nets.mlp(64, 32, 10), (64,)),
    "mlp": Net(lambda: nets.mlp(784, 512, 256, 10), (784,)),
    "2c2d": Net(nets.net_2c2d, (1, 28, 28)),
    "3c3d": Net(nets.net_3c3d, (3, 32, 32)),
}


class Counts(TorchDispatchMode):
    """Counts calls of torch, and those that read a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call, and make it."""
        self.calls += 1
        self.reads += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], object]) -> Counts:
    """Return the counts of what a function does."""
    with Counts() as counts:
        run()
    return counts


def batches_of(net: Net, samples: int) -> Iterator[Batch]:
    """Yield the batches of a data set, shuffled in every epoch, labelled by a net of its kind."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(BATCHES * samples, *net.inputs, generator=generator)
    with torch.no_grad():
        outputs = net.make()(X)
    y = ((outputs - outputs.mean(0)) / outputs.std(0)).argmax(1)
    while True:
        for part in torch.randperm(len(X), generator=generator).split(samples):
            yield X[part], y[part]


def adam(module: nn.Module) -> Method:
    """Return a step of Adam."""
    optimizer = torch.optim.Adam(module.parameters())

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def monte_carlo_step(model_fn: Any, params: dict[str, Tensor]) -> Method:
    """Return a step of one Monte-Carlo column from where the parameters are."""
    criterion = drawn_criterion()
    return lambda batch: newton_step(
        model_fn, params, *batch, criterion, DAMPING, complement=DAMPING
    )


def compiled(method: Method) -> Method:
    """Return a method under `torch.compile`, without guards on what the program never replaces."""
    guards = {"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe}
    function: Method = torch.compile(method, options=guards)
    return function


def updates(model_fn: Any, params: dict[str, Tensor], criterion: Any, **options: Any) -> Method:
    """Return the updates of a run."""
    optimizer = directional_newton(model_fn, criterion, **options)
    state = optimizer.init(params)

    def update(batch: Batch) -> object:
        nonlocal params, state
        params, state, info = optimizer.update(params, state, *batch)
        return info

    return update


def drawn_criterion() -> Any:
    """Return cross-entropy with the curvature of one drawn label a sample."""
    return monte_carlo(nn.CrossEntropyLoss(), 1, torch.Generator().manual_seed(0))


def methods_of(net: Net, samples: int, *, exact: bool, compiles: bool) -> dict[str, Method]:
    """Return what is measured on a net, each from parameters of its own; ``exact`` updates too."""
    torch.manual_seed(0)
    module = net.make()
    params = {name: p.detach().clone() for name, p in module.named_parameters()}

    def call(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(module, params, (X,))

    prepared = prepare(call, params, torch.zeros(samples, *net.inputs))
    by_draws = {"damping": held_out(), "complement": "damping"}
    methods = {
        GRADIENT_STEP: adam(net.make()),
        "Monte-Carlo step": monte_carlo_step(prepared, params),
        "held-out Monte-Carlo update": updates(prepared, params, drawn_criterion(), **by_draws),
    }
    if compiles:
        methods[COMPILED] = compiled(monte_carlo_step(prepared, params))
    if exact:
        options = {"damping": levenberg_marquardt()}
        methods["Levenberg-Marquardt update"] = updates(
            prepared, params, nn.CrossEntropyLoss(), **options
        )
    return methods


def measured(net: Net, samples: int, rounds: int, **which: bool) -> list[list[object]]:
    """Return a row a method: its time, that in gradient steps, and its counts."""
    torch.manual_seed(1)
    batches, period = batches_of(net, samples), held_out().choice.every
    methods = methods_of(net, samples, **which)
    # The first step of each; the counts of the next, of updates without a choice.
    first, counts = {}, {}
    for name, method in methods.items():
        first[name] = seconds(method, [next(batches)])
        if name != COMPILED:
            counts[name] = counted(lambda method=method: method(next(batches)))
        for _ in range(period - (name in counts) - 1):
            method(next(batches))
    # All methods in turns, a period each.
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        period_batches = [next(batches) for _ in range(period)]
        for name, method in methods.items():
            times[name].append(seconds(method, period_batches) / period)
    chosen = {
        name: counted(lambda method=method: method(next(batches)))
        for name, method in methods.items()
        if name in counts
    }
    unit = statistics.median(times[GRADIENT_STEP])
    rows = []
    for name in methods:
        ratios = [own / base for own, base in zip(times[name], times[GRADIENT_STEP], strict=True)]
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(times[name]):.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{first[name] / unit:.0f}",
                *(of_both(counts[name], chosen[name]) if name in counts else "––"),
            ]
        )
    return rows


def seconds(method: Method, batches: list[Batch]) -> float:
    """Return the CPU time of the steps on some batches."""
    start = time.process_time()
    for batch in batches:
        method(batch)
    return time.process_time() - start


def of_both(counts: Counts, chosen: Counts) -> tuple[str, str]:
    """Return calls and reads, behind a comma those of an update with a choice if they differ."""
    pairs = (counts.calls, chosen.calls), (counts.reads, chosen.reads)
    calls, reads = (f"{x}" if x == y else f"{x}, {y}" for x, y in pairs)
    return calls, reads


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="how many periods of each method")
    parser.add_argument("--exact", action="store_true", help="Levenberg-Marquardt updates as well")
    parser.add_argument("--compile", action="store_true", help="compiled Monte-Carlo steps as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine("cpu", 1)
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    print(f"N = {options.samples}, medians of {options.rounds} rounds, CPU time\n")
    print("| net | method | ms | gradient steps | the first | calls | reads |")
    print("|---|---|---|---|---|---|---|")
    which = {"exact": options.exact, "compiles": options.compile}
    for name in options.net:
        rows = measured(NETS[name], options.samples, options.rounds, **which)
        for row in rows:
            print("| " + " | ".join([name, *map(str, row)]) + " |", flush=True)


if __name__ == "__main__":
    main()
