"""Laplace approximations from the Gauss-Newton matrix's eigenpairs, as laplace-torch has them.

``python examples/laplace_posterior.py`` fits a small regressor and a small classifier, chooses the
prior's precision by the marginal likelihood, and prints how sure the nets are inside and outside of
their data. With ``--laplace`` it compares every number with those of laplace-torch (``pip install
laplace-torch asdfghjkl==0.1a2``).
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vmap

from ddnewton import as_function, fit, ggn_eigh, top_k, weighted
from ddnewton.types import ModelFn, PyTree, Select

NOISE = 0.1
"""Standard deviation of the regressor's targets, in their units."""


class Posterior(NamedTuple):
    """A normal distribution of the parameters: its precision is E diag(λ) Eᵀ + τ I."""

    model_fn: ModelFn
    mean: dict[str, Tensor]
    evals: Tensor
    evecs: dict[str, Tensor]
    prior_precision: float


def posterior(
    model_fn: ModelFn,
    mean: dict[str, Tensor],
    X: PyTree,
    y: PyTree,
    negative_log_likelihood: Any,
    prior_precision: float,
    *,
    select: Select | None = None,
) -> Posterior:
    """Return the posterior at fitted parameters, for a loss that is summed over the samples."""
    evals, evecs = ggn_eigh(model_fn, mean, X, y, negative_log_likelihood, select=select)
    return Posterior(model_fn, mean, evals, evecs, prior_precision)


def output_covariance(laplace: Posterior, X: Tensor) -> Tensor:
    """Return the covariance J Σ Jᵀ of the linearized outputs [N, C, C], noise left out."""

    # The outputs along every direction, J E, and J Jᵀ of every sample.
    def along(evec: dict[str, Tensor]) -> Tensor:
        slopes: Tensor = jvp(lambda p: laplace.model_fn(p, X), (laplace.mean,), (evec,))[1]
        return slopes

    def squared(x: Tensor) -> Tensor:
        jacobians = jacrev(lambda p: laplace.model_fn(p, x[None])[0])(laplace.mean)
        rows = torch.cat([leaf.flatten(1) for leaf in jacobians.values()], 1)
        return rows @ rows.mT

    prior, directions = vmap(squared)(X), vmap(along, out_dims=-1)(laplace.evecs)
    # Where the data tell a direction, (τ + λ)⁻¹ takes the place of τ⁻¹.
    told = laplace.evals / (laplace.evals + laplace.prior_precision)
    return (prior - (directions * told) @ directions.mT) / laplace.prior_precision


def log_evidence(laplace: Posterior, log_likelihood: float, prior_precision: float) -> float:
    """Return the logarithm of the marginal likelihood for a precision of the prior."""
    square = sum(leaf.square().sum() for leaf in laplace.mean.values())
    occam = torch.log1p(laplace.evals / prior_precision).sum()
    return float(log_likelihood - 0.5 * (occam + prior_precision * square))


def likeliest_precision(laplace: Posterior, iterations: int = 100) -> float:
    """Return the prior's precision of the highest marginal likelihood: τ = Σ λ/(λ + τ) / ‖θ‖².

    The fixed point is MacKay's. It takes no further eigenvalues, as these do not depend on τ.
    """
    square = sum(leaf.square().sum() for leaf in laplace.mean.values())
    precision = torch.tensor(laplace.prior_precision).double()
    for _ in range(iterations):
        precision = (laplace.evals / (laplace.evals + precision)).sum() / square
    return float(precision)


