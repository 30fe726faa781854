"""The truth of a large problem in float64: products, solutions and residuals, by torch.func alone.

Nothing here is of ddnewton's own: products push forward by `torch.func.jvp`, and where parameters
are few the matrix is formed from the Jacobians of the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.large_recipes import Instance

FEW_PARAMETERS = 3000
"""Up to how many the matrix is formed."""

SAMPLES_AT_ONCE = 500
"""Of the Jacobians that the matrix is formed of."""

ACCURACY, MOST_PRODUCTS = 1e-7, 3000
"""The relative residual of a solution, and after how many products it is taken as it is."""

KRYLOV = 30
"""How many products the largest eigenvalue is estimated by."""


class Reference(NamedTuple):
    """The gradient, the product with the Gauss-Newton matrix, and its largest eigenvalue."""

    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    largest: float

    def solution(self, delta: float) -> Tensor:
        """Return the step −(G + δI)⁻¹g, by conjugate gradients."""
        s, r = torch.zeros_like(self.gradient), -self.gradient
        p, size = r, r @ r
        for _ in range(MOST_PRODUCTS):
            image = self.product(p) + delta * p
            alpha = size / (p @ image)
            s, r = s + alpha * p, r - alpha * image
            size, before = r @ r, size
            if size <= ACCURACY**2 * (self.gradient @ self.gradient):
                break
            p = r + size / before * p
        return s

    def lost(self, step: Tensor, exact: Tensor, delta: float) -> float:
        """Return the share of the decrease that a step gives away, ‖s − s*‖²_A / ‖s*‖²_A."""
        gap = step.double() - exact
        away = gap @ (self.product(gap) + delta * gap)
        return float(away / -(self.gradient @ exact))

    def residual(self, evals: Tensor, vectors: Tensor) -> float:
        """Return the largest ‖G u − λu‖ of eigenpairs, relative to the largest eigenvalue."""
        sizes = [
            (self.product(u) - value * u).norm() / u.norm()
            for value, u in zip(evals.double(), vectors.double(), strict=True)
        ]
        return float(torch.stack(sizes).max()) / self.largest


def reference(instance: Instance) -> Reference:
    """Return the truth of a problem that is in float64."""
    _, params, X, y, criterion = instance.problem
    shapes = {name: p.shape for name, p in params.items()}
    point = torch.cat([p.reshape(-1) for p in params.values()])

    def outputs(v: Tensor, X: Tensor) -> Tensor:
        parts = v.split([shape.numel() for shape in shapes.values()])
        leaves = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return functional_call(instance.module, leaves, (X,))

    with sdpa_kernel(SDPBackend.MATH):
        if len(point) <= FEW_PARAMETERS:
            gradient, G = formed(outputs, point, X, lambda f, y: criterion(f[None], y[None]), y)
            return Reference(gradient, lambda v: G @ v, largest_eigenvalue(G.__matmul__, point))
        values, pull = vjp(lambda v: outputs(v, X), point)
    slope = jacrev(lambda f: criterion(f, y))

    def product(v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            _, pushed = jvp(lambda v: outputs(v, X), (point,), (v,))
        return pull(jvp(slope, (values,), (pushed,))[1])[0]

    return Reference(pull(slope(values))[0], product, largest_eigenvalue(product, point))


def formed(
    outputs: Callable[[Tensor, Tensor], Tensor],
    point: Tensor,
    X: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient and the matrix from Jacobians, some samples at a time."""
    gradient, G = torch.zeros_like(point), point.new_zeros(len(point), len(point))

    def of_sample(x: Tensor) -> tuple[Tensor, Tensor]:
        f = outputs(point, x[None])[0].reshape(-1)
        return jacrev(lambda v: outputs(v, x[None])[0].reshape(-1))(point), f

    def slope(f: Tensor, y: Tensor) -> Tensor:
        return jacrev(lambda f: loss(f if f.numel() > 1 else f[0], y))(f)

    for part in torch.arange(len(X)).split(SAMPLES_AT_ONCE):
        J, f = vmap(of_sample)(X[part])
        z, H = vmap(slope)(f, y[part]), vmap(jacrev(slope))(f, y[part])
        gradient += torch.einsum("nc,ncd->d", z, J) / len(X)
        G += J.flatten(0, 1).T @ torch.einsum("nce,ned->ncd", H, J).flatten(0, 1) / len(X)
    return gradient, G


def largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Return the largest eigenvalue as a Krylov space has it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    vectors, images = [q / q.norm()], []
    for _ in range(KRYLOV):
        images.append(product(vectors[-1]))
        q, Q = images[-1], torch.stack(vectors)
        for _ in range(2):
            q = q - Q.T @ (Q @ q)
        vectors.append(q / q.norm())
    T = torch.stack(vectors[:-1]) @ torch.stack(images).T
    return float(torch.linalg.eigvalsh(T)[-1])
