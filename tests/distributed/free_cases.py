"""Criteria, batches and what is made of them by products, on one process and on several ranks."""

import contextlib
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed import group

from ddnewton import (
    clipped,
    criteria,
    directional_derivatives,
    directional_newton,
    empirical_fisher,
    fisher,
    ggn_eigh,
    majorized,
    monte_carlo,
    newton_step_and_info,
    prepare,
    weighted,
    with_curvature,
)
from ddnewton.criteria import hessian_products
from ddnewton.inputs import memory
from ddnewton.linearize import precision
from ddnewton.quadratic import gauss_newton
from ddnewton.quadratic.arguments import arguments_of
from ddnewton.quadratic.matrix_free.free_model import free_model, operator_of
from ddnewton.quadratic.matrix_free.ways import on_all_ranks
from ddnewton.quadratic.trial_loss import trial_of
from ddnewton.trees import take, tree_leaves

N, IN, HIDDEN, OUT = 12, 3, 4, 4
FLOAT64 = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


X = drawn(N, IN)
PARAMS = {"a": drawn(IN, HIDDEN, seed=1), "b": drawn(HIDDEN, OUT, seed=2)}
REAL = drawn(N, OUT, seed=3)
LABELS = torch.arange(N) % OUT
TOKENS = torch.arange(2 * N).reshape(N, 2) % 2
MISSING = torch.where(torch.arange(N)[:, None] == 8, torch.nan, REAL)
WEIGHTS = REAL.abs() + 0.1


def net(params, X):
    return torch.tanh(X @ params["a"]) @ params["b"]


def sequences(params, X):
    """Two positions of two classes, the classes on axis 1."""
    return net(params, X).reshape(-1, 2, 2)


def log_cosh(outputs, y):
    return torch.cosh(outputs - y).log().mean()


def valid_mean(outputs, y):
    return (outputs - y)[~y.isnan()].square().mean()


def weighted_mean(outputs, y):
    target, weight = y
    return (weight * (outputs - target).square()).sum() / weight.sum()


def squares_of_pairs(outputs, y):
    return (outputs - y[0]).square().mean()


def waves(outputs, y):
    return (1 - torch.cos(outputs - y)).sum()


def of_first(outputs, y):
    return (outputs - y).square().mean()


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


class Given(NamedTuple):
    """A model, its parameters, and a function that makes the criterion anew."""

    model_fn: Any
    params: Any
    make: Any


class Case(NamedTuple):
    make: Any  # of the criterion, anew
    y: Any
    there: bool = True  # whether losses stay where the samples are
    model_fn: Any = net
    divisible: bool = True  # whether a part of the samples may be tried by itself


