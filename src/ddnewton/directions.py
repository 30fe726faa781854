"""The directions that are kept, and the slopes and curvatures of the samples along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ddnewton.derivatives import Derivatives, first_derivatives, second_derivatives
from ddnewton.groups import Block
from ddnewton.problem import Problem, System
from ddnewton.select import Directions, Leading, keep
from ddnewton.spectrum import Spectrum, decompose
from ddnewton.unseen import unseen_slopes


class Along(NamedTuple):
    """A block with its directions, and what is known along them."""

    block: Block
    spectrum: Spectrum
    kept: Directions
    derivatives: Derivatives


def directions_of(problem: Problem, systems: Sequence[System], *, few: bool = False) -> list[Along]:
    """Return the directions that every block keeps; no other eigenpairs if a ``few`` will do."""
    spectra, kept = [], []
    for block, system in zip(problem.blocks, systems, strict=True):
        leading = block.select.k if few and isinstance(block.select, Leading) else None
        spectra.append(decompose(*system, leading))
        kept.append(keep(spectra[-1], block.select, problem.dtype))
    derivatives = _derivatives(problem, systems, kept)
    return list(map(Along, problem.blocks, spectra, kept, derivatives))


def _derivatives(
    problem: Problem,
    systems: Sequence[System],
    kept: Sequence[Directions],
) -> list[Derivatives]:
    """Return the derivatives of the samples asked for, in their order."""
    gammas = [first_derivatives(each.slopes, problem.slopes) for each in kept]
    seen = [each.slopes[: len(problem.weights)] for each in kept]
    lambdas = [second_derivatives(slopes, problem.curvatures) for slopes in seen]
    if problem.unseen is not None:
        unseen = unseen_slopes(problem, problem.unseen, systems, kept)
        further = [second_derivatives(slopes, problem.unseen.curvatures) for slopes in unseen]
        lambdas = [torch.cat(pair) for pair in zip(lambdas, further, strict=True)]
    rows = [slice(None) if row is None else row for row in problem.rows]
    pairs = zip(gammas, lambdas, strict=True)
    return [Derivatives(gamma[rows[0]], curvature[rows[1]]) for gamma, curvature in pairs]
