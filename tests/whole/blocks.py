"""Blocks of the Gauss-Newton matrix in loops and without ddnewton, and problems made of blocks."""

import math
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ddnewton import Group, per_layer, per_parameter, prepare
from tests.models import PROBLEMS, Layers, Problem, normal, of_function, of_module
from tests.reference import Dense, Directions, clusters, dense, directions, eigenpairs, error, rank

FLOAT32, FLOAT64 = torch.float32, torch.float64
TOLERANCE = {FLOAT32: 1e-5, FLOAT64: 1e-9}
DELTA = 0.1
GRAMS = pytest.mark.parametrize("gram", ["dense", "structured"])

# --- problems -------------------------------------------------------------------------------


def one_weight_two_biases(dtype):
    """A weight used twice, each time with a bias of its own, and once more transposed."""

    def model_fn(p, X):
        for bias in p["biases"]:
            X = torch.tanh(F.linear(X, p["W"], bias))
        return X @ p["W"] * p["scale"]

    params = {"biases": [normal(3), normal(3)], "W": normal(3, 3), "scale": normal(3)}
    return of_function(model_fn, params, normal(4, 3), normal(4, 3), nn.MSELoss(), dtype)


def one_bias_two_weights(dtype):
    """A bias shared by layers whose weights are not."""

    def model_fn(p, X):
        return F.linear(torch.tanh(F.linear(X, p["V"], p["b"])), p["W"], p["b"])

    params = {"V": normal(3, 2), "b": normal(3), "W": normal(3, 3)}
    y = torch.tensor([0, 2, 1, 1])
    return of_function(model_fn, params, normal(4, 2), y, nn.CrossEntropyLoss(), dtype)


def one_convolution_twice(dtype):
    """A grouped convolution applied twice with different biases, then a tied linear layer."""

    def model_fn(p, X):
        X = torch.tanh(F.conv1d(X, p["kernel"], p["first"], padding=1, groups=2))
        X = torch.tanh(F.conv1d(X, p["kernel"], p["second"], padding=1, groups=2))
        return X.mean(2) @ p["head"].T @ p["head"]

    params = {
        "first": normal(4),
        "kernel": normal(4, 2, 3),
        "head": normal(3, 4),
        "second": normal(4),
    }
    return of_function(model_fn, params, normal(3, 4, 5), normal(3, 4), nn.MSELoss(), dtype)


def cut_from_one_tensor(dtype):
    """A weight and a bias that are views of one vector, next to a scalar."""

    def model_fn(p, X):
        weight, bias = p["all"][:6].view(2, 3), p["all"][6:8]
        return p["scale"] * torch.tanh(X @ weight.T + bias)

    params = {"all": normal(9), "scale": torch.tensor(0.8)}
    return of_function(model_fn, params, normal(5, 3), normal(5, 2), nn.MSELoss(), dtype)


def empty_tensors(dtype):
    """Tensors without entries before, between and after others, one of them used."""

    def model_fn(p, X):
        return torch.tanh(X @ torch.cat([p["W"], p["rows"]]).T) + p["b"]

    params = {
        "nothing": normal(0),
        "W": normal(2, 3),
        "rows": normal(0, 3),
        "b": normal(2),
        "none": normal(2, 0),
    }
    return of_function(model_fn, params, normal(4, 3), normal(4, 2), nn.MSELoss(), dtype)


def scalars(dtype):
    """Nothing but scalars, in a tuple."""

    def model_fn(p, X):
        return p[0] * torch.sin(p[1] * X) + p[2]

    params = tuple(torch.tensor(x) for x in (0.5, -1.5, 0.25))
    return of_function(model_fn, params, normal(4), normal(4), nn.MSELoss(), dtype)


def deeply_nested(dtype):
    """NamedTuples in a list in a dict."""

    def model_fn(p, X):
        for layer in p["body"]["layers"]:
            X = torch.tanh(X @ layer.code + layer.shift)
        return X @ p["head"]

    layers = [Layers(normal(3, 4), normal(4)), Layers(normal(4, 2), normal(2))]
    params = {"head": normal(2, 2), "body": {"layers": layers}}
    y = torch.rand(5, 2)
    return of_function(model_fn, params, normal(5, 3), y, nn.BCEWithLogitsLoss(), dtype)


