"""Steps by the textbook: dense matrices in float64 by torch.func, and nothing of ddnewton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

REFERENCES = {
    "columns": 1e-12,
    "parameters": 1e-12,
    "structured": 1e-12,
    "convolutions": 1e-12,
    "terms": 1e-10,
    "terms with samples": 1e-10,
    "gradient's samples": 1e-12,
    "directions' samples": 1e-12,
    "joint": 1e-12,
    "joint with samples": 1e-12,
    "class weights": 1e-12,
    "label smoothing": 1e-12,
    "positions": 1e-12,
    "positions of samples": 1e-12,
    "scale": 1e-12,
    "complex": 1e-11,
    "chunks of samples": 1e-12,
    "float32": 1e-5,
}
"""Cases with one damping of all directions, and how near their steps come."""

RANK_TOLERANCE = 1e-11


def reference_step(case: Any) -> Tensor:
    """−(G + δI)⁻¹g in the range of G; both are summed over terms, and of sub-samples if given."""
    scale = 1.0
    if case.options.get("scale") is not None:
        scale = torch.cat(
            [leaf.reshape(-1) for leaf in tree_leaves(case.options["scale"])]
        ).double()
    G, g = 0.0, 0.0
    for name in case.model_fn if isinstance(case.model_fn, dict) else [None]:
        term = [
            part if name is None or not isinstance(part, Mapping) else part[name]
            for part in (case.model_fn, case.X, case.y, case.criterion)
        ]
        samples = [case.options.get(option) for option in ("subsampling_ggn", "subsampling_grad")]
        samples = [part.get(name) if isinstance(part, dict) else part for part in samples]
        of_curvature, of_slope = parts_of(case.params, term, *samples)
        G, g = G + of_curvature, g + of_slope
    S = scale * torch.eye(len(g), dtype=torch.float64)
    evals, E = torch.linalg.eigh(S @ G @ S)
    kept = evals > RANK_TOLERANCE * evals[-1]
    return -S @ E[:, kept] @ ((E[:, kept].T @ S @ g) / (evals[kept] + case.damping))


def parts_of(params: Any, term: Sequence[Any], of_ggn: Any, of_grad: Any) -> tuple[Tensor, Tensor]:
    """G [d, d] and g [d] of a term: samples' parts of the whole batch's loss, N/S times."""
    model_fn, X, y, criterion = term
    vector, function = as_function_of_reals(model_fn, params, X)
    outputs = function(vector)
    loss = of_reals(criterion, y, outputs)
    reals = torch.view_as_real(outputs) if outputs.is_complex() else outputs

    def flat_outputs(v: Tensor) -> Tensor:
        f = function(v)
        return (torch.view_as_real(f) if f.is_complex() else f).reshape(-1)

    n = len(reals)
    J = jacrev(flat_outputs)(vector).reshape(n, -1, len(vector))
    r = grad(loss)(reals).reshape(n, -1)
    H = hessian(loss)(reals).reshape(n, r.shape[1], n, r.shape[1])
    G = sum(J[i].T @ H[i, :, i] @ J[i] for i in (range(n) if of_ggn is None else of_ggn))
    g = sum(J[i].T @ r[i] for i in (range(n) if of_grad is None else of_grad))
    return G * n / len(of_ggn or range(n)), g * n / len(of_grad or range(n))


def of_reals(criterion: Any, y: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """A criterion as a function of real outputs, in float64."""
    y = y.double() if y.dtype == torch.float32 else y
    factor = 1.0
    if not callable(criterion):
        criterion, factor = torch.nn.functional.mse_loss, 3.0  # the weighted one

    def loss(f: Tensor) -> Tensor:
        return factor * criterion(torch.view_as_complex(f) if outputs.is_complex() else f, y)

    return loss


def as_function_of_reals(
    model_fn: Any, params: Any, X: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """All parameters as one real vector, and the outputs as a function of it, in float64."""
    leaves, spec = tree_flatten(params)
    reals = [torch.view_as_real(leaf) if leaf.is_complex() else leaf.double() for leaf in leaves]
    if isinstance(X, Tensor) and X.dtype == torch.float32:
        X = X.double()

    def function(vector: Tensor) -> Tensor:
        pieces = vector.split([leaf.numel() for leaf in reals])
        parts = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, reals, strict=True)]
        parts = [
            torch.view_as_complex(part) if leaf.is_complex() else part
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return model_fn(tree_unflatten(parts, spec), X)

    return torch.cat([leaf.reshape(-1) for leaf in reals]), function
