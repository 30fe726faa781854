"""Physics-informed nets as others published them, with soft boundaries: one mean square of rows.

A row of X is (point, term, factor): term 0 is the equation inside, the others are boundary,
initial or data terms, and the factor is √(weight N / N_term), so that the mean square of all rows
is the sum of the terms' weighted mean squares. Nets are tanh, with weights and biases drawn
from a normal distribution, unless it says otherwise.

ENGD's problems: Müller and Zeinhofer, *Achieving high accuracy with PINNs via energy natural
gradients*, ICML 2023, with their grids, weights and starts. Poisson's equation on new points:
Guzmán-Cordero et al., *Improving energy natural gradient descent through Woodbury, momentum, and
randomization*, 2025, arXiv 2505.12149: 150 points in ten dimensions, 3500 in five.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.training.pdes import Params, net_jet, net_laplacian

Points = tuple[Tensor, ...]
SIDE, FINER = 30, 47
"""Points along a side of the published grids, and of those that settings are chosen by."""


class SoftProblem(NamedTuple):
    """A problem whose terms stand side by side.

    ``weights`` are those of the terms; ``points`` has each term's: random ones are drawn by a
    generator, a grid has so many along a side. ``residual(params, x [N, axes], term [N])`` is the
    unweighted residual of every row, and ``error(params)`` what is reported. ``drawn``: the points
    are new in every step. ``unknowns``: constants trained beside the net, with their first guess.
    """

    widths: tuple[int, ...]
    weights: tuple[float, ...]
    points: Callable[[torch.Generator, int], Points]
    residual: Callable[[Params, Tensor, Tensor], Tensor]
    error: Callable[[Params], Tensor]
    drawn: bool = False
    unknowns: tuple[tuple[str, float], ...] = ()

    def batch(self, generator: torch.Generator, *, finer: bool = False) -> Tensor:
        """Return the rows X [N, axes + 2] of points that are drawn, or of a grid."""
        parts = self.points(generator, FINER if finer else SIDE)
        total = sum(map(len, parts))
        rows = []
        for term, (x, weight) in enumerate(zip(parts, self.weights, strict=True)):
            factor = math.sqrt(weight * total / len(x))
            about = torch.tensor([[float(term), factor]], dtype=x.dtype).expand(len(x), 2)
            rows.append(torch.cat([x, about], 1))
        return torch.cat(rows)

    def model_fn(self, params: Params, X: Tensor) -> Tensor:
        """Return the weighted residual of every row [N]."""
        return self.residual(params, X[:, :-2], X[:, -2]) * X[:, -1]

    def start(self, seed: int) -> Params:
        """Return the net's first parameters, and the unknowns at their first guess."""
        generator = torch.Generator().manual_seed(seed)
        params = {}
        for layer, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            for name, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
                if self.drawn:  # as torch.nn.Linear starts
                    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
                    draw = (2 * uniform - 1) / inputs**0.5
                else:
                    draw = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
                params[f"{layer}.{name}"] = draw
        unknowns = {name: torch.tensor(guess, dtype=torch.float64) for name, guess in self.unknowns}
        return params | unknowns


def _relative(exact: Callable[[Tensor], Tensor], grid: Tensor) -> Callable[[Params], Tensor]:
    """Return the relative L2 error of a net on a grid, as a function of its parameters."""
    u = exact(grid)
    return lambda params: (_net(params, grid) - u).norm() / u.norm()


def _net(params: Params, x: Tensor) -> Tensor:
    """Return the net's value [N]."""
    last = max(int(name.split(".")[0]) for name in params if name.endswith(".weight"))
    for layer in range(last + 1):
        x = x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"]
        x = x.tanh() if layer < last else x
    return x[:, 0]


def _inside(count: int) -> Tensor:
    """Return the inner points of a grid of the unit square."""
    line = torch.arange(1, count - 1, dtype=torch.float64) / (count - 1)
    return torch.cartesian_prod(line, line)


def _sides(count: int, *fixed: tuple[int, float]) -> Points:
    """Return grids of sides of the unit square, each of them x_axis = value, one corner on each."""
    t = torch.linspace(0, 1, count, dtype=torch.float64)[:-1]
    sides = []
    for axis, value in fixed:
        side = [t, t]
        side[axis] = torch.full_like(t, value)
        sides.append(torch.stack(side, 1))
    return tuple(sides)