class Normed(nn.Module):
    """Norms of every kind, an embedding, PReLU and attention with packed projections."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.first, self.second = nn.LayerNorm(4), nn.GroupNorm(2, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.bend = nn.PReLU(4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        X = self.first(self.embed(tokens))
        X = X + self.attend(X, X, X, need_weights=False)[0]
        X = self.bend(self.second(X.mT).mT.flatten(0, 1)).reshape(X.shape)
        return self.head(X.mean(1))


def packed_attention(dtype):
    tokens = torch.tensor([[1, 2, 3], [4, 0, 1], [5, 5, 2]])
    y = torch.tensor([0, 1, 1])
    return of_module(Normed(), tokens, y, nn.CrossEntropyLoss(), dtype)


OWN = (
    one_weight_two_biases,
    one_bias_two_weights,
    one_convolution_twice,
    cut_from_one_tensor,
    empty_tensors,
    scalars,
    deeply_nested,
    packed_attention,
)
BUILDERS = PROBLEMS | {build.__name__: build for build in OWN}
every_problem = pytest.mark.parametrize("name", BUILDERS)


def problem(name: str, dtype: torch.dtype = FLOAT64) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[name](dtype)


@cache
def truth(name: str) -> Dense:
    return dense(*problem(name))


@cache
def prepared(name: str, dtype: torch.dtype = FLOAT64):
    return prepare(*problem(name, dtype)[:3])


def by(gram: str, name: str, dtype: torch.dtype = FLOAT64) -> Problem:
    """A problem whose Gram matrix is formed in one of the two ways."""
    made = problem(name, dtype)
    return made if gram == "dense" else made._replace(model_fn=prepared(name, dtype))


SOME = ["attention", "convolution", "deeply_nested", "empty_tensors", "encoder_layer", "lstm",
          "more_columns_than_parameters", "one_weight_two_biases", "poisson", "tanh_mlp",
          ]  # fmt: skip
some_problems = pytest.mark.parametrize("name", SOME)

# --- blocks, in loops and without ddnewton ---------------------------------------------------


def paths_of(tree, before=()) -> list[str]:
    """Every leaf's path, keys joined by dots."""
    if isinstance(tree, Tensor):
        return [".".join(map(str, before))]
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [path for key, below in items for path in paths_of(below, (*before, key))]


def places(params, leaves) -> list[int]:
    """Where the entries of some leaves are in the vector of all parameters."""
    starts, start = [], 0
    for leaf in tree_leaves(params):
        starts.append(range(start, start + leaf.numel()))
        start += leaf.numel()
    return [place for leaf in leaves for place in starts[leaf]]


def cut(whole: Dense, params, leaves, samples=None) -> Dense:
    """A problem in some of its parameters and of its samples."""
    samples = range(len(whole.slopes)) if samples is None else samples
    jacobians = whole.jacobians[list(samples)][:, :, places(params, leaves)]
    return Dense(whole.loss, jacobians, whole.slopes[list(samples)], whole.hessians[list(samples)])


def rows(leaf: Tensor) -> Tensor:
    """A vector a row, of a leaf that may be a scalar, or have no entries."""
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))


def of_leaves(tree, leaves) -> Tensor:
    every = tree_leaves(tree)
    return torch.cat([every[leaf].reshape(-1).double() for leaf in leaves])


def apart_from(evals: Tensor, wanted: int) -> int:
    """About ``wanted`` of the largest eigenvalues, such that no two equal ones are parted."""
    bounds = [len(evals) - run.start for run in clusters(evals) if evals[run.stop - 1] > 0]
    bounds = [count for count in bounds if count <= rank(evals)]
    return min(bounds, key=lambda count: abs(count - wanted), default=1)


def largest(count: int):
    return lambda evals: range(max(0, len(evals) - count), len(evals))


class Along(NamedTuple):
    """The textbook's step in a block, and what it is made of."""

    step: Tensor
    kept: Directions
    coefficients: Tensor
    gradient: Tensor


def walk(block: Dense, damping, top=None, complement=None, slopes=None, curvatures=None) -> Along:
    """Walk along eigenvectors of a block; slopes and curvatures may be of other samples."""
    _, E, gammas, lambdas = kept = directions(block, None if top is None else largest(top))
    if slopes is not None:
        gammas = torch.stack([(J @ E).T @ r for J, r in zip(*slopes[1:3], strict=True)])
    if curvatures is not None:
        moved = [J @ E for J in curvatures.jacobians]
        squares = [((H @ x) * x).sum(0) for x, H in zip(moved, curvatures.hessians, strict=True)]
        lambdas = torch.stack(squares)
    kept = kept._replace(gammas=gammas, lambdas=lambdas)
    damped = lambdas.mean(0) + (damping(*kept) if callable(damping) else damping)
    c = torch.where(damped > 0, -gammas.mean(0) / damped, 0)
    g = (block if slopes is None else slopes).gradient
    total = E @ c
    if complement is not None:
        total = total - (g - E @ (E.T @ g)) / complement
    return Along(total, kept, c, g)


