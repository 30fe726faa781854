"""What the tests of eigenpairs share: problems, selections, and how pairs are compared."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from ddnewton import (
    above,
    directional_derivatives,
    energy,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    top_k,
)
from tests.models import PROBLEMS, problem
from tests.reference import Dense, dense, error

FLOAT32, FLOAT64 = torch.float32, torch.float64
TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
ALL_MODELS = pytest.mark.parametrize("name", PROBLEMS)
FUNCTIONS = (ggn_eigvalsh, ggn_eigh, directional_derivatives, gram_matrix)
EACH = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)

SMALL_AND_LARGE = ["relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points"]
"""Problems with fewer and with more columns NM than parameters D, with both kinds of M."""

SQUARED = ["eval_batch_norm", "tanh_mlp", "tied_autoencoder", "tuple_of_two", "poisson"]
SQUARED += ["written_in_place", "many_points"]
"""Problems with a squared error, whose root L is the identity."""

SELECTS = {
    "all": None,
    "permuted": lambda evals: [len(evals) - 2, len(evals) - 1, len(evals) - 3],
    "negative": lambda evals: torch.tensor([-1, -3]),
    "mask": lambda evals: torch.arange(len(evals)) >= len(evals) - 3,
    "top_k": top_k(2),
    "above": above(0.1),
    "energy": energy(0.9),
    "none": lambda evals: [],
    "no mask": lambda evals: torch.zeros(len(evals), dtype=torch.bool),
}


@cache
def truth(name: str) -> Dense:
    """The dense reference of a problem."""
    return dense(*problem(name))


def rows(evecs) -> torch.Tensor:
    """The vectors of a pytree with K in front, [D, K] in float64."""
    flat = [leaf.double().reshape(len(leaf), leaf.sum(0).numel()) for leaf in tree_leaves(evecs)]
    return torch.cat(flat, 1).mT


def top(evals, count: int) -> torch.Tensor:
    """The largest eigenvalues, as many as there are to be compared, zeros in front."""
    return F.pad(evals, (max(0, count - len(evals)), 0))[-count:]


def check_eigenpairs(reference: Dense, evals, E, tolerance: float) -> None:
    """Orthonormal, and G E = E diag(λ) relative to the largest eigenvalue."""
    G = reference.ggn
    scale = torch.linalg.matrix_norm(G, 2)
    assert error(E.mT @ E, torch.eye(E.shape[1], dtype=FLOAT64)) < tolerance
    assert float((G @ E - E * evals.double()).norm()) < tolerance * scale


def check_derivatives(reference: Dense, E, derivatives, tolerance: float) -> None:
    """γ = e_kᵀ∇ℓ_n and λ = e_kᵀ J_nᵀ H_n J_n e_k along the given vectors, sign and all."""
    gammas, lambdas = derivatives
    changes = reference.jacobians @ E
    expected = torch.einsum("nck,nc->nk", changes, reference.slopes)
    assert error(gammas, expected) < tolerance
    expected = torch.einsum("nck,ncd,ndk->nk", changes, reference.hessians, changes)
    assert error(lambdas, expected) < tolerance


def picked(select, evals) -> torch.Tensor:
    """The eigenvalues that a rule asks for, in its order."""
    choice = torch.as_tensor(select(evals))
    return evals[choice if choice.dtype == torch.bool else choice.long()]
