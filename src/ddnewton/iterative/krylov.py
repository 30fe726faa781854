r"""One Krylov space for all dampings: (G + δI)⁻¹ b for any δ, from the products made for one.

With Lanczos's vectors Q of b, G Q = Q T + β q eᵀ, the iterate of conjugate gradients for any δ is

    x(δ) = ‖b‖ Q (T + δI)⁻¹ e₁,        ‖x(δ)‖ = ‖b‖ ‖(T + δI)⁻¹ e₁‖,

so that a step for another δ, or the δ of a length, takes no further product while x(δ) is accurate
enough (Gould, Lucidi, Roma, Toint, "Solving the trust-region subproblem using the Lanczos method",
1999). What x(δ) gives away is bounded as for conjugate gradients, by Gauss-Radau quadrature:
bᵀ(G + δI)⁻¹b lies between ‖b‖² e₁ᵀ(T + δI)⁻¹e₁ and the same of T with one row more, for which an
eigenvalue of G is prescribed at, or just below, zero (Golub, Meurant, "Matrices, moments and
quadrature with applications", 2010, section 6.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.iterative.energy_bounds import RANGE_ROUNDINGS, SPOILT_SHARE
from ddnewton.iterative.products import FLOAT64_ROUNDING, Product, finite

VECTORS_AT_ONCE = 32
"""Of the vectors, side by side as a matrix."""

BELOW_ZERO = 1e-4
"""How far below zero the prescribed eigenvalue lies, in units of δ."""


@dataclass
class Krylov:
    """The space of a vector b so far; it grows where more accuracy is asked for.

    ``limit`` is the most vectors that it may have. ``squared`` is bᵀG⁺b or more, for a b in the
    range of G, as in `conjugate_gradients`.
    """

    product: Product
    right: Float[Tensor, " side"]
    rounding: float
    limit: int
    squared: float = math.inf
    vectors: list[Float[Tensor, " side"]] = field(default_factory=list)
    diagonal: list[float] = field(default_factory=list)  # of T
    further: list[float] = field(default_factory=list)  # β, below the diagonal; the last one is q's
    following: Float[Tensor, " side"] | None = None  # q, None where the space is complete

    @property
    def size(self) -> float:
        """‖b‖."""
        return float(self.right.norm())

    @property
    def is_complete(self) -> bool:
        """Whether the space has all of x(δ), or may not grow."""
        done = bool(self.vectors) and self.following is None
        return done or len(self.vectors) >= self.limit or self.size == 0

    def grow(self) -> None:
        """Add a vector, by one product."""
        vector = self.right / self.size if self.following is None else self.following
        image = finite(self.product(vector))
        self.vectors.append(vector)
        alpha = float(vector @ image)
        # What is left of the product outside of the space; twice, for it is a difference.
        remainder = self._outside(self._outside(image))
        beta, largest = float(remainder.norm()), float(image.norm())
        self.diagonal.append(alpha)
        self.further.append(beta)
        rounding = 8 * max(self.rounding, FLOAT64_ROUNDING)
        small = beta <= rounding * max(largest, *self.diagonal)
        full = len(self.vectors) == len(self.right)
        self.following = None if small or full else remainder / beta

    def _outside(self, vector: Float[Tensor, " side"]) -> Float[Tensor, " side"]:
        """Return the part of a vector that is orthogonal to the space."""
        for start in range(0, len(self.vectors), VECTORS_AT_ONCE):
            rows = torch.stack(self.vectors[start : start + VECTORS_AT_ONCE])
            vector = vector - rows.mT @ (rows @ vector)
        return vector

    def tridiagonal(self) -> Float[Tensor, "m m"]:
        """Return T."""
        off = torch.tensor(self.further[:-1], dtype=torch.float64, device="cpu")
        matrix = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64, device="cpu"))
        return matrix + torch.diag(off, 1) + torch.diag(off, -1)

    def coefficients(self, deltas: Float[Tensor, " k"]) -> Float[Tensor, "k m"]:
        """Return ‖b‖ (T + δI)⁻¹ e₁ of some dampings."""
        evals, evecs = torch.linalg.eigh(self.tridiagonal())
        damped = evals.clamp(min=0) + deltas.cpu()[:, None]
        resolved = damped > 8 * FLOAT64_ROUNDING * evals[-1].abs()
        inverse = torch.where(resolved, 1 / torch.where(resolved, damped, 1), 0)
        coefficients: Tensor = self.size * ((inverse * evecs[0]) @ evecs.mT)
        return coefficients

    def lengths(self, deltas: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """Return ‖x(δ)‖ for some dampings, in the space so far."""
        if not self.vectors:
            return torch.zeros_like(deltas)
        lengths: Tensor = self.coefficients(deltas).norm(dim=1)
        return lengths.to(deltas)

    def lost(self, delta: float) -> float:
        """Return an upper bound on the share of bᵀ(G + δI)⁻¹b that x(δ) gives away."""
        if self.size == 0 or (self.vectors and self.following is None):
            return 0.0
        if not self.vectors or delta == 0:
            return 1.0
        # T with a row more, by which it has the eigenvalue −node.
        node, beta = BELOW_ZERO * delta, self.further[-1]
        last = _first_entry(self.diagonal[::-1], self.further[-2::-1], node)
        diagonal = [*self.diagonal, beta**2 * last - node]
        lower = _first_entry(self.diagonal, self.further, delta)
        upper = min(_first_entry(diagonal, self.further, delta), self._upper_by_range(delta))
        return min(1.0, max(0.0, (upper - lower) / upper)) if math.isfinite(upper) else 1.0

    def _upper_by_range(self, delta: float) -> float:
        """Return an upper bound on bᵀ(G + δI)⁻¹b / ‖b‖² by bᵀG⁺b ≤ c².

        It is c² − δ ∫ dν / (λ + δ) with dν = dμ / λ of the measure dμ of b, which c² is the mass
        of. Of T = LᵀL with L₀₀² = ‖b‖² / c² follows the matrix LLᵀ of ν, and of that the Gauss
        quadrature, from below (as in energy_bounds.py).
        """
        if not 0 < self.squared < math.inf:
            return math.inf
        mass = self.squared / self.size**2
        rows, below = [1 / mass], []  # the squares of L's diagonal, and of what is below it
        for alpha, beta in zip(self.diagonal, self.further, strict=True):
            square = alpha - rows[-1]
            if square <= SPOILT_SHARE * alpha:
                break
            below.append(square)
            rows.append(beta**2 / square)
        diagonal = [row + under for row, under in zip(rows, [0.0, *below], strict=True)]
        further = [math.sqrt(row * under) for row, under in zip(rows, below, strict=False)]
        floor = RANGE_ROUNDINGS * max(self.rounding, FLOAT64_ROUNDING)
        return mass * (1 - delta * _first_entry(diagonal, further, delta) + floor)

    def solution(self, delta: Float[Tensor, ""]) -> Float[Tensor, " side"]:
        """Return x(δ) in the space so far."""
        return self.image_and_solution(delta)[1]

    def image_and_solution(
        self, delta: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, " side"], Float[Tensor, " side"]]:
        """Return G x(δ), which takes no further product, and x(δ) in the space so far."""
        image, solution = torch.zeros_like(self.right), torch.zeros_like(self.right)
        if not self.vectors:
            return image, solution
        # G Q c = Q T c + β c_m q.
        c = self.coefficients(delta[None])[0]
        pairs = zip((self.tridiagonal() @ c).tolist(), c.tolist(), self.vectors, strict=True)
        for of_image, of_solution, vector in pairs:
            image.add_(vector, alpha=of_image)
            solution.add_(vector, alpha=of_solution)
        if self.following is not None:
            image.add_(self.following, alpha=self.further[-1] * float(c[-1]))
        return image, solution


def _first_entry(diagonal: Sequence[float], further: Sequence[float], delta: float) -> float:
    """Return e₁ᵀ(T + δI)⁻¹e₁, of a tridiagonal T, by elimination from its end."""
    pivot = diagonal[-1] + delta
    for alpha, beta in zip(diagonal[-2::-1], further[len(diagonal) - 2 :: -1], strict=False):
        pivot = alpha + delta - beta**2 / pivot if pivot else -math.inf
    return 1 / pivot if pivot else math.inf


def grown(space: Krylov, delta: float, tol: float) -> float:
    """Grow a space until its solution for δ gives away no more than ``tol``; return how much."""
    while (lost := space.lost(delta)) > tol and not space.is_complete:
        space.grow()
    return lost
