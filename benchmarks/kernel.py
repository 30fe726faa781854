"""A step and its eigenvalues from a tangent kernel K = J Jᵀ [NC, NC], as a textbook has them.

What several peers share: they differ in how they form K and how they pull outputs back.
With S_n S_nᵀ = H_n the Gram matrix is VᵀV = SᵀKS / N, and the gradient g = Jᵀr / N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.quantities import DIRECTIONS
from benchmarks.recipes import Case


class Kernel(NamedTuple):
    """Outputs [N, C], K [N, C, N, C], and w [N, C] ↦ Jᵀw [D]."""

    outputs: Tensor
    products: Tensor
    pull_back: Callable[[Tensor], Tensor]


def factors(criterion: nn.Module, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return r = ∇ℓ [N, C] and S [N, C, C], a root of ∇²ℓ, of every sample."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        p = outputs.softmax(1)
        root = p.sqrt()
        S = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
        return p - nn.functional.one_hot(y, p.shape[1]), S
    C = outputs.shape[1]
    S = (2 / C) ** 0.5 * torch.eye(C, dtype=outputs.dtype, device=outputs.device)
    return 2 / C * (outputs - y.reshape(outputs.shape)), S.expand(len(outputs), C, C)


def answer(kernel: Kernel, case: Case, quantity: str) -> Tensor:
    """Return the step [D], or the eigenvalues."""
    y, damping = case.problem.y.to(kernel.outputs.device), case.damping
    r, S = factors(case.problem.criterion, kernel.outputs, y)
    N = len(r)
    half = torch.einsum("icjd,jdm->icjm", kernel.products, S)
    gram = torch.einsum("icn,icjm->injm", S, half).flatten(2).flatten(0, 1) / N
    if quantity == "eigenvalues":
        return torch.linalg.eigvalsh(gram)
    slopes = torch.einsum("ic,icjm->jm", r, half).flatten() / N**1.5  # Vᵀg
    if quantity == "all":  # −(VVᵀ + δI)⁻¹g = −(g − V (VᵀV + δI)⁻¹ Vᵀg) / δ
        shifted = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        inner = torch.linalg.solve_ex(shifted, slopes).result
        weights = (S @ inner.reshape(N, -1, 1))[..., 0] / N**0.5 - r / N
        return kernel.pull_back(weights / damping)
    evals, evecs = (part[..., -DIRECTIONS:] for part in torch.linalg.eigh(gram))
    coefficients = evecs @ (-(evecs.T @ slopes) / (evals + damping) / evals)
    return kernel.pull_back((S @ coefficients.reshape(N, -1, 1))[..., 0] / N**0.5)
