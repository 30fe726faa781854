"""Steps in loops, whose slopes, directions and curvatures come from samples of their own."""

from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from ddnewton import ggn_eigh
from tests.methods import FLOAT32, FLOAT64, truth
from tests.models import Problem
from tests.reference import Dense, eigenpairs, error, rank

TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-10}
OPTIONS = ("subsampling_grad", "subsampling_ggn", "subsampling_curvature")

SUBSETS = {
    "every": None,
    "two": [0, 1],
    "permuted": [3, 0, 4, 2, 1],
    "single": [2],
    "whole": "all of the batch, in order",
    "negative": [-1, -3],
}
"""Every problem below has at least five samples."""


class Choice(NamedTuple):
    """Samples for the slopes, the directions and the curvatures."""

    grad: object = None
    ggn: object = None
    curvature: object = None

    @property
    def options(self) -> dict:
        given = zip(OPTIONS, self, strict=True)
        return {name: subset for name, subset in given if subset is not None}

    @property
    def of_the_ggn(self) -> dict:
        return {} if self.ggn is None else {"subsampling_ggn": self.ggn}


class Truth(NamedTuple):
    """Along the vectors that `ggn_eigh` returns, which must be what they say they are."""

    evals: torch.Tensor
    vectors: torch.Tensor
    gammas: torch.Tensor
    lambdas: torch.Tensor
    gradient: torch.Tensor
    ggn: torch.Tensor

    def step(self, dampings, complement=None) -> torch.Tensor:
        c, P = self.coefficients(dampings), self.vectors @ self.vectors.mT
        rest = self.gradient - P @ self.gradient
        return self.vectors @ c - (0 if complement is None else rest / complement)

    def coefficients(self, dampings) -> torch.Tensor:
        damped = self.lambdas.mean(0) + dampings
        return torch.where(damped > 0, -self.gammas.mean(0) / damped, 0)


def some(reference: Dense, subset) -> Dense:
    """The same samples' losses, at the scale they have in the whole batch, and no others."""
    if subset is None:
        return reference
    index = torch.as_tensor(subset)
    parts = (part[index] for part in reference[1:])
    return Dense(reference.loss, *parts)


def rows(evecs) -> torch.Tensor:
    """The vectors of a pytree with K in front, [D, K] in float64."""
    vectors = [leaf.double().reshape(len(leaf), leaf.sum(0).numel()) for leaf in tree_leaves(evecs)]
    return torch.cat(vectors, 1).mT


def along(reference: Dense, E, choice: Choice, evals) -> Truth:
    """What the textbook says of the samples along some vectors."""
    slopes, curved = some(reference, choice.grad), choice.curvature
    held = some(reference, choice.ggn if curved is None else curved)
    changes = held.jacobians @ E
    return Truth(
        evals=evals,
        vectors=E,
        gammas=slopes.gradients @ E,
        lambdas=torch.einsum("nck,ncd,ndk->nk", changes, held.hessians, changes),
        gradient=slopes.gradient,
        ggn=some(reference, choice.ggn).ggn,
    )


def truth_of(given: Problem, reference: Dense, choice: Choice, tolerance=1e-10, **options) -> Truth:
    """Check the vectors that ddnewton says it takes, and take them for the reference."""
    evals, evecs = ggn_eigh(*given, **choice.of_the_ggn, **options)
    E, mine = rows(evecs), some(reference, choice.ggn)
    if options.get("select") is None:
        assert len(evals) == rank(eigenpairs(mine)[0])
    assert error(E.mT @ E, torch.eye(E.shape[1], dtype=FLOAT64)) < tolerance
    assert error(mine.ggn @ E, E * evals.double()) < tolerance
    return along(reference, E, choice, evals)


def check_info(info, expected: Truth, delta: float, reference: Dense, tolerance: float) -> None:
    """Every field, from the textbook's numbers alone."""
    gamma, curvature = expected.gammas.mean(0), expected.lambdas.mean(0)
    c = expected.coefficients(delta)
    fields = {
        "loss": reference.loss,
        "evals": expected.evals,
        "gammas": expected.gammas,
        "lambdas": expected.lambdas,
        "dampings": torch.full_like(c, delta),
        "coefficients": c,
        "predicted_decrease": -c * gamma - curvature * c**2 / 2,
        "gradient_norm": expected.gradient.norm(),
        "gradient_share": gamma.square().sum() / expected.gradient.square().sum(),
    }
    for field, value in fields.items():
        assert error(getattr(info, field), value) < tolerance, field
    assert info.rank.dtype == torch.int64


def numbers(subset, name: str):
    """A subset with a word for all samples spelled out."""
    return list(range(len(truth(name).slopes))) if isinstance(subset, str) else subset


def refuse(*_):
    raise AssertionError("the other way was to be taken")


def no_forward_mode(*_):
    raise NotImplementedError("no forward mode")


CHOICES = {
    "grad": Choice(grad=[4, 1]),
    "ggn": Choice(ggn=[3, 0, 1]),
    "curvature": Choice(curvature=[2, 0]),
    "apart": Choice([1, 0], [2, 4], [3]),
    "overlapping": Choice([0, 1, 4], [1, 2, 0], [2, 3, 1]),
    "half unbiased": Choice([1, 4], [2, 0, 3], [1, 4]),
}
