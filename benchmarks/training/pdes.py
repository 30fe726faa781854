"""Differential equations with known solutions, and nets that solve them: residuals of one batch.

A solution is sought as u(x) = fixed(x) + factor(x) net(x), where factor is zero on the boundary and
fixed has the boundary's values: no weights between equation and boundary. The net's derivatives
are carried forward through its layers, next to its values; that is the same function as with
``vmap`` and ``grad``, and seven times faster for a first-order method, twice for ours.

A residual is divided by the size of the equation's right-hand side, so that it starts near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]


class Jet(NamedTuple):
    """A function's value [N], and along each axis its first and second derivative [N, axes]."""

    value: Tensor
    first: Tensor
    second: Tensor

    def times(self, other: Jet) -> Jet:
        """Return the product, by Leibniz's rule."""
        f, g = self.value[:, None], other.value[:, None]
        return Jet(
            self.value * other.value,
            self.first * g + f * other.first,
            self.second * g + 2 * self.first * other.first + f * other.second,
        )

    def plus(self, other: Jet) -> Jet:
        """Return the sum."""
        return Jet(*(a + b for a, b in zip(self, other, strict=True)))


def _layers(params: Params) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield the weight and bias of every layer, and whether a tanh follows it."""
    names = [name.removesuffix(".weight") for name in params if name.endswith(".weight")]
    for name in names:
        yield params[f"{name}.weight"], params[f"{name}.bias"], name != names[-1]


def net_jet(params: Params, X: Tensor) -> Jet:
    """Return a tanh net's value and derivatives; ``params`` are those of `nets.mlp`."""
    n, axes = X.shape
    a = X
    first = torch.eye(axes, dtype=X.dtype, device=X.device).expand(n, axes, axes)
    second = torch.zeros_like(first)
    for W, bias, bent in _layers(params):
        # The layer, then the chain rule of its tanh: σ' = 1 − σ², σ'' = −2σσ'.
        a = a @ W.T + bias
        first, second = (torch.cat([first, second], 1) @ W.T).split(axes, 1)
        if bent:
            a = a.tanh()
            slope = (1 - a * a)[:, None]
            second = slope * (second - 2 * a[:, None] * first * first)
            first = slope * first
    return Jet(a[:, 0], first[..., 0], second[..., 0])


def net_laplacian(params: Params, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tanh net's value [N] and Laplacian [N]: one row of second derivatives for all."""
    n, axes = X.shape
    a = X
    first = torch.eye(axes, dtype=X.dtype, device=X.device).expand(n, axes, axes)
    second = torch.zeros_like(first[:, :1])
    for W, bias, bent in _layers(params):
        # As in `net_jet`, the second derivatives summed over the axes.
        a = a @ W.T + bias
        first, second = (torch.cat([first, second], 1) @ W.T).split([axes, 1], 1)
        if bent:
            a = a.tanh()
            slope = (1 - a * a)[:, None]
            second = slope * (second - 2 * a[:, None] * (first * first).sum(1, keepdim=True))
            first = slope * first
    return a[:, 0], second[:, 0, 0]


def sines(x: Tensor, terms: tuple[tuple[float, int], ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ c sin(kπx) over the terms (c, k), and its two derivatives."""
    value = torch.stack([c * torch.sin(k * pi * x) for c, k in terms]).sum(0)
    first = torch.stack([c * k * pi * torch.cos(k * pi * x) for c, k in terms]).sum(0)
    second = torch.stack([-c * (k * pi) ** 2 * torch.sin(k * pi * x) for c, k in terms]).sum(0)
    return value, first, second


class Equation(NamedTuple):
    """An equation on the unit interval or square.

    ``residual`` takes the points and a jet of u there and is 0 for the solution; ``factor`` and
    ``fixed`` make the ansatz; ``exact`` is the solution.
    """

    axes: int
    residual: Callable[[Tensor, Jet], Tensor]
    factor: Callable[[Tensor], Jet]
    fixed: Callable[[Tensor], Jet] | None
    exact: Callable[[Tensor], Tensor]

    def ansatz(self, params: Params, X: Tensor) -> Jet:
        """Return u with its derivatives."""
        u = self.factor(X).times(net_jet(params, X))
        return u if self.fixed is None else u.plus(self.fixed(X))

    def model_fn(self, params: Params, X: Tensor) -> Tensor:
        """Return the residual at every point [N]."""
        return self.residual(X, self.ansatz(params, X))


def edges(X: Tensor) -> Jet:
    """Return Π x(1 − x), zero on all sides."""
    parts = X * (1 - X)
    remaining = torch.stack(
        [parts[:, [j for j in range(X.shape[1]) if j != i]].prod(1) for i in range(X.shape[1])], 1
    )
    return Jet(parts.prod(1), (1 - 2 * X) * remaining, -2 * remaining)


WAVES = ((1.0, 1), (0.5, 2), (0.25, 4))
HEAT, KAPPA = ((1.0, 1), (0.5, 3)), 0.1


def _poisson_1d(X: Tensor, u: Jet) -> Tensor:
    """Return (u'' + f) / ‖f‖ with −f the second derivative of the sum of waves."""
    scale = sum((c * (k * pi) ** 2) ** 2 / 2 for c, k in WAVES) ** 0.5
    return (u.second[:, 0] - sines(X[:, 0], WAVES)[2]) / scale


def _poisson_2d(X: Tensor, u: Jet) -> Tensor:
    """Return (Δu + 2π² sin(πx) sin(πy)) / π², π² the root mean square of the latter."""
    return u.second.sum(1) / pi**2 + 2 * torch.sin(pi * X).prod(1)


def _heat(X: Tensor, u: Jet) -> Tensor:
    """Return u_t − κ u_xx over κ times the size of u_xx at the start; axes are (x, t)."""
    scale = KAPPA * sum((c * (k * pi) ** 2) ** 2 / 2 for c, k in HEAT) ** 0.5
    return (u.first[:, 1] - KAPPA * u.second[:, 0]) / scale


def _heat_factor(X: Tensor) -> Jet:
    """Return t x(1 − x): zero at both ends and at the start."""
    x, t = X.unbind(1)
    first = torch.stack([(1 - 2 * x) * t, x * (1 - x)], 1)
    return Jet(x * (1 - x) * t, first, torch.stack([-2 * t, torch.zeros_like(t)], 1))


def _heat_start(X: Tensor) -> Jet:
    """Return the temperature at the start, the same for all times."""
    u, first, second = sines(X[:, 0], HEAT)
    zero = torch.zeros_like(u)
    return Jet(u, torch.stack([first, zero], 1), torch.stack([second, zero], 1))


def _heat_exact(X: Tensor) -> Tensor:
    x, t = X.unbind(1)
    parts = [c * torch.exp(-KAPPA * (k * pi) ** 2 * t) * torch.sin(k * pi * x) for c, k in HEAT]
    return torch.stack(parts).sum(0)


EQUATIONS = {
    "poisson-1d": Equation(1, _poisson_1d, edges, None, lambda X: sines(X[:, 0], WAVES)[0]),
    "poisson-2d": Equation(2, _poisson_2d, edges, None, lambda X: torch.sin(pi * X).prod(1)),
    "heat": Equation(2, _heat, _heat_factor, _heat_start, _heat_exact),
}


def fine_grid(axes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the points at which the error is measured: 1001 on a line, 65² on a square."""
    line = torch.linspace(0, 1, 1001 if axes == 1 else 65, dtype=dtype)
    return torch.cartesian_prod(*[line] * axes).view(-1, axes)