def drawn(laplace: Posterior, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return parameters drawn from the posterior, ``count`` in front of every leaf."""
    noise = {
        name: torch.randn((count, *leaf.shape), generator=generator, dtype=leaf.dtype)
        for name, leaf in laplace.mean.items()
    }
    # Draws of the prior, shorter by √(τ/(τ + λ)) along every direction.
    amounts = sum(
        noise[name].flatten(1) @ evec.flatten(1).mT for name, evec in laplace.evecs.items()
    )
    told = 1 - (laplace.prior_precision / (laplace.prior_precision + laplace.evals)).sqrt()
    samples = {}
    for name, leaf in laplace.mean.items():
        known = torch.tensordot(amounts * told, laplace.evecs[name], 1)
        samples[name] = leaf + (noise[name] - known) / math.sqrt(laplace.prior_precision)
    return samples


def probit(logits: Tensor, covariance: Tensor) -> Tensor:
    """Return the probabilities of classes for uncertain logits, by MacKay's approximation."""
    variances = covariance.diagonal(dim1=1, dim2=2)
    return (logits / (1 + math.pi / 8 * variances).sqrt()).softmax(1)


class Task(NamedTuple):
    """A net, its data, the negative log-likelihood of all data, and points to look at."""

    net: nn.Sequential
    X: Tensor
    y: Tensor
    loss: Any
    looked_at: Tensor
    likelihood: str
    """ "regression" or "classification", as laplace-torch calls them."""


def regression(samples: int = 60) -> Task:
    """Return a wave with a gap in its data; the loss is Σ (f − y)² / 2σ²."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, 1, generator=generator, dtype=torch.float64)
    x = torch.where(x < 0.5, 4 * x - 3, 4 * x - 1)  # -3 … -1 and 1 … 3
    noise = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    loss = weighted(nn.MSELoss(reduction="sum"), 0.5 / NOISE**2)
    looked_at = torch.tensor([[-2.0], [0.0], [2.0], [5.0]]).double()
    return Task(_net(1, 1), x, torch.sin(2 * x) + NOISE * noise, loss, looked_at, "regression")


def classification(samples: int = 90) -> Task:
    """Return three clusters in a plane; the loss is Σ −log p(y)."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(samples) % 3
    centers = torch.tensor([[0.0, 1.0], [-0.9, -0.5], [0.9, -0.5]]).double()
    X = centers[y] + 0.5 * torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    loss, looked_at = nn.CrossEntropyLoss(reduction="sum"), torch.tensor([[0, 1.5], [0, 8.0]])
    return Task(_net(2, 3), X, y, loss, looked_at.double(), "classification")


def _net(inputs: int, outputs: int) -> nn.Sequential:
    """Return a small net with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs))
    return net.double()


def fitted(task: Task, prior_precision: float, updates: int) -> Posterior:
    """Fit the net with the prior's penalty ½ τ ‖θ‖², and return the posterior there."""
    model_fn, params = as_function(task.net)
    data = task.X, task.y, task.loss
    result = fit(model_fn, params, *data, weight_decay=prior_precision, max_updates=updates)
    task.net.load_state_dict(result.params, strict=False)
    return posterior(model_fn, result.params, *data, prior_precision)


def log_likelihood(task: Task, outputs: Tensor) -> float:
    """Return the log-likelihood of all data, with the constant of the normal distribution."""
    if task.likelihood == "classification":
        return -float(task.loss(outputs, task.y))
    squares = (outputs - task.y).square().sum() / (2 * NOISE**2)
    return -float(squares) - len(task.y) * math.log(NOISE * math.sqrt(2 * math.pi))


def last_layer(task: Task, prior_precision: float) -> Posterior:
    """Return the posterior of the last layer, with the layers before it as they are fitted."""
    net = copy.deepcopy(task.net)
    net[:-1].requires_grad_(False)
    model_fn, params = as_function(net)
    return posterior(model_fn, params, task.X, task.y, task.loss, prior_precision)


def compared(task: Task, laplace: Posterior) -> None:
    """Print by how much laplace-torch differs for the same net."""
    from laplace import Laplace  # noqa: PLC0415 - the example runs without it
    from torch.utils.data import DataLoader, TensorDataset  # noqa: PLC0415

    loader = DataLoader(TensorDataset(task.X, task.y), len(task.X))
    options: dict[str, Any] = {"prior_precision": laplace.prior_precision}
    if task.likelihood == "regression":
        options["sigma_noise"] = NOISE
    likelihood = log_likelihood(task, laplace.model_fn(laplace.mean, task.X))
    # It has ten directions in its low-rank form; they are the Hessian's, not those of the GGN.
    data = laplace.model_fn, laplace.mean, task.X, task.y, task.loss
    ten = posterior(*data, laplace.prior_precision, select=top_k(10))
    last = last_layer(task, laplace.prior_precision)
    ways = (("all", "full", laplace), ("all", "lowrank", ten), ("last_layer", "full", last))
    for subset, structure, ours in ways:
        # The same net, the same prior: covariances of outputs, and the evidence.
        begin, net = process_time(), copy.deepcopy(task.net)
        peer = Laplace(net, task.likelihood, subset, structure, **options)
        peer.fit(loader)
        _, theirs = peer._glm_predictive_distribution(task.looked_at)
        evidence, seconds = float(peer.log_marginal_likelihood()), process_time() - begin
        begin = process_time()
        covariance = output_covariance(ours, task.looked_at)
        spent = process_time() - begin
        difference = float((theirs - covariance).abs().max() / covariance.abs().max())
        gap = evidence - log_evidence(ours, likelihood, ours.prior_precision)
        print(f"  laplace-torch, {subset}, {structure}: covariance {difference:.1e}", end=", ")
        print(f"log evidence {gap:.1e} apart; {seconds:.2f} s, covariance here {spent:.2f} s")


def main(updates: int = 200, peers: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Fit both nets, and return their posteriors and what these say."""
    found = {}
    for task in (regression(), classification()):
        # The posterior, the prior's precision of the highest evidence, and outputs there.
        laplace = fitted(task, 1.0, updates)
        precision = likeliest_precision(laplace)
        outputs = laplace.model_fn(laplace.mean, task.looked_at)
        covariance = output_covariance(laplace._replace(prior_precision=precision), task.looked_at)
        deviations = covariance.diagonal(dim1=1, dim2=2).sqrt()
        found[task.likelihood] = {
            "posterior": laplace,
            "precision": precision,
            "deviations": deviations,
            "probabilities": probit(outputs, covariance),
        }
        print(f"{task.likelihood}: {len(laplace.evals)} directions, precision {precision:.3g}")
        for x, output, deviation in zip(task.looked_at, outputs, deviations, strict=True):
            shown = [f"{o:.2f} ± {d:.2f}" for o, d in zip(output, deviation, strict=True)]
            print(f"  at {x.tolist()}: {', '.join(shown)}")
        if "laplace-torch" in peers:
            compared(task, laplace)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--laplace", action="store_true", help="compare with laplace-torch")
    options = parser.parse_args()
    if options.laplace:
        torch.set_default_dtype(torch.float64)  # else laplace-torch rounds its matrix to float32
    main(peers=("laplace-torch",) * options.laplace)
