"""Who is asked of large problems: ddnewton by products, curvlinops with SciPy, and the exact way.

Each makes, from a problem and what is asked, a function that is timed. What a user does once,
outside of the training loop, happens in the making; what a step or eigenpairs need, does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from benchmarks.large_recipes import COUNT, Instance
from benchmarks.peers import flat, without_torchvision
from ddnewton import ggn_eigh, newton_step, newton_step_and_info, prepare, top_k
from ddnewton.quadratic.arguments import arguments_of
from ddnewton.quadratic.matrix_free.free_model import free_model, operator_of

OURS, PEER, EXACT = "ddnewton", "curvlinops + SciPy", "ddnewton, exact"


class Asked(NamedTuple):
    """What is asked of a problem; what is not, is None.

    ``iterations`` and ``pairs``, arguments of ARPACK's, tell a peer when to stop.
    """

    vector: Tensor | None = None  # to be multiplied
    delta: float | None = None  # of a step
    tol: float = 1e-2
    iterations: int | None = None
    pairs: dict[str, Any] | None = None
    solution: Tensor | None = None  # in float64, that an answer is compared with


Answer = Callable[[], Any]
"""Gives a vector, or eigenvalues and vectors [K, D]."""


def ours(instance: Instance, asked: Asked) -> Answer:
    """Return ddnewton's answer by products."""
    problem, options = instance.problem, {"gram": "free", "tol": asked.tol}
    if asked.vector is not None:
        with torch.no_grad(), free_model(arguments_of(*problem, **options)) as model:
            operator = operator_of(model, model.blocks[0].leaves)
        vectors = asked.vector.double()[None]
        return lambda: operator.product(vectors)[0]
    if asked.delta is not None:
        return lambda: flat(newton_step(*problem, asked.delta, **options))
    return lambda: as_matrix(*ggn_eigh(*problem, select=top_k(COUNT), **options))


def told(instance: Instance, asked: Asked) -> dict[str, float]:
    """Return what ddnewton says of its step."""
    _, info = newton_step_and_info(*instance.problem, asked.delta, gram="free", tol=asked.tol)
    return {"told": float(info.lost), "products": int(info.products)}


def exact(instance: Instance, asked: Asked) -> Answer:
    """Return ddnewton's answer by the matrix, of a model that knows its layers."""
    model_fn, params, X, *_ = instance.problem
    problem = instance.problem._replace(model_fn=prepare(model_fn, params, X))
    if asked.delta is not None:
        return lambda: flat(newton_step(*problem, asked.delta))
    return lambda: as_matrix(*ggn_eigh(*problem, select=top_k(COUNT)))


def as_matrix(evals: Tensor, evecs: Any) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, and their vectors as rows."""
    return evals, torch.cat([leaf.flatten(1) for leaf in tree_leaves(evecs)], 1)


class Peer:
    """Curvlinops' operator of a problem, and SciPy's methods on it with vectors in float64."""

    def __init__(self, instance: Instance) -> None:
        without_torchvision()
        module, problem, self.batches = instance.module, instance.problem, instance.batches
        self.module, self.criterion = module, problem.criterion
        self.params = list(module.parameters())
        self.ggn = importlib.import_module("curvlinops").GGNLinearOperator(
            module, problem.criterion, self.params, self.batches, check_deterministic=False
        )
        self.linalg = importlib.import_module("scipy.sparse.linalg")
        self.products = 0

    def product(self, v: Tensor) -> Tensor:
        """Return G v; forward mode needs attention without fast paths."""
        self.products += 1
        with sdpa_kernel(SDPBackend.MATH):
            return self.ggn @ v

    def gradient(self) -> Tensor:
        """Return the gradient of the loss."""
        total = torch.zeros(self.ggn.shape[1], dtype=torch.float64)
        n = sum(len(X) for X, _ in self.batches)
        for X, y in self.batches:
            loss = self.criterion(self.module(X), y) * (len(X) / n)
            total += flat(torch.autograd.grad(loss, self.params)).double()
        return total

    def shifted(self, delta: float) -> Any:
        """Return v ↦ G v + δ v as SciPy takes it."""
        dtype = self.params[0].dtype

        def product(v: Any) -> Any:
            vector = torch.from_numpy(v.reshape(-1))
            return (self.product(vector.to(dtype)).double() + delta * vector).numpy()

        return self.linalg.LinearOperator(self.ggn.shape, product, dtype="float64")

    def step(
        self, delta: float, iterations: int, callback: Callable[[Tensor], object] | None = None
    ) -> Tensor:
        """Return so many iterations of conjugate gradients towards a step."""
        told = None if callback is None else lambda v: callback(torch.from_numpy(v))
        right = -self.gradient().numpy()
        solution, _ = self.linalg.cg(
            self.shifted(delta), right, rtol=0.0, maxiter=iterations, callback=told
        )
        return torch.from_numpy(solution)

    def eigenpairs(self, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return leading eigenpairs by ARPACK."""
        start = torch.randn(self.ggn.shape[0], generator=torch.Generator().manual_seed(0))
        evals, evecs = self.linalg.eigsh(
            self.shifted(0.0), k=COUNT, which="LA", v0=start.double().numpy(), **options
        )
        return torch.from_numpy(evals), torch.from_numpy(evecs.T)


def peer(instance: Instance, asked: Asked) -> Answer:
    """Return curvlinops' product, or what SciPy makes of such."""
    made = Peer(instance)
    if asked.vector is not None:
        vector = asked.vector.to(made.params[0].dtype)
        return lambda: made.product(vector)
    if asked.delta is not None:
        return lambda: made.step(asked.delta, asked.iterations)
    return lambda: made.eigenpairs(asked.pairs)


WAYS: dict[str, Callable[[Instance, Asked], Answer]] = {OURS: ours, PEER: peer, EXACT: exact}
