"""Time and bytes of a step of several processes, on paper.

Letters: p ranks, N samples in all, M columns a sample, D parameters; a layer has a weight [O, K]
used at P positions. Of one sample all ranks but its own need the factors: K inputs and M·O pulled
back slopes at every position.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from benchmarks.floor import Layer, contraction
from benchmarks.shared_factorization import GIB, Speeds, factorization_seconds, panel_bytes
from ddnewton.columns.tiles import TILE_COLUMNS, TILES_A_SIDE
from ddnewton.quadratic.cholesky import SHARED_SIDE, SHARED_SIDE_ON_GPUS

PRODUCTS = 20
"""Of a step by products alone: what a δ of a hundredth of the largest eigenvalue takes."""


class Net(NamedTuple):
    """A net in numbers; ``entry`` is how many bytes one of its numbers has as it is evaluated."""

    layers: list[Layer]
    parameters: int
    outputs: int  # of a sample
    columns: int  # of a sample
    entry: int = 4


DATACENTRE = Speeds(
    flops=3e13,
    factorization=1e13,
    link=2.5e10,
    message=3e-5,
    memory=80 * GIB,
    shared_side=SHARED_SIDE_ON_GPUS,
)
"""A GPU whose products make 30 TFlop/s, and a factorization in float64 10; 25 GB/s a link."""


def factor_entries(net: Net) -> int:
    """Return the numbers of the factors of one sample."""
    return sum(
        layer.positions * (layer.inputs + net.columns * layer.outputs) for layer in net.layers
    )


def visit_flops(net: Net) -> float:
    """Return the flops of one sample: forward, and M columns pulled back to the layers."""
    products = sum(layer.outputs * layer.inputs * layer.positions for layer in net.layers)
    return 2.0 * products * (1 + net.columns)


def ring_copies(p: int) -> float:
    """Return how often the factors of all samples are passed on.

    Of p ranks each has half of the others as partners. Where p is even, two stand opposite: one
    passes all of its samples, the other half of them.
    """
    return (p - 1) / 2 + (1 / 4 if p % 2 == 0 else 0.0)


def own_share(n: float, M: int) -> float:
    """Return which share of the products of n samples with themselves is made, tile by tile."""
    size = max(TILE_COLUMNS, n * M / TILES_A_SIDE) // M
    whole, left = divmod(n, size)
    return (1 + whole * (size / n) ** 2 + (left / n) ** 2) / 2


def is_of_parameters(net: Net, N: int) -> bool:
    """Return whether the matrix is on the side of the parameters."""
    return N * net.columns > net.parameters


def bytes_of(net: Net, N: int, p: int, shared_side: int = SHARED_SIDE) -> dict[str, float]:
    """Return what all ranks send for a step with one δ, by what it is, as `ddnewton` logs it.

    What the leader tells counts once, however many ranks hear it.
    """
    NM, D, away = N * net.columns, net.parameters, (p - 1) / p
    sent = {
        "outputs": away * N * net.outputs * net.entry,
        "targets": away * N * 8,
        "bases": away * N * net.outputs * net.columns * 8,
        "results": D * 8,
    }
    sent |= panel_bytes(min(NM, D), p, shared_side)
    if is_of_parameters(net, N):
        sent |= {"orders": 2 * NM * 8, "matrices": (p - 1) * (D**2 + D + 1) * 8}
    else:
        # Every pair of ranks multiplies once, and each rank with itself.
        tiles = (NM / p) ** 2 * p * (own_share(N / p, net.columns) + (p - 1) / 2)
        sent |= {
            "columns": ring_copies(p) * N * factor_entries(net) * net.entry,
            "tiles": away * tiles * 8,
            "orders": NM * 8,
            "sums": (p - 1) * (D + 1) * 8,
        }
    return sent if p > 1 else {}


def seconds_of(net: Net, N: int, p: int, speeds: Speeds) -> dict[str, float]:
    """Return the time of a step with one δ by its parts, which follow each other.

    A sum over ranks, and what is told to all, pass every link once, as in a chain.
    """
    M, D = net.columns, net.parameters
    visit = N / p * visit_flops(net) / speeds.flops
    sent = bytes_of(net, N, p, speeds.shared_side)
    at_leader = sum(sent.get(kind, 0.0) for kind in ("outputs", "targets", "bases", "tiles"))
    told = (sent.get("results", 0.0) + sent.get("orders", 0.0)) / speeds.link
    summed = (p > 1) * 8 / speeds.link
    if is_of_parameters(net, N):
        return {
            "model": visit,
            "products": 2 * N * M / p * D**2 / 2 / speeds.flops,
            "to the leader": at_leader / speeds.link + summed * (D**2 + D),
            "factorization": factorization_seconds(D, p, speeds),
            "step": told,
            "messages": messages(p) * speeds.message,
        }
    # Half of all products, by symmetry, but for the tiles on the diagonal.
    half = sum(contraction(layer, N, M) for layer in net.layers)
    of_rank = (2 * own_share(N / p, M) + p - 1) / p**2
    return {
        "model": 2 * visit,  # for the columns, and once more for the step
        "products": of_rank * half / speeds.flops,
        "ring": sent.get("columns", 0.0) / p / speeds.link,
        "to the leader": at_leader / speeds.link,
        "factorization": factorization_seconds(N * M, p, speeds),
        "step": told + summed * D,
        "messages": messages(p) * speeds.message,
    }


def memory_of(net: Net, N: int) -> float:
    """Return the bytes of the matrix on the leader, and of what it makes of the outputs.

    Its panels are a copy of half of the matrix, divided by the ranks: of many, next to nothing.
    """
    of_outputs = N * net.outputs * (net.entry + 8 + 8 * net.columns)
    if is_of_parameters(net, N):
        return of_outputs + 16.0 * net.parameters**2
    return of_outputs + 9.0 * (N * net.columns) ** 2


def messages(p: int) -> int:
    """Return how many messages follow each other at the leader."""
    return 0 if p == 1 else 10 * 3 + 12 * (p - 1)


def free_seconds(net: Net, N: int, p: int, speeds: Speeds) -> float:
    """Return the time of a step by products alone: J v, Jᵀu, a vector told and a sum of vectors."""
    product = 2 * 3 * N / p * visit_flops(net._replace(columns=1)) / 2 / speeds.flops
    passed = 0.0 if p == 1 else 2 * net.parameters * 8 / speeds.link + 8 * speeds.message
    return PRODUCTS * (product + passed)


def dense(*widths: int) -> list[Layer]:
    """Return linear layers."""
    return [Layer(outputs, inputs, 1) for inputs, outputs in pairwise(widths)]


def resnet50() -> Net:
    """Return ResNet-50 on images of 224×224, with one drawn column a sample."""
    layers, inputs = [Layer(64, 3 * 49, 112**2)], 64
    for width, blocks, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        layers.append(Layer(4 * width, inputs, side**2))  # the shortcut
        for _ in range(blocks):
            layers += [Layer(width, inputs, side**2), Layer(width, 9 * width, side**2)]
            layers.append(Layer(4 * width, width, side**2))
            inputs = 4 * width
    return Net([*layers, Layer(1000, 2048, 1)], 25_557_032, 1000, 1)


def gpt2() -> Net:
    """Return GPT-2 of 124 million parameters, 1,024 tokens, with one drawn column a sequence."""
    width, tokens = 768, 1024
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    blocks = [Layer(outputs, inputs, tokens) for outputs, inputs in shapes] * 12
    return Net([*blocks, Layer(50_257, width, tokens)], 124_439_808, 50_257 * tokens, 1)


def convolutions() -> Net:
    """Return 3c3d, as `benchmarks.nets` has it."""
    layers = [Layer(64, 75, 28**2), Layer(96, 576, 12**2), Layer(128, 864, 6**2)]
    return Net([*layers, *dense(1152, 512, 256, 10)], 895_210, 10, 9)


NETS = {
    "MLP": (Net(dense(784, 512, 256, 10), 535_818, 10, 9), 64),
    "3c3d": (convolutions(), 64),
    "ResNet-50, one draw": (resnet50(), 64),
    "GPT-2, one draw a sequence": (gpt2(), 8),
}
"""Nets, and how many samples each GPU has of them."""

COUNTS = (8, 64, 256, 1024)
HEADINGS = (
    *("net", "GPUs", "NM", "the leader's memory", "work", "ring", "to the leader", "factorization"),
    *("all", "one GPU / all", "by products", "one GPU / by products"),
)


def paper(speeds: Speeds = DATACENTRE) -> list[str]:
    """Return the table of the model for many GPUs, each with as many samples as ever."""
    rates = f"{speeds.flops / 1e12:g} TFlop/s, {speeds.factorization / 1e12:g} in a factorization"
    links = f"a link {speeds.link / 1e9:g} GB/s; a message {1e6 * speeds.message:g} µs"
    lines = [f"A GPU: {rates}, {speeds.memory / GIB:g} GiB; {links}; by products {PRODUCTS}.", ""]
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for name, (net, share) in NETS.items():
        for p in COUNTS:
            N = share * p
            parts, one = seconds_of(net, N, p, speeds), seconds_of(net, N, 1, speeds)
            memory, total = memory_of(net, N), sum(parts.values())
            cells = [name, f"{p:,}", f"{N * net.columns:,}", f"{memory / GIB:.2g} GiB"]
            if memory <= speeds.memory:
                cells += [short(parts["model"] + parts["products"]), short(parts.get("ring", 0.0))]
                cells += [short(parts["to the leader"]), short(parts["factorization"])]
                cells += [short(total), digits(sum(one.values()) / total)]
            else:
                cells[-1] = f"{memory / GIB:,.0f} GiB: too much"
                cells += ["–"] * 6
            # By products there is no such matrix.
            free = free_seconds(net, N, p, speeds)
            cells += [short(free), digits(free_seconds(net, N, 1, speeds) / free)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def short(seconds: float) -> str:
    """Return a time in few characters."""
    if seconds < 1e-4:
        return "< 0.1 ms"
    return f"{digits(1000 * seconds)} ms" if seconds < 0.0995 else f"{digits(seconds)} s"


def digits(number: float) -> str:
    """Return a number with two digits, or those before the point."""
    return f"{number:.2g}" if number < 99.5 else f"{number:,.0f}"
