"""The spectra of all blocks, and the derivatives along them, from the arguments of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ddnewton.quadratic.arguments import Arguments
from ddnewton.quadratic.derivatives import Derivatives
from ddnewton.quadratic.directions import directions_of, orthonormal
from ddnewton.quadratic.flat import check_outputs_depend
from ddnewton.quadratic.quadratic_model import to_parameters
from ddnewton.quadratic.spectrum import eigenvalues
from ddnewton.quadratic.summed_model import model_and_matrices


class BlockEigenpairs(NamedTuple):
    """The kept eigenvalues of every block and their eigenvectors, and the dtype of results."""

    evals: list[Float[Tensor, " _"]]
    vectors: list[Float[Tensor, "_ _"]]
    dtype: torch.dtype


class BlockDerivatives(NamedTuple):
    """γ and λ along the directions of every block, and the dtype of results."""

    pairs: list[Derivatives]
    dtype: torch.dtype


def all_eigenvalues(arguments: Arguments) -> list[Float[Tensor, " i"]]:
    """Return the eigenvalues of all blocks, in the dtype of results."""
    with model_and_matrices(arguments, resolved=False) as (model, matrices):
        check_outputs_depend(model, matrices)
        return [eigenvalues(matrix).to(model.dtype) for matrix in matrices]


def eigenpairs(arguments: Arguments) -> BlockEigenpairs:
    """Return the eigenpairs of all blocks, by their matrices."""
    with model_and_matrices(arguments) as (model, matrices):
        check_outputs_depend(model, matrices)
        kept = [block.kept for block in directions_of(model, matrices, only_kept=True)]
        vectors = to_parameters(model, matrices, [directions.vectors.mT for directions in kept])
        vectors = [
            orthonormal(of_block, directions.evals, directions.live)
            for of_block, directions in zip(vectors, kept, strict=True)
        ]
    return BlockEigenpairs([directions.evals for directions in kept], vectors, model.dtype)


def derivatives_along(arguments: Arguments) -> BlockDerivatives:
    """Return the derivatives along the directions of all blocks, by their matrices."""
    with model_and_matrices(arguments) as (model, matrices):
        check_outputs_depend(model, matrices)
        blocks = directions_of(model, matrices, only_kept=True)
        return BlockDerivatives([block.derivatives for block in blocks], model.dtype)
