"""The textbook, dense, in float64 and in loops: no ddnewton, no torch.func.

Everything comes from torch's own loss of all outputs, whatever its reduction:

    loss = 1/N Σ_n ℓ_n,    r_n = ∇ℓ_n = N ∂loss/∂f_n,    H_n = ∇²ℓ_n = N ∂²loss/∂f_n∂f_n,
    g = 1/N Σ_n J_nᵀ r_n,    G = 1/N Σ_n J_nᵀ H_n J_n.
"""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad
from torch.utils._pytree import tree_leaves, tree_map

EPS = torch.finfo(torch.float64).eps


class Dense(NamedTuple):
    """Loss, Jacobians J_n, loss gradients r_n and loss Hessians H_n of every sample."""

    loss: Tensor  # []
    jacobians: Tensor  # [N, C, D]
    slopes: Tensor  # [N, C]
    hessians: Tensor  # [N, C, C]

    @property
    def gradients(self) -> Tensor:
        """J_nᵀ r_n [N, D]."""
        return torch.einsum("ncd,nc->nd", self.jacobians, self.slopes)

    @property
    def gradient(self) -> Tensor:
        """The mean of the samples' gradients [D]."""
        return self.gradients.mean(0)

    @property
    def ggn(self) -> Tensor:
        """The mean of J_nᵀ H_n J_n [D, D]."""
        total = sum(J.T @ H @ J for J, H in zip(self.jacobians, self.hessians, strict=True))
        return total / len(self.jacobians)


class Directions(NamedTuple):
    """Eigenpairs of G, ascending, with the derivatives of every sample along each of them."""

    evals: Tensor  # [K]
    vectors: Tensor  # [D, K]
    gammas: Tensor  # [N, K]
    lambdas: Tensor  # [N, K]


def flat(tree) -> Tensor:
    """Every leaf of a pytree in one float64 vector."""
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in tree_leaves(tree)])


def as_double(tree):
    """The tree with its floating leaves in float64, apart from the original."""
    return tree_map(lambda x: x.detach().double() if x.is_floating_point() else x.clone(), tree)


def autograd_derivatives(loss, outputs: Tensor, y) -> tuple[Tensor, Tensor]:
    """∂loss/∂f_n and ∂²loss/∂f_n∂f_n by two backward passes; samples must not interact."""
    N, C = len(outputs), outputs[0].numel()
    outputs = outputs.detach().requires_grad_()
    (slopes,) = grad(loss(outputs, y), outputs, create_graph=True)
    slopes = slopes.reshape(N, C)
    hessian = torch.zeros(N, C, N, C, dtype=torch.float64)
    for n in range(N):
        for c in range(C):
            if slopes.requires_grad:
                (row,) = grad(slopes[n, c], outputs, retain_graph=True)
                hessian[n, c] = row.reshape(N, C)
    blocks = torch.stack([hessian[n, :, n] for n in range(N)])
    assert torch.allclose(hessian.abs().sum(), blocks.abs().sum()), "the loss couples its samples"
    return slopes.detach(), blocks


