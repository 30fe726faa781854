"""What the tests of a step share: its references, and losses written by hand."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from ddnewton import newton_step
from tests.methods import FLOAT32, FLOAT64
from tests.models import Problem, cast, problem

TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-11}


def captured(name: str, dtype=FLOAT64, **options):
    """The four arguments that a damping rule is called with."""
    seen = []

    def rule(*arguments):
        seen.append(arguments)
        return torch.ones_like(arguments[0])

    newton_step(*problem(name, dtype), rule, **options)
    return seen[-1]


def curvature_damping(evals, evecs, gammas, lambdas):
    """A rule that needs every argument that does not depend on a sign or a root."""
    return 0.1 + lambdas.square().mean(0).sqrt() + gammas.square().mean(0).sqrt() + 0.1 * evals


def indices(choice) -> list[int]:
    """A choice as a list, whether it came as a list, a tensor of indices or a mask."""
    choice = torch.as_tensor(choice)
    return (choice.nonzero()[:, 0] if choice.dtype == torch.bool else choice).tolist()


def reduced(values, reduction):
    return values.mean() if reduction == "mean" else values.sum()


def log_cosh(f, y, reduction):
    z = f - y
    return reduced(z.abs() + F.softplus(-2 * z.abs()) - math.log(2), reduction)


def huber(f, y, reduction):
    """Flat Hessian and a slope of ±1 further than 1 from the target."""
    return F.huber_loss(f, y, reduction=reduction)


def softplus_hinge(f, y, reduction):
    return reduced(F.softplus(1 - f * y.sign()), reduction)


def poisson_nll(f, y, reduction):
    return F.poisson_nll_loss(f, y.abs(), reduction=reduction)


def euclidean(f, y, reduction):
    """Flat along the line to the target, where its slope is 1."""
    return reduced((f - y).square().sum(-1).sqrt(), reduction)


def log_sum_exp(f, y, reduction):
    """Flat along (1, …, 1), where its slope is 1."""
    return reduced((f - y).logsumexp(-1), reduction)


def smoothed(f, y, reduction):
    """Cross-entropy of labels that are made from y, inside a callable."""
    return F.cross_entropy(f, y.argmax(1), label_smoothing=0.1, reduction=reduction)


CALLABLES = [log_cosh, huber, softplus_hinge, poisson_nll, smoothed, euclidean, log_sum_exp]


def with_callable(function, reduction: str, dtype) -> Problem:
    y = torch.tensor([2.0, -1.5, 0.3]).repeat(5, 1) * torch.linspace(0.1, 1.3, 5)[:, None]
    return problem("relu_mlp", dtype)._replace(
        y=cast(y, dtype), criterion=partial(function, reduction=reduction)
    )


def ensemble(name: str, dtype, members: int = 3):
    """The first of some problems, and the parameters of all of them, stacked and apart."""
    problems = [problem(name, dtype, seed) for seed in range(members)]
    apart = [p.params for p in problems]
    return problems[0], tree_map(lambda *leaves: torch.stack(leaves), *apart), apart
