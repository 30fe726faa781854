"""The example of ViViT: a Newton step, checked against one from the dense matrix.

Source: Dangel, Tatzel, Hennig, *ViViT*, TMLR 2022, arXiv 2106.02624, and the documentation of its
library, whose data, net, tolerances, and functions for directions and damping these are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

from ddnewton.newton import newton_step
from ddnewton.types import ModelFn, PyTree

DAMPING = 1.0


def select_top_k(evals: Tensor, k: int = 4) -> list[int]:
    """Select the top k eigenvalues, as the reference example does."""
    return [evals.numel() - k + idx for idx in range(k)]


def constant_damping(evals: Tensor, evecs: Tensor, gammas: Tensor, lambdas: Tensor) -> Tensor:
    """Damp all directions alike, as the reference example does."""
    return DAMPING * torch.ones_like(evals)


def reference_example() -> bool:
    """Print the step's norm in both calculations, and return whether the two steps match."""
    # The example's data and net, from its seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        X, y = torch.rand(4, 7), torch.rand(4, 3)
        layers = (nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    model = nn.Sequential(*layers)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def model_fn(params: PyTree, X: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, params, (X,), strict=True)
        return outputs

    # The step from ddnewton, and the one from the dense matrix.
    problem = (model_fn, params, X, y, nn.MSELoss())
    leaves = newton_step(*problem, constant_damping, select=select_top_k)
    step, dense = torch.cat([leaf.flatten() for leaf in leaves.values()]), dense_step(*problem)
    match = torch.allclose(step, dense, rtol=1e-5, atol=1e-7)
    # The comparison.
    print("1. ViViT's example: N = 4, MLP 7-5-5-3 (88 parameters), MSE, top 4, damping 1\n")
    print(f"   step's norm, ddnewton        {step.norm():.7f}  from a Gram matrix, 12 by 12")
    print(f"   step's norm, torch.autograd  {dense.norm():.7f}  from the dense GGN, 88 by 88")
    print(f"   relative difference          {(step - dense).norm() / dense.norm():.1e}")
    print(f"   match at rtol 1e-5, atol 1e-7: {'yes' if match else 'NO'}\n")
    return match


def dense_step(
    model_fn: ModelFn, params: PyTree, X: Tensor, y: Tensor, criterion: nn.Module
) -> Float[Tensor, " d"]:
    """Return the example's step from the dense G = JᵀHJ and its eigenvectors, without ddnewton.

    With the gradient g and the kept eigenpairs (λ_k, e_k), it is −Σ_k (e_kᵀg) / (λ_k + δ) e_k.
    """
    # J [NC, D] of all outputs, H [NC, NC] and g [D] of the loss.
    leaves, f = tuple(params.values()), model_fn(params, X)
    parts = jacobian(lambda *leaves: model_fn(dict(zip(params, leaves, strict=True)), X), leaves)
    J = torch.cat([part.flatten(2) for part in parts], 2).flatten(0, 1)
    H = hessian(lambda f: criterion(f, y), f).view(len(J), len(J))
    g = J.T @ jacobian(lambda f: criterion(f, y), f).flatten()
    # The damped step along the kept eigenvectors.
    evals, evecs = torch.linalg.eigh(J.T @ H @ J)
    keep = select_top_k(evals)
    step: Tensor = -evecs[:, keep] @ (evecs[:, keep].T @ g / (evals[keep] + DAMPING))
    return step
