"""Who is measured: each peer makes, from a problem and a quantity, the function that is timed.

Imports and what a user does once, outside of the training loop, happen in the making.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from benchmarks.kernel import Kernel, answer
from benchmarks.quantities import DIRECTIONS, Answer, Peer
from benchmarks.recipes import Case
from ddnewton import ggn_eigvalsh, newton_step, prepare, top_k


def flat(tree: object) -> Tensor:
    """Return the leaves of a pytree as one vector."""
    return torch.cat([leaf.detach().reshape(-1) for leaf in tree_leaves(tree)])


def unprepared(case: Case, quantity: str, gram: str = "auto") -> Answer:
    """Return ddnewton's answer on a plain function."""
    if quantity == "eigenvalues":
        return lambda: ggn_eigvalsh(*case.problem, gram=gram)
    select = top_k(DIRECTIONS) if quantity == "top10" else None
    return lambda: flat(newton_step(*case.problem, case.damping, select=select, gram=gram))


def prepared(case: Case, quantity: str) -> Answer:
    """Return ddnewton's answer on a model that knows its layers, as in a loop."""
    model_fn, params, X, *_ = case.problem
    problem = case.problem._replace(model_fn=prepare(model_fn, params, X))
    return unprepared(case._replace(problem=problem), quantity)


def dense(case: Case, quantity: str) -> Answer:
    """Return ddnewton's answer from per-sample Jacobians."""
    return unprepared(case, quantity, gram="dense")


def jacobians(case: Case, quantity: str) -> Answer:
    """Return what a user of torch.func writes in a few lines."""
    model_fn, params, X, *_ = case.problem

    def outputs(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return model_fn(params, x[None])[0].reshape(-1)

    def answered() -> Tensor:
        with torch.no_grad():
            # J [NC, D], then K = J Jᵀ.
            values = model_fn(params, X).reshape(len(X), -1)
            rows = vmap(jacrev(outputs), (None, 0))(params, X)
            J = torch.cat([part.flatten(2) for part in rows.values()], 2).flatten(0, 1)
            products = (J @ J.T).unflatten(1, values.shape).unflatten(0, values.shape)
            kernel = Kernel(values, products, lambda w: w.reshape(-1) @ J)
            return answer(kernel, case, quantity)

    return answered


def vivit(case: Case, quantity: str) -> Answer:
    """Return ViViT 1.0.0's answer, with what torch 2 took away put back."""
    torch.Tensor.symeig = lambda A, eigenvectors=False: (  # type: ignore[attr-defined]
        torch.linalg.eigh(A) if eigenvectors else (torch.linalg.eigvalsh(A), None)
    )
    without_torchvision()
    backpack = importlib.import_module("backpack")
    problem = case.problem
    net, criterion = backpack.extend(case.module), backpack.extend(problem.criterion)
    group = {
        "params": list(net.parameters()),
        "damping": lambda evals, *_: case.damping * torch.ones_like(evals),
        "criterion": _leading if quantity == "top10" else _above_rounding,
    }

    def answered() -> Tensor:
        if quantity == "eigenvalues":
            linalg = importlib.import_module("vivit.linalg.eigvalsh")
            computation = linalg.EigvalshComputation()
            extensions = [computation.get_extension()]
        else:
            optim = importlib.import_module("vivit.optim.directional_damped_newton")
            computation = optim.DirectionalDampedNewtonComputation(warn_small_eigvals=0.0)
            extensions = computation.get_extensions()
        hook = computation.get_extension_hook([group])
        loss = criterion(net(problem.X), problem.y)
        with backpack.backpack(*extensions, extension_hook=hook):
            loss.backward()
        return flat(computation.get_result(group))

    return answered


def _leading(evals: Tensor) -> list[int]:
    return list(range(len(evals)))[-DIRECTIONS:]


def _above_rounding(evals: Tensor) -> list[int]:
    """Return the eigenvalues by whose roots ViViT can divide."""
    return (evals > 1e-6 * evals[-1]).nonzero()[:, 0].tolist()


def without_torchvision() -> None:
    """Let BackPACK's examples be imported: torchvision does not import beside a CPU build."""
    datasets, transforms = ModuleType("torchvision.datasets"), ModuleType("torchvision.transforms")
    datasets.MNIST = transforms.ToTensor = object  # type: ignore[attr-defined]
    transforms.Compose = transforms.Normalize = object  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision", ModuleType("torchvision"))
    sys.modules.setdefault("torchvision.datasets", datasets)
    sys.modules.setdefault("torchvision.transforms", transforms)


def nngeometry(case: Case, quantity: str) -> Answer:
    """Return an answer from nngeometry's Gram matrix, formed layer by layer."""
    gram_matrix = importlib.import_module("nngeometry").GramMatrix
    net, X = case.module, case.problem.X
    params = list(net.parameters())
    examples = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X), batch_size=len(X), collate_fn=lambda _: [X.clone()]
    )

    def answered() -> Tensor:
        products = gram_matrix(net, examples).to_torch().permute(1, 0, 3, 2)
        values = net(X)
        kernel = Kernel(
            values.detach(),
            products,
            lambda w: flat(torch.autograd.grad(values, params, w)),
        )
        return answer(kernel, case, quantity)

    return answered


def curvlinops(case: Case, quantity: str) -> Answer:
    """Return the step by conjugate gradients on curvlinops' Gauss-Newton operator."""
    assert quantity == "all"
    without_torchvision()
    operator = importlib.import_module("curvlinops").GGNLinearOperator
    linalg = importlib.import_module("scipy.sparse.linalg")
    net, problem = case.module, case.problem
    data = [(problem.X, problem.y)]
    params = list(net.parameters())

    def answered() -> Tensor:
        ggn = operator(net, problem.criterion, params, data, check_deterministic=False)
        loss = problem.criterion(net(problem.X), problem.y)
        slope = flat(torch.autograd.grad(loss, params)).cpu().numpy()
        product = ggn.to_scipy().matvec  # its forward mode needs attention without fast paths
        shifted = linalg.LinearOperator(
            ggn.shape, lambda v: product(v) + case.damping * v, dtype=slope.dtype
        )
        with sdpa_kernel(SDPBackend.MATH):
            solution, _ = linalg.cg(shifted, -slope, rtol=1e-6)
        return torch.from_numpy(solution)

    return answered


def of_jax(name: str) -> Callable[[Case, str], Answer]:
    """Return a peer that needs JAX, which is imported only where the peer is made."""

    def made(case: Case, quantity: str) -> Answer:
        return getattr(importlib.import_module("benchmarks.peers_jax"), name)(case, quantity)

    return made


PEERS = {
    "ddnewton": Peer(prepared, main=True),
    "vivit": Peer(vivit, ("mlp", "layers"), main=True),
    "ddnewton-unprepared": Peer(unprepared, quantities=("top10",), main=True),
    "ddnewton-dense": Peer(dense, quantities=("top10",)),
    "jacrev": Peer(jacobians),
    "nngeometry": Peer(nngeometry, ("mlp", "layers", "residual")),
    "curvlinops": Peer(curvlinops, ("mlp", "layers", "residual", "transformer"), ("all",)),
    "netket": Peer(of_jax("netket"), ("mlp",)),
    "somax": Peer(of_jax("somax"), ("mlp",), ("all",)),
}
QUICK = ("ddnewton", "ddnewton-unprepared", "ddnewton-dense", "jacrev")
