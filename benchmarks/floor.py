"""The least time an answer can take here: what must be done, at this machine's own speed.

Forward pass, pullback of M columns, eigensolver and the final pullback are measured, each in the
fastest of a few ways; the Gram matrix is counted, each layer in its cheapest order and only on
one side of the diagonal, and divided by the measured rate of a large matrix product.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from benchmarks.problem import Problem
from benchmarks.quantities import DIRECTIONS
from benchmarks.recipes import Case


class Layer(NamedTuple):
    """A weight [O, K] used at P positions of every sample."""

    outputs: int
    inputs: int
    positions: int


def contraction(layer: Layer, N: int, M: int) -> float:
    """Return the fewest flops for a layer's part of the Gram matrix, half of it by symmetry.

    Two flops a product, N²/2 pairs of samples; the Jacobian is formed first, or its positions are
    contracted first with one factor or with both.
    """
    O, K, P = layer  # noqa: E741 - the letters of the equations
    formed = N**2 * M**2 * O * K + (2 * N * M * O * K * P if P > 1 else 0)
    one = N**2 * (K * P**2 + M * O * P**2 + M**2 * O * P)
    both = N**2 * (K * P**2 + M**2 * O * P**2 + M**2 * P**2)
    return min(formed, one, both)


def flops(problem: Problem, layers: list[Layer], M: int) -> float:
    """Return the fewest flops for the Gram matrix, or for the other side where that is smaller."""
    N, D = len(problem.X), sum(p.numel() for p in problem.params.values())
    biases = D - sum(layer.outputs * layer.inputs for layer in layers)
    small = sum(contraction(layer, N, M) for layer in layers) + (N * M) ** 2 * biases
    return min(small, N * M * D**2)


def fastest(function: Callable[[], object], runs: int = 3) -> float:
    """Return the least of some times in seconds, after a first one."""
    clock = on_device if torch.cuda.is_available() else on_host
    times = []
    for _ in range(runs + 1):
        times.append(clock(function))
        if times[0] > 10:
            return times[0]
    return min(times[1:])


def on_host(function: Callable[[], object]) -> float:
    """Return the seconds of a run by the host's clock."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def on_device(function: Callable[[], object]) -> float:
    """Return the seconds between two events on the device, which waits for the host in between."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def rate(like: Tensor, size: int | None = None) -> float:
    """Return the flops a second of a large matrix product."""
    size = size or (8192 if like.is_cuda else 2048)
    A = torch.randn(size, size, dtype=like.dtype, device=like.device)
    return 2 * size**3 / fastest(lambda: A @ A, 5)


def visited(net: nn.Module, X: Tensor) -> tuple[Tensor, list[Tensor], list[Layer]]:
    """Return the outputs of a net, those of its layers with parameters, and its matrices."""
    outputs: list[Tensor] = []
    layers: list[Layer] = []

    def record(module: nn.Module, _: object, output: Tensor) -> None:
        outputs.append(output if output.requires_grad else output.requires_grad_())
        if isinstance(module, nn.Linear | nn.Conv2d):
            O = module.weight.shape[0]  # noqa: E741 - as above
            layers.append(Layer(O, module.weight[0].numel(), output[0].numel() // O))

    # One pass with a hook on every module that has parameters of its own.
    hooks = [
        module.register_forward_hook(record)
        for module in net.modules()
        if not list(module.children()) and list(module.parameters())
    ]
    values = net(X)
    for hook in hooks:
        hook.remove()
    return values, outputs, layers


def pullback(case: Case, M: int) -> tuple[float, list[Layer]]:
    """Return the seconds of one forward pass and a pullback of M columns, and the matrices."""
    net, problem = case.module, case.problem
    X = problem.X
    if net is None:  # derivatives inside: the rows of the Jacobian are what a pullback gives
        row = vmap(jacrev(lambda params, x: problem.model_fn(params, x[None])[0]), (None, 0))
        return fastest(lambda: row(problem.params, X)), []
    net.requires_grad_(requires_grad=False)
    values, outputs, layers = visited(net, X)
    columns = torch.randn(M, *values.shape, dtype=values.dtype, device=values.device)
    held = sum(output.numel() for output in outputs) * values.element_size()

    def pulled(chunk: int) -> None:
        values, outputs, _ = visited(net, X)
        for part in columns.split(chunk):
            batched = chunk > 1
            torch.autograd.grad(
                values,
                outputs,
                part if batched else part[0],
                retain_graph=True,
                is_grads_batched=batched,
            )

    chunks = [chunk for chunk in sorted({1, min(M, 8), M}) if chunk == 1 or chunk * held < 2**30]
    return min(fastest(lambda chunk=chunk: pulled(chunk), 2) for chunk in chunks), layers


def last_pullback(problem: Problem) -> float:
    """Return the seconds of a weighted sum of outputs, forward and back to the parameters."""
    params = {name: p.clone().requires_grad_() for name, p in problem.params.items()}

    def pulled() -> None:
        values = problem.model_fn(params, problem.X)
        torch.autograd.grad(values.sum(), list(params.values()))

    return fastest(pulled)


def solver(size: int, quantity: str, device: torch.device) -> float:
    """Return the seconds to solve with a float64 Gram matrix, in the fastest way there is."""
    A = torch.randn(size, size, dtype=torch.float64, device=device)
    gram = A @ A.T / size + torch.eye(size, dtype=torch.float64, device=device)
    if quantity == "eigenvalues":
        return fastest(lambda: torch.linalg.eigvalsh(gram))
    if quantity == "all":
        return fastest(lambda: torch.cholesky_solve(A[:, :1], torch.linalg.cholesky(gram)))
    # The leading eigenpairs, or all of them.
    ways = [fastest(lambda: torch.linalg.eigh(gram))]
    if importlib.util.find_spec("scipy") is not None:
        from scipy.linalg import eigh  # noqa: PLC0415 - where it is installed

        leading = [max(size - DIRECTIONS, 0), size - 1]
        ways.append(fastest(lambda: eigh(gram.cpu().numpy(), subset_by_index=leading)))
    return min(ways)


def floor(
    case: Case, quantities: tuple[str, ...], measured_rate: float | None = None
) -> dict[str, dict[str, float]]:
    """Return the seconds of every part, for each quantity; the rate is measured unless given."""
    # How many outputs C, columns M a sample and parameters D there are.
    problem = case.problem
    with torch.no_grad():
        C = problem.model_fn(problem.params, problem.X[:1]).numel()
    M = C - 1 if isinstance(problem.criterion, nn.CrossEntropyLoss) else C
    D = sum(p.numel() for p in problem.params.values())
    # What is measured and counted once, then the solver of each quantity.
    forth_and_back, layers = pullback(case, M)
    like = next(iter(problem.params.values()))
    parts = {
        "forward and pullback": forth_and_back,
        "contraction": flops(problem, layers, M) / (measured_rate or rate(like)),
    }
    size = min(len(problem.X) * M, D)
    last = last_pullback(problem)
    return {
        quantity: parts
        | {"solver": solver(size, quantity, like.device)}
        | {"last pullback": 0.0 if quantity == "eigenvalues" else last}
        for quantity in quantities
    }