CASES = {
    "squares": Case(nn.MSELoss, REAL),
    "sum of squares": Case(partial(nn.MSELoss, reduction="sum"), REAL),
    "weights of entries": Case(
        partial(criteria.mse, weight=WEIGHTS), REAL, there=False, divisible=False
    ),
    "huber": Case(nn.HuberLoss, REAL),
    "classes": Case(nn.CrossEntropyLoss, LABELS),
    "weighted classes": Case(
        partial(
            nn.CrossEntropyLoss,
            weight=torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=FLOAT64),
            ignore_index=1,
        ),
        LABELS,
    ),
    "a part without labels": Case(
        partial(nn.CrossEntropyLoss, ignore_index=0),
        torch.where(torch.arange(N) < 7, 0, LABELS),
    ),
    "positions": Case(nn.CrossEntropyLoss, TOKENS, model_fn=sequences),
    "logits": Case(nn.BCEWithLogitsLoss, (REAL > 0).double()),
    "variances": Case(nn.GaussianNLLLoss, (REAL, WEIGHTS)),
    "function": Case(lambda: log_cosh, REAL),
    "valid mean": Case(lambda: valid_mean, MISSING, there=False),
    "weighted mean": Case(lambda: weighted_mean, (REAL, WEIGHTS), there=False),
    "weights of parts": Case(
        lambda: weighted_mean,
        (REAL, torch.where(torch.arange(N) < 6, 1.0, 2.0)[:, None].expand(N, OUT).double()),
        there=False,
    ),
    "empirical_fisher": Case(lambda: empirical_fisher(nn.MSELoss()), REAL),
    "empirical_fisher of a weighted mean": Case(
        lambda: empirical_fisher(weighted_mean), (REAL, WEIGHTS), there=False
    ),
    "weighted": Case(lambda: weighted(nn.CrossEntropyLoss(), 2.5), LABELS),
    "weighted weighted mean": Case(
        lambda: weighted(weighted_mean, 2.5), (REAL, WEIGHTS), there=False
    ),
    "majorized with a kink": Case(lambda: majorized(nn.L1Loss()), REAL, there=False),
    "majorized": Case(lambda: majorized(nn.HuberLoss()), REAL, there=False),
    "clipped": Case(lambda: clipped(waves), REAL),
    "fisher": Case(lambda: fisher(of_first), REAL),
    "with_curvature": Case(lambda: with_curvature(nn.L1Loss(), nn.MSELoss()), REAL),
    "with_curvature of other counts": Case(
        lambda: with_curvature(nn.CrossEntropyLoss(ignore_index=1), nn.CrossEntropyLoss()),
        LABELS,
        there=False,
    ),
    "with_curvature of a weighted mean": Case(
        lambda: with_curvature(squares_of_pairs, weighted_mean), (REAL, WEIGHTS), there=False
    ),
    "with_curvature and a part without labels": Case(
        lambda: with_curvature(
            nn.CrossEntropyLoss(ignore_index=0), fisher(nn.CrossEntropyLoss(ignore_index=0))
        ),
        torch.where(torch.arange(N) < 7, 0, LABELS),
        there=False,
    ),
    "drawn squares": Case(lambda: monte_carlo(nn.MSELoss(), 2, seeded()), REAL),
    "drawn classes": Case(lambda: monte_carlo(nn.CrossEntropyLoss(), 2, seeded()), LABELS),
    "drawn positions": Case(
        lambda: monte_carlo(nn.CrossEntropyLoss(), 1, seeded()), TOKENS, model_fn=sequences
    ),
    "drawn sequences": Case(
        lambda: monte_carlo(nn.CrossEntropyLoss(), 2, seeded(), per="sequence"),
        TOKENS,
        model_fn=sequences,
    ),
    "drawn and weighted": Case(
        lambda: weighted(monte_carlo(nn.BCEWithLogitsLoss(), 1, seeded()), 3.0),
        (REAL > 0).double(),
    ),
    "drawn metric": Case(
        lambda: with_curvature(nn.L1Loss(), monte_carlo(nn.MSELoss(), 1, seeded())), REAL
    ),
}

SAMPLES = {
    "all": {},
    "gradient": {"subsampling_grad": [10, 0, 4, 3]},
    "directions": {"subsampling_ggn": [11, 1, 2, 6, 0]},
    "one part": {"subsampling_grad": [1, 0], "subsampling_ggn": [1, 0]},
    "curvatures": {
        "subsampling_grad": [2, 3, 9],
        "subsampling_ggn": [11, 7, 0],
        "subsampling_curvature": [5, 4],
    },
}


def cut(tree, bounds):
    """The samples of every rank."""
    return [take(tree, slice(a, b)) for a, b in pairwise(bounds)]


def parts_of(name, bounds):
    return list(zip(cut(X, bounds), cut(CASES[name].y, bounds), strict=True))


def observed(rank, name, options, X, y, alone=False):
    """What is made of a term by products: of its losses, and of the operator along both leaves."""
    case = CASES[name]
    arguments = arguments_of(
        *(case.model_fn, PARAMS, X, y, case.make()),
        gram="free",
        process_group=None if alone else group.WORLD,
        **options,
    )
    numbers = on_all_ranks(arguments, partial(of_model, case.divisible), "observed")
    sent = {} if arguments.team is None else dict(arguments.team.wire.traffic)
    return numbers, sent