def _square(count: int) -> Tensor:
    """Return a fine grid of the unit square, its edges included."""
    line = torch.linspace(0, 1, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def _uniform(count: int, axes: int, generator: torch.Generator) -> Tensor:
    """Draw points of the unit cube."""
    return torch.rand(count, axes, generator=generator, dtype=torch.float64)


def _cube_sides(count: int, axes: int, generator: torch.Generator) -> Tensor:
    """Draw points of the sides of the unit cube."""
    x = _uniform(count, axes, generator)
    axis = torch.randint(0, axes, (count,), generator=generator)
    x[torch.arange(count), axis] = torch.randint(0, 2, (count,), generator=generator).double()
    return x


def _poisson_2d() -> SoftProblem:
    """Δu = −2π² sin(πx) sin(πy), u = 0 on the edge: 28² + 116 points, the edge's weight 4."""

    def exact(x: Tensor) -> Tensor:
        return torch.sin(pi * x).prod(1)

    def residual(params: Params, x: Tensor, term: Tensor) -> Tensor:
        u, laplacian = net_laplacian(params, x)
        return torch.where(term == 0, laplacian + 2 * pi**2 * exact(x), u)

    edge = ((1, 0.0), (0, 1.0), (1, 1.0), (0, 0.0))
    return SoftProblem(
        widths=(2, 32, 1),
        weights=(1.0, 4.0),
        points=lambda _, count: (_inside(count), torch.cat(_sides(count, *edge))),
        residual=residual,
        error=_relative(exact, _square(101)),
    )


DIFFUSIVITY = 0.25


def _cooling(x: Tensor) -> Tensor:
    """Return exp(−κπ²t) sin(πx), axes (t, x)."""
    return torch.exp(-(pi**2) * DIFFUSIVITY * x[:, 0]) * torch.sin(pi * x[:, 1])


def _heat() -> SoftProblem:
    """u_t = u_xx / 4 with u = sin(πx) at the start and 0 at both ends: 28² + 3 · 29 points."""

    def residual(params: Params, x: Tensor, term: Tensor) -> Tensor:
        u, first, second = net_jet(params, x)
        aim = torch.where(term == 1, torch.sin(pi * x[:, 1]), 0.0)
        return torch.where(term == 0, first[:, 0] - DIFFUSIVITY * second[:, 1], u - aim)

    sides = ((0, 0.0), (1, 0.0), (1, 1.0))
    return SoftProblem(
        widths=(2, 64, 1),
        weights=(1.0, 1.0, 1.0, 1.0),
        points=lambda _, count: (_inside(count), *_sides(count, *sides)),
        residual=residual,
        error=_relative(_cooling, _square(101)),
    )


def _poisson_5d() -> SoftProblem:
    """Δu = −π² Σ sin(πx_i), u = Σ sin(πx_i) on the sides: 4000 + 500 points, drawn once."""

    def exact(x: Tensor) -> Tensor:
        return torch.sin(pi * x).sum(1)

    def residual(params: Params, x: Tensor, term: Tensor) -> Tensor:
        u, laplacian = net_laplacian(params, x)
        return torch.where(term == 0, laplacian + pi**2 * exact(x), u - exact(x))

    grid = _uniform(40000, 5, torch.Generator().manual_seed(7))
    return SoftProblem(
        widths=(5, 64, 1),
        weights=(0.5, 5.0),  # half a mean inside; half an integral over a surface of size 10
        points=lambda g, _: (_uniform(4000, 5, g), _cube_sides(500, 5, g)),
        residual=residual,
        error=_relative(exact, grid),
    )


def _drawn_poisson(
    widths: tuple[int, ...],
    counts: tuple[int, int],
    exact: Callable[[Tensor], Tensor],
    laplacian_of: Callable[[Tensor], Tensor],
) -> SoftProblem:
    """Poisson's equation, inside + side points new in every step; the absolute error."""
    axes = widths[0]

    def residual(params: Params, x: Tensor, term: Tensor) -> Tensor:
        u, laplacian = net_laplacian(params, x)
        return torch.where(term == 0, laplacian - laplacian_of(x), u - exact(x))

    grid = _uniform(5000, axes, torch.Generator().manual_seed(7))
    values = exact(grid)
    return SoftProblem(
        widths=widths,
        weights=(0.5, 0.5),
        points=lambda g, _: (_uniform(counts[0], axes, g), _cube_sides(counts[1], axes, g)),
        residual=residual,
        error=lambda params: (_net(params, grid) - values).square().mean().sqrt(),
        drawn=True,
    )


def _diffusivity() -> SoftProblem:
    """u_t = κ u_xx with κ unknown, its first guess 1: 28² points inside, 100 where u is known."""

    def residual(params: Params, x: Tensor, term: Tensor) -> Tensor:
        u, first, second = net_jet(params, x)
        inside = first[:, 0] - params["diffusivity"] * second[:, 1]
        return torch.where(term == 0, inside, u - _cooling(x))

    return SoftProblem(
        widths=(2, 64, 1),
        weights=(1.0, 1.0),
        points=lambda g, count: (_inside(count), _uniform(100, 2, g)),
        residual=residual,
        error=lambda params: (params["diffusivity"] / DIFFUSIVITY - 1).abs(),
        unknowns=(("diffusivity", 1.0),),
    )


SOFT_PROBLEMS: dict[str, Callable[[], SoftProblem]] = {
    "engd-poisson-2d": _poisson_2d,
    "engd-heat": _heat,
    "engd-poisson-5d": _poisson_5d,
    "poisson-10d": partial(  # Δu = 0, u = Σ x_{2i} x_{2i+1} on the sides
        _drawn_poisson,
        (10, 256, 256, 128, 128, 1),
        (100, 50),
        exact=lambda x: (x[:, ::2] * x[:, 1::2]).sum(1),
        laplacian_of=lambda x: torch.zeros_like(x[:, 0]),
    ),
    "poisson-5d": partial(  # Δu = −π² Σ cos(πx_i), u = Σ cos(πx_i) on the sides
        _drawn_poisson,
        (5, 64, 64, 48, 48, 1),
        (3000, 500),
        exact=lambda x: torch.cos(pi * x).sum(1),
        laplacian_of=lambda x: -(pi**2) * torch.cos(pi * x).sum(1),
    ),
    "diffusivity": _diffusivity,
}
