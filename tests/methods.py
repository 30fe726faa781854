"""Every method there is, each with what the suites that run over all of them need to know of it.

A new adaptation, damping rule, selection, loss or kind of curvature is entered here alone: the
suites take theirs from these tables, and test_methods.py fails where a public one is missing. The
models are the PROBLEMS of models.py.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddnewton import (
    above,
    clipped,
    criteria,
    empirical_fisher,
    energy,
    fisher,
    fixed,
    held_out,
    levenberg_marquardt,
    majorized,
    monte_carlo,
    spring,
    top_k,
    trust_region,
    weighted,
    with_curvature,
)
from ddnewton.damping import bootstrap, constant, relative, signal_to_noise
from tests.models import problem
from tests.reference import Dense, dense

FLOAT32, FLOAT64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])

SMALL_AND_LARGE = ["relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points"]
"""Problems with fewer and with more columns NM than parameters D, with both kinds of M."""


@cache
def truth(name: str) -> Dense:
    """The dense reference of a problem of models.py."""
    return dense(*problem(name))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- how the damping of all directions follows the steps ---------------------------------------


class Adaptation(NamedTuple):
    make: Callable[[], Any]  # what the optimizers take as damping
    function: Callable[..., Any] | None = None  # the public function that makes it
    adapts: bool = False  # a step that is not taken is tried again, shorter
    whole_batch: bool = True  # all samples make the step, so that it ends at their minimum
    starts_anew: bool = False  # where there is nothing to gain, and has no control until then


ADAPTATIONS = {
    "number": Adaptation(lambda: 0.1),
    "fixed": Adaptation(lambda: fixed(constant(0.1)), fixed),
    "levenberg_marquardt": Adaptation(levenberg_marquardt, levenberg_marquardt, adapts=True),
    "trust_region": Adaptation(trust_region, trust_region, adapts=True, starts_anew=True),
    "spring": Adaptation(spring, spring, adapts=True),
    "held_out": Adaptation(
        partial(held_out, every=2), held_out, adapts=True, whole_batch=False
    ),
}  # fmt: skip

SPELLINGS = {
    "none": lambda: None,
    "tensor": lambda: torch.tensor(0.05),
    "rule": lambda: relative(0.3),
    "adapted on a rule": lambda: levenberg_marquardt(rule=signal_to_noise(0.1)),
}
"""Other ways to say one of these, each of which needs a run and no suite."""


# --- how single directions are damped ----------------------------------------------------------


class Rule(NamedTuple):
    make: Callable[[], Any]  # anew, for some draw
    function: Callable[..., Any] | None = None  # the public function that makes it
    spread: bool = False  # needs two samples, which may differ
    draws: bool = False


GRID = [0.0, 0.01, 0.1, 0.5, 1.0, 3.0, 10.0, math.inf]


def from_noise(evals, evecs, gammas, lambdas):
    """A user's rule, which looks at every sample."""
    return 0.1 + lambdas.square().mean(0).sqrt() + gammas.square().mean(0).sqrt()


RULES = {
    "constant": Rule(partial(constant, 0.2), constant),
    "relative": Rule(partial(relative, 0.1), relative),
    "signal_to_noise": Rule(signal_to_noise, signal_to_noise, spread=True),
    "bootstrap": Rule(lambda: bootstrap(GRID, seeded(), resamples=50), bootstrap, draws=True),
    "user's": Rule(lambda: from_noise),
}


# --- which directions are taken ----------------------------------------------------------------


class Selection(NamedTuple):
    select: Any  # what a step takes
    reference: Any  # the same for the dense reference, in words of its own where it has some
    function: Callable[..., Any] | None = None  # the public function that makes it


def _by_user(select) -> Selection:
    return Selection(select, select)


SELECTIONS = {
    "all": Selection(None, None),
    "top_k": Selection(top_k(3), lambda evals: range(len(evals) - 3, len(evals)), top_k),
    "top_1": Selection(top_k(1), lambda evals: [len(evals) - 1], top_k),
    "above": Selection(above(0.05), lambda evals: evals > 0.05 * evals[-1], above),
    "above_absolute": Selection(above(0.02, relative=False), lambda evals: evals > 0.02, above),
    "energy": Selection(
        energy(0.9),
        lambda evals: evals.flip(0).cumsum(0).flip(0) - evals < 0.9 * evals.sum(),
        energy,
    ),
    "list": _by_user(lambda evals: [len(evals) - 1, len(evals) - 3]),
    "permuted": _by_user(lambda evals: [len(evals) - 2, len(evals) - 1, len(evals) - 3]),
    "tensor": _by_user(lambda evals: torch.tensor([len(evals) - 2, len(evals) - 1])),
    "negative": Selection(
        lambda evals: torch.tensor([-1, -3]), lambda evals: [len(evals) - 1, len(evals) - 3]
    ),
    "mask": _by_user(lambda evals: (evals > 0.02 * evals[-1]) & (evals < 0.7 * evals[-1])),
    "nothing": _by_user(lambda evals: []),
    "no_mask": _by_user(lambda evals: torch.zeros(len(evals), dtype=torch.bool)),
}
READY_MADE = {
    one.function.__name__: one.select for one in reversed(SELECTIONS.values()) if one.function
}
"""One of each of the library's, for suites in which a user's would say nothing new."""


