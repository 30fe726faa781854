"""The peers that need JAX, on multilayer perceptrons rebuilt from the problem's own weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.kernel import Kernel, answer
from benchmarks.problem import Problem
from benchmarks.quantities import Answer
from benchmarks.recipes import Case


def perceptron(params: list[tuple[Any, Any]], X: Any) -> Any:
    """Return the outputs of linear layers with rectifiers between them."""
    for weight, bias in params[:-1]:
        X = jax.nn.relu(X @ weight.T + bias)
    weight, bias = params[-1]
    return X @ weight.T + bias


def weights(problem: Problem) -> list[tuple[Any, Any]]:
    """Return the weights and biases of the problem's layers, in order."""
    arrays = [jnp.asarray(p.cpu().numpy()) for p in problem.params.values()]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def to_torch(tree: Any) -> Tensor:
    """Return the leaves of a JAX pytree as one vector of torch's."""
    leaves = [np.asarray(leaf).reshape(-1) for leaf in jax.tree_util.tree_leaves(tree)]
    return torch.from_numpy(np.concatenate(leaves))


def netket(case: Case, quantity: str) -> Answer:
    """Return an answer from netket's empirical tangent kernel."""
    from netket.jax._ntk import empirical_ntk_by_jacobian  # noqa: PLC0415

    params, X = weights(case.problem), jnp.asarray(case.problem.X.cpu().numpy())
    ntk = jax.jit(empirical_ntk_by_jacobian(perceptron, trace_axes=(), vmap_axes=0))

    @jax.jit
    def pulled_back(w: Any) -> Any:
        return jax.vjp(lambda params: perceptron(params, X), params)[1](w)[0]

    def answered() -> Tensor:
        products = torch.from_numpy(np.array(ntk(X, None, params)))  # [N, N, C, C]
        kernel = Kernel(
            torch.from_numpy(np.array(perceptron(params, X))),
            products.permute(0, 2, 1, 3),
            lambda w: to_torch(pulled_back(w.numpy())),
        )
        return answer(kernel, case, quantity)

    return answered


def somax(case: Case, quantity: str) -> Answer:
    """Return the step of somax's ``sgn_ce``, by conjugate gradients as far as they lead.

    In float32 a tighter tolerance is never met: all iterations are used, for a third of the error.
    """
    import somax  # noqa: PLC0415 - of this peer alone

    assert quantity == "all"
    problem = case.problem
    if not isinstance(problem.criterion, nn.CrossEntropyLoss):
        raise NotImplementedError("sgn_ce takes cross-entropy alone")
    # Its own optimizer, of which one step is taken.
    params = weights(problem)
    method = somax.sgn_ce(
        predict_fn=perceptron, lam0=case.damping, tol=1e-4, maxiter=1000, learning_rate=1.0
    )
    batch = {"x": jnp.asarray(problem.X.cpu().numpy()), "y": jnp.asarray(problem.y.cpu().numpy())}
    state, key = method.init(params), jax.random.PRNGKey(0)
    step = jax.jit(lambda params, state: method.step(params, batch, state, key)[0])

    def answered() -> Tensor:
        moved = step(params, state)
        return to_torch(jax.tree_util.tree_map(jnp.subtract, moved, params))

    return answered
