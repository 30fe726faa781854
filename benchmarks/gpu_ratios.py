"""Steps of one Monte-Carlo column on a GPU, in gradient steps: forward, backward, Adam."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.gpu_process import Job, Measurement, seconds_of
from benchmarks.gradient_steps import DAMPING, GRADIENT_STEP, NETS, SAMPLES
from ddnewton import directional_newton, held_out, monte_carlo, newton_step, prepare

ROUNDS, QUICK_ROUNDS = 30, 1


def functions_of(
    net: nn.Module, X: Tensor, y: Tensor, *, on_gpu: bool
) -> dict[str, Callable[[], object]]:
    """Return what is timed, each from where its last run left the parameters."""
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    prepared = prepare(lambda p, X: functional_call(net, p, (X,)), params, X)
    drawn = monte_carlo(nn.CrossEntropyLoss(), 1, torch.Generator().manual_seed(0))
    optimizer = directional_newton(prepared, drawn, held_out(), complement="damping")
    run = {"params": params, "state": optimizer.init(params)}
    adam = torch.optim.Adam(net.parameters(), fused=on_gpu)

    def gradient_step() -> None:
        adam.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        adam.step()

    def step() -> object:
        return newton_step(prepared, params, X, y, drawn, DAMPING, complement=DAMPING)

    def update() -> None:
        run["params"], run["state"], _ = optimizer.update(run["params"], run["state"], X, y)

    return {
        GRADIENT_STEP: gradient_step,
        "Monte-Carlo step": step,
        "held-out Monte-Carlo update": update,
    }


def compared(job: Job, name: str, share: float) -> dict[str, Any]:
    """Return the median seconds in a share of the time, and of ratios to the gradient step."""
    until = job.left() * (1 - share)
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make().to(job.device)
    X, y = torch.randn(SAMPLES, *shape), torch.randint(10, (SAMPLES,))
    X, y = X.to(job.device), y.to(job.device)
    functions = functions_of(net, X, y, on_gpu=job.device == "cuda")
    times: dict[str, list[float]] = {words: [] for words in functions}
    # A choice of the damping comes every so many updates: a round has one whole period.
    period = held_out().choice.every
    for round_number in range(1 + (QUICK_ROUNDS if job.quick else ROUNDS)):
        for words, function in functions.items():
            seconds = seconds_of(lambda function=function: several(function, period), job.device)
            if round_number > 0:  # the first has what is done once
                times[words].append(seconds / period)
        if job.left() < until and round_number > 0:
            break
    ratios = {
        words: statistics.median(
            own / base for own, base in zip(times[words], times[GRADIENT_STEP], strict=True)
        )
        for words in functions
    }
    seconds_of_all = {words: statistics.median(values) for words, values in times.items()}
    return {"seconds": seconds_of_all, "ratios": ratios, "rounds": len(times[GRADIENT_STEP])}


def several(function: Callable[[], object], count: int) -> None:
    """Run a function so many times."""
    for _ in range(count):
        function()


def measurements(job: Job) -> Iterator[Measurement]:
    """Yield the nets."""
    names = list(NETS)[:1] if job.quick else list(NETS)
    for number, name in enumerate(names):
        share = 1 / (len(names) - number)
        yield {"net": name, "samples": SAMPLES}, partial(compared, job, name, share)
