"""What the tests of eigenpairs share: problems, selections, and how pairs are compared."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from ddnewton import (
    directional_derivatives,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
)
from tests.methods import FLOAT32, FLOAT64
from tests.models import PROBLEMS
from tests.reference import Dense, error

TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-10}
ALL_MODELS = pytest.mark.parametrize("name", PROBLEMS)
FUNCTIONS = (ggn_eigvalsh, ggn_eigh, directional_derivatives, gram_matrix)
EACH = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)

SQUARED = ["eval_batch_norm", "tanh_mlp", "tied_autoencoder", "tuple_of_two", "poisson"]
SQUARED += ["written_in_place", "many_points"]
"""Problems with a squared error, whose root L is the identity."""


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