def softmax_derivatives(loss, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy's derivatives, free of the cancellation in p_y − 1 and p (1 − p)."""
    N, C = logits.shape
    p = logits.softmax(1)
    others = torch.stack([(p * (torch.arange(C) != c)).sum(1) for c in range(C)], 1)
    slopes, hessians = p.clone(), torch.zeros(N, C, C, dtype=torch.float64)
    for n in range(N):
        slopes[n, y[n]] = -others[n, y[n]]
        hessians[n] = -torch.outer(p[n], p[n])
        hessians[n].diagonal().copy_(p[n] * others[n])
    return slopes / N, hessians / N


def logistic_derivatives(loss, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy's derivatives for labels 0 and 1, free of cancellation."""
    up, down = logits.sigmoid(), (-logits).sigmoid()
    slopes = torch.where(y == 1, -down, up) / logits.numel()
    return slopes.flatten(1), torch.diag_embed((up * down).flatten(1)) / logits.numel()


def dense(model_fn, params, X, y, loss, derivatives=autograd_derivatives) -> Dense:
    """Everything about one batch, in float64."""
    params, X, y = as_double(params), as_double(X), as_double(y)
    leaves = [leaf.requires_grad_() for leaf in tree_leaves(params)]
    outputs = model_fn(params, X)
    N, C = len(outputs), outputs[0].numel()
    rows = [
        torch.cat(
            [
                torch.zeros_like(leaf).reshape(-1) if piece is None else piece.reshape(-1)
                for leaf, piece in zip(
                    leaves, grad(f, leaves, retain_graph=True, allow_unused=True), strict=True
                )
            ]
        )
        for f in outputs.reshape(-1)
    ]
    slopes, hessians = derivatives(loss, outputs.detach(), y)
    return Dense(
        loss=loss(outputs, y).detach(),
        jacobians=torch.stack(rows).reshape(N, C, -1),
        slopes=N * slopes,
        hessians=N * hessians,
    )


def roots(hessians: Tensor) -> list[Tensor]:
    """The symmetric square roots of the samples' Hessians, without what is rounding."""
    rounding = 10 * EPS * hessians.shape[1] * hessians.abs().max()
    result = []
    for H in hessians:
        h, Q = torch.linalg.eigh(H)
        assert h[0] >= -rounding, "the loss is not convex"
        result.append(Q @ torch.diag(torch.where(h > rounding, h, 0).sqrt()) @ Q.T)
    return result


def eigenpairs(problem: Dense) -> tuple[Tensor, Tensor]:
    """All NC eigenvalues of G = VVᵀ, ascending, and the eigenvectors that exist (the last ones).

    They are the squared singular values and the left singular vectors of V.
    """
    N, C, _ = problem.jacobians.shape
    V = torch.cat(
        [J.T @ S for J, S in zip(problem.jacobians, roots(problem.hessians), strict=True)], dim=1
    ) / math.sqrt(N)
    E, sigma, _ = torch.linalg.svd(V, full_matrices=False)
    evals = torch.zeros(N * C, dtype=torch.float64)
    evals[N * C - len(sigma) :] = sigma.flip(0) ** 2
    return evals, E.flip(1)


def rank(evals: Tensor) -> int:
    """How many eigenvalues are above rounding."""
    return int((evals > 10 * EPS * len(evals) * evals[-1]).sum())


def directions(problem: Dense, select=None) -> Directions:
    """The selected eigenpairs; without a choice, those above rounding."""
    N, _, _ = problem.jacobians.shape
    evals, E = eigenpairs(problem)
    missing = len(evals) - E.shape[1]
    if select is None:
        chosen = range(len(evals) - rank(evals), len(evals))
    else:
        picked = torch.as_tensor(select(evals))
        chosen = picked.nonzero()[:, 0].tolist() if picked.dtype == torch.bool else picked.tolist()
    columns = [E[:, k - missing] for k in chosen]
    K, D = len(columns), E.shape[0]
    E = torch.stack(columns, 1) if columns else torch.zeros(D, 0, dtype=torch.float64)
    gammas, lambdas = (torch.zeros(N, K, dtype=torch.float64) for _ in range(2))
    for n in range(N):
        for k in range(K):
            change = problem.jacobians[n] @ E[:, k]
            gammas[n, k] = problem.slopes[n] @ change
            lambdas[n, k] = change @ problem.hessians[n] @ change
    return Directions(evals[list(chosen)], E, gammas, lambdas)


def step(problem: Dense, damping, select=None, complement=None) -> Tensor:
    """Σ_k −γ_k / (λ_k + δ_k) e_k [D], and −(g − Pg)/δ⊥ outside the kept directions.

    A damping rule gets None for the Gram eigenvectors, which depend on the root of H.
    """
    evals, E, gammas, lambdas = kept = directions(problem, select)
    if callable(damping):
        dampings = damping(evals, None, gammas, lambdas)
    else:
        dampings = torch.full_like(evals, damping)
    result = torch.zeros(E.shape[0], dtype=torch.float64)
    for k in range(len(evals)):
        if dampings[k] < math.inf:
            result -= gammas[:, k].mean() / (lambdas[:, k].mean() + dampings[k]) * E[:, k]
    if complement is not None:
        g = problem.gradient
        result -= (g - kept.vectors @ (kept.vectors.T @ g)) / complement
    return result


def solve(problem: Dense, delta: float) -> Tensor:
    """−(G + δI)⁻¹ g [D], by whichever of two textbook identities is smaller.

    The second, (JᵀHJ/N + δI)⁻¹ Jᵀr = Jᵀ(HJJᵀ/N + δI)⁻¹ r, takes no root and divides by nothing.
    """
    N, C, D = problem.jacobians.shape
    if D <= N * C:
        identity = torch.eye(D, dtype=torch.float64)
        return -torch.linalg.solve(problem.ggn + delta * identity, problem.gradient)
    J = problem.jacobians.reshape(N * C, D)
    H = torch.block_diag(*problem.hessians)
    inner = H @ J @ J.T / N + delta * torch.eye(N * C, dtype=torch.float64)
    return -J.T @ torch.linalg.solve(inner, problem.slopes.reshape(-1)) / N


def solve_in_decimals(problem: Dense, delta: float) -> Tensor:
    """−(G + δI)⁻¹ g [D] by Gaussian elimination on 60 digits: slow, and right.

    Where a net is sure of some samples, curvatures of 1 and 1e-174 meet in one matrix.
    """
    with localcontext(prec=60):
        J, H, r = (
            np.vectorize(Decimal, otypes=[object])(part.numpy())
            for part in (problem.jacobians, problem.hessians, problem.slopes)
        )
        N, D = len(J), J.shape[2]
        A = sum(J[n].T @ H[n] @ J[n] for n in range(N)) / N
        b = sum(J[n].T @ r[n] for n in range(N)) / N
        for d in range(D):
            A[d, d] += Decimal(delta)
        for d in range(D):
            for row in range(d + 1, D):
                factor = A[row, d] / A[d, d]
                A[row] -= factor * A[d]
                b[row] -= factor * b[d]
        for d in reversed(range(D)):
            b[d] = (b[d] - A[d, d + 1 :] @ b[d + 1 :]) / A[d, d]
        return -torch.from_numpy(b.astype(float))


def error(result, truth) -> float:
    """‖result − truth‖ / ‖truth‖, of vectors or pytrees; absolute where the truth is zero."""
    result, truth = flat(result), flat(truth)
    assert result.shape == truth.shape, f"{result.shape} is not {truth.shape}"
    return float((result - truth).norm() / (truth.norm() or 1.0))


def clusters(evals: Tensor, gap: float = 1e-6) -> list[slice]:
    """Runs of eigenvalues that are equal to within ``gap`` of the largest."""
    starts = [k for k in range(len(evals)) if k == 0 or evals[k] - evals[k - 1] > gap * evals[-1]]
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(evals)])]


def step_of_module(module: torch.nn.Module, X: Tensor, y: Tensor, delta: float) -> Tensor:
    """−(G + δ)⁻¹ g [D] of a module's mean squared error, along all parameters that it trains."""
    trained = [p for p in module.parameters() if p.requires_grad]
    outputs = module(X)
    J = torch.stack(
        [
            torch.cat([part.flatten() for part in grad(f, trained, retain_graph=True)])
            for f in outputs.flatten()
        ]
    )
    weight = 2 / outputs.numel()
    G = weight * J.mT @ J + delta * torch.eye(J.shape[1], dtype=J.dtype)
    return -torch.linalg.solve(G, weight * J.mT @ (outputs - y).flatten()).detach()