def basis_free(record, evals) -> list[Tensor]:
    """Eigenvalues, Σ γγᵀ and Σ λ of those that are equal: signs and rotations do not show."""
    equal = runs(evals)
    squares = [record.gammas[:, run] @ record.gammas[:, run].T for run in equal]
    lambdas = [record.lambdas[:, run].sum(1) for run in equal]
    return [record.evals, *(torch.stack(x) for x in (squares, lambdas) if x)]


def agree(found, true, tolerance=TOLERANCE[FLOAT64], floor=0.0) -> None:
    """Compare to within a tolerance, relative to the truth or, if that is larger, to a floor."""
    scale = max(float(true.norm()), floor)
    assert error(found, true) * float(true.norm() or 1.0) <= tolerance * (scale or 1.0)


def check_info(info, expected: Along, block: Dense, delta: float, tolerance: float) -> None:
    """Compare a block's record with the textbook's, and with itself."""
    kept, evals = expected.kept, expected.kept.evals
    for found, true in zip(basis_free(info, evals), basis_free(kept, evals), strict=True):
        agree(found, true, tolerance)
    agree(info.loss, block.loss, tolerance)
    agree(info.gradient_norm, expected.gradient.norm(), tolerance)
    agree(info.dampings, torch.full_like(evals, delta), tolerance)
    assert int(info.rank) == rank(eigenpairs(block)[0])
    gamma, curvature = info.gammas.mean(0), info.lambdas.mean(0)
    c = info.coefficients
    agree(c, -gamma / (curvature + delta), tolerance)
    agree(info.predicted_decrease, -c * (gamma + curvature * c / 2), tolerance)
    agree(c.norm(), expected.coefficients.norm(), tolerance)
    square = expected.gradient.square().sum()
    share = kept.gammas.mean(0).square().sum() / square if square else torch.tensor(1.0)
    agree(info.gradient_share, share.clamp(max=1), tolerance)


class Partition(NamedTuple):
    """Groups, and the numbers of the leaves they name."""

    groups: list[Group]
    blocks: list[list[int]]


def by_parameter(params) -> Partition:
    return Partition(per_parameter(params), [[i] for i in range(len(tree_leaves(params)))])


def by_layer(params) -> Partition:
    layers: dict[str, list[int]] = {}
    for i, path in enumerate(paths_of(params)):
        layers.setdefault(".".join(path.split(".")[:-1]), []).append(i)
    return Partition(per_layer(params), list(layers.values()))


def weights_and_biases(params) -> Partition:
    """By a predicate: what has at least two axes, and what has not."""
    paths, leaves = paths_of(params), tree_leaves(params)
    kinds = [
        [i for i, leaf in enumerate(leaves) if (leaf.ndim > 1) is yes] for yes in (True, False)
    ]
    kinds = [kind for kind in kinds if kind]
    names = [{paths[i] for i in kind} for kind in kinds]
    return Partition([Group(each.__contains__) for each in names], kinds)


def every_other(params) -> Partition:
    """Half of the parameters in one group, and the others in none."""
    chosen = list(range(0, len(tree_leaves(params)), 2))
    return Partition([Group([paths_of(params)[i] for i in chosen])], [chosen])


def from_the_end(params) -> Partition:
    """Pairs of parameters, the last first, named from the last as well."""
    numbers, paths = range(len(tree_leaves(params))), paths_of(params)
    pairs = [list(numbers[max(0, stop - 2) : stop]) for stop in range(len(numbers), 0, -2)]
    return Partition([Group(tuple(paths[i] for i in pair[::-1])) for pair in pairs], pairs)


def by_prefix(params) -> Partition:
    """By the first key of the path alone."""
    heads: dict[str, list[int]] = {}
    for i, path in enumerate(paths_of(params)):
        heads.setdefault(path.split(".")[0], []).append(i)
    return Partition([Group(head) for head in heads], list(heads.values()))


PARTITIONS = (by_parameter, by_layer, weights_and_biases, every_other, from_the_end, by_prefix)
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=lambda each: each.__name__)

# --- identities -----------------------------------------------------------------------------


def rounded(found, true):
    """Compare trees of tensors to rounding."""
    found, true = tree_leaves(found), tree_leaves(true)
    for one, other in zip(found, true, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# --- sub-sampling, Monte-Carlo, the empirical Fisher ------------------------------------------


def runs(evals: Tensor) -> list[slice]:
    """Runs of equal eigenvalues."""
    return clusters(evals) if len(evals) else []