def of_model(divisible, arguments):
    """Every number that a step by products may be made of."""
    with free_model(arguments) as model:
        operator = operator_of(model, (1, 0))
        vectors, scale = drawn(3, operator.d, seed=4), drawn(operator.d, seed=6).abs()
        weights, (term,) = drawn(2, operator.i, seed=5), model.terms
        moved = [leaf + 0.1 * drawn(*leaf.shape, seed=8) for leaf in tree_leaves(PARAMS)]
        numbers = {
            "loss": model.loss,
            "losses": term.losses,
            "losses of the gradient": term.losses_of_gradient,
            "steepness": term.steepness,
            "rounding": term.rounding,
            "square": torch.tensor(model.square, dtype=FLOAT64),
            "product": operator.product(vectors),
            "in units": operator.in_units(scale).product(vectors),
            "gradient": operator.gradient(),
            "curvatures": operator.curvatures(vectors),
            "moved": trial_of(term, moved, None).loss,
            **operator.derivatives(vectors)._asdict(),
        }
        if divisible:
            numbers["moved in part"] = trial_of(term, moved, torch.tensor([9, 1, 0])).loss
        if operator.has_columns:
            # Columns may be others with the same products.
            back = operator.to_parameters(operator.to_columns(vectors))
            numbers |= {"back": back, "to_parameters": operator.to_parameters(weights)}
        facts = model.spans, operator.i, operator.has_columns, model.dtype, model.sizes
        return numbers, [*facts, term.is_one_sample, term.is_uncurved.tolist()]


def log_coshes():
    return log_cosh


def valid_squares():
    return valid_mean


def weighted_squares():
    return weighted_mean


def squared(params, X):
    return net(params, X).square()


def of_complex(params, X):
    """Complex outputs of a complex and a real parameter."""
    return (X.to(params["c"]) @ params["c"]) * (1 + params["r"])


def distance(outputs, y):
    return (outputs - y).abs().square().mean()


def complex_squares():
    return distance


def constant_net(params, X):
    return X[:, :1] * 2.0


def fails_on_one(params, X):
    """Outputs that are not finite where the first input is above 1.5."""
    return net(params, X) + torch.where(X[:, :1] > 1.5, torch.inf, 0.0)


class Doubled(torch.autograd.Function):
    """Twice a number, whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def once(params, X):
    return Doubled.apply(net(params, X))


def bent(outputs, y):
    """A loss that is convex where y is below one."""
    return (torch.where(y < 1, 1.0, -1.0) * outputs.square()).sum(1).mean()


def bent_squares():
    return bent


def refined(rank, given, options, X, y, alone=False):
    """A step of a model that is not taken in float64 from the start."""
    with mock.patch.object(precision, "CHEAP_FLOPS", 0):
        return told(rank, given, options, X, y, alone)


def by_products_alone(rank, given, options, X, y, alone=False):
    """A step with a loss of which no Hessian is decomposed."""
    with mock.patch.object(hessian_products, "DENSE_ENTRIES", 0):
        return told(rank, given, options, X, y, alone)


def where_nothing_fits(rank, given, options, X, y, alone=False):
    """A step with so little memory that matrices do not fit."""
    with contextlib.ExitStack() as stack:
        for module in (memory, gauss_newton):
            stack.enter_context(mock.patch.object(module, "NEVER_ASKED_BYTES", 0))
        stack.enter_context(mock.patch.object(memory, "free_bytes", return_value=2**13))
        return told(rank, given, options, X, y, alone)


def with_layers(rank, given, options, X, y, alone=False):
    """A step of a model that has been prepared with samples of the same form."""
    prepared = prepare(given.model_fn, given.params, drawn(2, IN))
    return told(rank, given._replace(model_fn=prepared), options, X, y, alone)


def told(rank, given, options, X, y, alone=False):
    """A step and its record."""
    return newton_step_and_info(
        *(given.model_fn, given.params, X, y, given.make()),
        process_group=None if alone else group.WORLD,
        **options,
    )


def pairs_told(rank, given, options, X, y, alone=False):
    """Eigenpairs, and the derivatives along them, of all groups."""
    return [
        function(
            *(given.model_fn, given.params, X, y, given.make()),
            process_group=None if alone else group.WORLD,
            gram="free",
            **options,
        )
        for function in (ggn_eigh, directional_derivatives)
    ]


def updated(rank, given, options, X, y, alone=False):
    """Parameters and records after some updates by products."""
    optimizer = directional_newton(
        *(given.model_fn, given.make()),
        gram="free",
        tol=1e-14,
        process_group=None if alone else group.WORLD,
        **options,
    )
    params, state, infos = given.params, optimizer.init(given.params), []
    for _ in range(2):
        params, state, info = optimizer.update(params, state, X, y)
        infos.append(info._asdict())
    return params, infos