# --- the losses --------------------------------------------------------------------------------


class TorchLoss(NamedTuple):
    """A loss in closed form of five samples with three outputs."""

    module: Callable[..., Any]
    function: Callable[..., Any]
    record: Callable[..., Any]
    y: Tensor | tuple[Tensor, Tensor]
    columns: int = 3  # M, of every sample
    draws: bool = True  # is a likelihood, so that targets can be drawn from it
    curved: bool = True  # wherever it has a slope, so that its directions hold all of the gradient

    def plain(self, reduction: str = "mean") -> Callable[..., Any]:
        """A function of outputs and targets, for the dense reference."""
        if isinstance(self.y, tuple):
            return lambda f, y: self.function(f, *y, reduction=reduction)
        return lambda f, y: self.function(f, y, reduction=reduction)


CLASSES = torch.tensor([0, 2, 1, 1, 0])
PROBABILITIES = torch.tensor(
    [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2], [0.0, 0.5, 0.5]]
)
UNIT_INTERVAL = torch.linspace(0, 1, 15).reshape(5, 3)
REALS = 3 * UNIT_INTERVAL - 1

TORCH_LOSSES = {
    "mse": TorchLoss(nn.MSELoss, F.mse_loss, criteria.mse, REALS),
    "huber": TorchLoss(
        nn.HuberLoss, F.huber_loss, criteria.huber, REALS, draws=False, curved=False
    ),
    "smooth_l1": TorchLoss(
        nn.SmoothL1Loss, F.smooth_l1_loss, criteria.smooth_l1, REALS, draws=False, curved=False
    ),
    "classes": TorchLoss(
        nn.CrossEntropyLoss, F.cross_entropy, criteria.cross_entropy, CLASSES, columns=2
    ),
    "probabilities": TorchLoss(
        nn.CrossEntropyLoss, F.cross_entropy, criteria.cross_entropy, PROBABILITIES, columns=2
    ),
    "bce": TorchLoss(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        criteria.bce_with_logits,
        UNIT_INTERVAL,
    ),
    "poisson": TorchLoss(
        nn.PoissonNLLLoss, F.poisson_nll_loss, criteria.poisson_nll, (4 * UNIT_INTERVAL).round()
    ),
    "gaussian": TorchLoss(
        nn.GaussianNLLLoss,
        F.gaussian_nll_loss,
        criteria.gaussian_nll,
        (REALS, UNIT_INTERVAL + 0.2),
    ),
}


OWN_LOSSES = {criteria.heteroscedastic_nll: "test_fisher.py"}
"""Those that torch does not have in this form, and where their cases are."""


# --- what curvature is made of a loss ----------------------------------------------------------


class Curvature(NamedTuple):
    make: Callable[[Any, int], Any]  # of a criterion and a seed
    function: Callable[..., Any] | None = None  # the public function that makes it
    draws: bool = False


CURVATURES = {
    "exact": Curvature(lambda criterion, seed: criterion),
    "convex": Curvature(lambda criterion, seed: criteria.convex(criterion), criteria.convex),
    "empirical_fisher": Curvature(
        lambda criterion, seed: empirical_fisher(criterion), empirical_fisher
    ),
    "monte_carlo": Curvature(
        lambda criterion, seed: monte_carlo(criterion, 1, seeded(seed)), monte_carlo, draws=True
    ),
    "weighted": Curvature(lambda criterion, seed: weighted(criterion, 2.0), weighted),
    "fisher": Curvature(lambda criterion, seed: fisher(criterion), fisher),
    "clipped": Curvature(lambda criterion, seed: clipped(criterion), clipped),
    "with_curvature": Curvature(
        lambda criterion, seed: with_curvature(criterion, empirical_fisher(criterion)),
        with_curvature,
    ),
}

OF_RESIDUALS = {
    "majorized": Curvature(lambda criterion, seed: majorized(criterion), majorized),
}
"""Those that take no other loss than one of residuals, with suites of their own."""
