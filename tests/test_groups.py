"""Blocks of the Gauss-Newton matrix, against blocks cut from dense Jacobians, however named."""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import models
from ddnewton import (
    Group,
    above,
    directional_derivatives,
    empirical_fisher,
    energy,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    linearization,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    per_layer,
    per_parameter,
    prepare,
    top_k,
)
from models import PROBLEMS, Layers, Problem, normal, of_function, of_module
from reference import (
    Dense,
    Directions,
    clusters,
    dense,
    directions,
    eigenpairs,
    error,
    rank,
    solve,
)

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


# --- steps and records ----------------------------------------------------------------------


@GRAMS
@pytest.mark.parametrize("partition", [by_parameter, from_the_end])
@every_problem
def test_steps_and_records_are_those_of_the_dense_blocks(name, partition, gram):
    made = by(gram, name)
    groups, blocks = partition(made.params)
    cuts = [cut(truth(name), made.params, block) for block in blocks]
    s, infos = newton_step_and_info(*made, DELTA, groups=groups, gram=gram)
    assert isinstance(infos, tuple)
    for block, mine, info in zip(blocks, cuts, infos, strict=True):
        agree(of_leaves(s, block), solve(mine, DELTA))
        check_info(info, walk(mine, DELTA), mine, DELTA, TOLERANCE[FLOAT64])
    left = set(range(len(tree_leaves(s)))) - {leaf for block in blocks for leaf in block}
    assert not any(tree_leaves(s)[leaf].any() for leaf in left)
    assert error(newton_step(*made, DELTA, groups=groups, gram=gram), s) < TOLERANCE[FLOAT64]


@GRAMS
@every_problem
def test_every_group_has_a_selection_and_a_damping_of_its_own(name, gram):
    """The others follow the call's; the complement holds for all."""
    made = by(gram, name)
    blocks = by_parameter(made.params).blocks
    cuts = [cut(truth(name), made.params, block) for block in blocks]
    tops = [apart_from(eigenpairs(mine)[0], 1 + i % 3) for i, mine in enumerate(cuts)]
    deltas = [DELTA * (1 + i) for i in range(len(blocks))]
    paths = paths_of(made.params)
    groups = [
        Group(path, top_k(top) if i % 3 else None, delta if i % 2 else None)
        for i, (path, top, delta) in enumerate(zip(paths, tops, deltas, strict=True))
    ]
    options = {"select": above(0.5), "groups": groups, "gram": gram}
    for complement in (None, 0.3):
        s, infos = newton_step_and_info(*made, 0.7, complement=complement, **options)
        assert (
            error(newton_step(*made, 0.7, complement=complement, **options), s) < TOLERANCE[FLOAT64]
        )
        for i, (block, mine) in enumerate(zip(blocks, cuts, strict=True)):
            evals = eigenpairs(mine)[0]
            top = tops[i] if i % 3 else int((evals > 0.5 * evals[-1]).sum())
            top = min(top, rank(evals))
            delta = deltas[i] if i % 2 else 0.7
            expected = walk(mine, delta, top, complement)
            agree(of_leaves(s, block), expected.step)
            if top:
                check_info(infos[i], expected, mine, delta, TOLERANCE[FLOAT64])


@GRAMS
@every_problem
def test_eigenpairs_derivatives_and_gram_matrices_are_those_of_the_blocks(name, gram):
    made = by(gram, name)
    groups, blocks = by_layer(made.params)
    options = {"groups": groups, "gram": gram}
    every, pairs, alongs, grams = (
        function(*made, **options)
        for function in (ggn_eigvalsh, ggn_eigh, directional_derivatives, gram_matrix)
    )
    for results in (every, pairs, alongs, grams):
        assert isinstance(results, tuple)
        assert len(results) == len(groups)
    for block, evals, (live, vectors), along, matrix in zip(
        blocks, every, pairs, alongs, grams, strict=True
    ):
        mine = cut(truth(name), made.params, block)
        kept, true = directions(mine), eigenpairs(mine)[0]
        # Where the curvature has fewer columns than outputs, the missing eigenvalues are zero.
        agree(evals, true[len(true) - len(evals) :])
        agree(torch.linalg.eigvalsh(matrix), true[len(true) - len(evals) :], floor=1e-12)
        agree(matrix, matrix.mT, 1e-14)
        agree(live, kept.evals)
        flat = torch.cat([rows(leaf) for leaf in tree_leaves(vectors)], 1)
        inside = places(made.params, block)
        outside = sorted(set(range(flat.shape[1])) - set(inside))
        assert not flat[:, outside].any()
        E = flat[:, inside]
        agree(E @ E.T, torch.eye(len(E), dtype=FLOAT64), 1e-12)
        agree(E @ mine.ggn, live[:, None] * E)
        for run in runs(kept.evals):
            agree(E[run].T @ E[run], kept.vectors[:, run] @ kept.vectors[:, run].T, 1e-8)
        record = kept._replace(gammas=along.gammas, lambdas=along.lambdas)
        for found, expected in zip(
            basis_free(record, kept.evals), basis_free(kept, kept.evals), strict=True
        ):
            agree(found, expected)


def test_the_problems_have_blocks_with_more_and_with_fewer_parameters_than_columns():
    for name in ("relu_mlp", "convolution", "packed_attention", "tanh_mlp"):
        made = problem(name)
        columns = len(gram_matrix(*made))
        sizes = [leaf.numel() for leaf in tree_leaves(made.params)]
        assert min(sizes) < columns <= max(sizes)


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "partition"),
    [
        ("relu_mlp", by_parameter),
        ("empty_tensors", by_parameter),
        ("one_convolution_twice", by_parameter),
        ("convolution", weights_and_biases),
    ],
)
def test_chunks_change_nothing(name, partition, chunk_size):
    for gram in ("dense", "structured"):
        made = by(gram, name)
        groups, blocks = partition(made.params)
        options = {"groups": groups, "gram": gram, "chunk_size": chunk_size}
        s, infos = newton_step_and_info(*made, DELTA, **options)
        matrices = gram_matrix(*made, **options)
        whole = gram_matrix(*made, groups=groups, gram=gram)
        for block, info, matrix, other in zip(blocks, infos, matrices, whole, strict=True):
            mine = cut(truth(name), made.params, block)
            agree(of_leaves(s, block), solve(mine, DELTA))
            check_info(info, walk(mine, DELTA), mine, DELTA, TOLERANCE[FLOAT64])
            agree(matrix, other, 1e-12)


@GRAMS
@every_partition
@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "deeply_nested", "packed_attention"])
def test_float32(name, partition, gram):
    made = by(gram, name, FLOAT32)
    groups, blocks = partition(made.params)
    s, infos = newton_step_and_info(*made, DELTA, groups=groups, gram=gram)
    for leaf in tree_leaves(s):
        assert leaf.dtype == FLOAT32
    for block, info in zip(blocks, infos, strict=True):
        mine = cut(truth(name), made.params, block)
        agree(of_leaves(s, block), solve(mine, DELTA), TOLERANCE[FLOAT32])
        assert info.evals.dtype == info.gammas.dtype == FLOAT32
        agree(info.evals, directions(mine).evals, TOLERANCE[FLOAT32])


def test_groups_may_differ_in_dtype():
    made = problem("relu_mlp", FLOAT32)
    params = {k: v.double() if k.startswith("2") else v for k, v in made.params.items()}

    def model_fn(p, X):
        hidden = F.linear(X, p["0.weight"], p["0.bias"]).relu()
        return F.linear(hidden.double(), p["2.weight"], p["2.bias"])

    s = newton_step(model_fn, params, *made[2:], DELTA, groups=per_layer(params))
    for block in ([0, 1], [2, 3]):
        mine = cut(truth("relu_mlp"), params, block)
        agree(of_leaves(s, block), solve(mine, DELTA), TOLERANCE[FLOAT32])
    assert [leaf.dtype for leaf in tree_leaves(s)] == [FLOAT32] * 2 + [FLOAT64] * 2


# --- identities -----------------------------------------------------------------------------


def rounded(found, true):
    """Compare trees of tensors to rounding."""
    found, true = tree_leaves(found), tree_leaves(true)
    for one, other in zip(found, true, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@GRAMS
@some_problems
def test_one_group_of_everything_is_no_groups(name, gram):
    made = by(gram, name)
    for options in ({}, {"select": top_k(2), "complement": 0.5}):
        every = Group(lambda path: True) if options else Group(paths_of(made.params))
        s, (info,) = newton_step_and_info(*made, DELTA, groups=[every], gram=gram, **options)
        other, plain = newton_step_and_info(*made, DELTA, gram=gram, **options)
        rounded([s, *info], [other, *plain])
    groups = [Group("")]
    rounded(ggn_eigvalsh(*made, groups=groups, gram=gram)[0], ggn_eigvalsh(*made, gram=gram))
    rounded(gram_matrix(*made, groups=groups, gram=gram)[0], gram_matrix(*made, gram=gram))


@GRAMS
@some_problems
def test_a_block_takes_the_step_of_a_model_whose_other_parameters_are_frozen(name, gram):
    made = problem(name)
    groups, blocks = by_layer(made.params)
    leaves, spec = tree_flatten(made.params)
    s, infos = newton_step_and_info(*by(gram, name), DELTA, groups=groups, gram=gram)
    for block, info in zip(blocks, infos, strict=True):
        if not sum(leaves[i].numel() for i in block):
            assert float(info.gradient_norm) == 0
            continue

        def frozen(mine, X, block=block):
            every = list(leaves)
            for i, leaf in zip(block, mine, strict=True):
                every[i] = leaf
            return made.model_fn(tree_unflatten(every, spec), X)

        mine = [leaves[i] for i in block]
        alone, other = newton_step_and_info(frozen, mine, *made[2:], DELTA, gram="dense")
        agree(of_leaves(s, block), of_leaves(alone, range(len(block))))
        agree(info.evals, other.evals)
        agree(info.gradient_norm, other.gradient_norm)
        assert info.rank == other.rank


@GRAMS
def test_results_follow_the_order_of_the_groups_and_not_that_of_names(gram):
    made = by(gram, "relu_mlp")
    names = [["0.weight", "2.bias"], ["0.bias"], ["2.weight"]]
    order = [2, 0, 1]
    s, infos = newton_step_and_info(*made, DELTA, groups=[Group(each) for each in names], gram=gram)
    t, others = newton_step_and_info(
        *made, DELTA, groups=[Group(names[i][::-1]) for i in order], gram=gram
    )
    rounded(s, t)
    for i, info in zip(order, others, strict=True):
        rounded(infos[i].evals, info.evals)
        rounded(infos[i].gammas.abs(), info.gammas.abs())


@GRAMS
def test_parameters_in_no_group_stay(gram):
    made = by(gram, "convolution")
    s = newton_step(*made, DELTA, groups=[Group("3")], complement=1.0, gram=gram)
    assert [name for name, leaf in s.items() if leaf.any()] == ["3.weight"]
    mine = cut(truth("convolution"), made.params, [2])
    agree(s["3.weight"].flatten(), walk(mine, DELTA, complement=1.0).step)
    ((_, vectors),) = ggn_eigh(*made, groups=[Group("3")], select=top_k(2), gram=gram)
    assert vectors["0.weight"].shape == (2, 4, 2, 3, 3)
    assert [name for name, leaf in vectors.items() if leaf.any()] == ["3.weight"]


@GRAMS
def test_all_directions_with_the_complement_solve_every_block(gram):
    made = by(gram, "packed_attention")
    groups, blocks = by_layer(made.params)
    s = newton_step(*made, DELTA, groups=groups, complement=DELTA, gram=gram)
    for block in blocks:
        agree(of_leaves(s, block), solve(cut(truth("packed_attention"), made.params, block), DELTA))


def test_arguments_are_left_as_they_are():
    made = problem("relu_mlp")
    groups = [Group(["2.weight", "0.weight"], damping=0.3), Group(lambda path: "bias" in path)]
    kept, before = list(groups), {name: leaf.clone() for name, leaf in made.params.items()}
    newton_step(*made, DELTA, groups=tuple(groups))
    assert newton_step(*made, DELTA, groups=groups)
    assert groups == kept
    assert groups[0].params == ["2.weight", "0.weight"]
    assert all(torch.equal(leaf, before[name]) for name, leaf in made.params.items())


# --- selections and dampings -----------------------------------------------------------------


@GRAMS
def test_a_rule_gets_what_is_known_of_its_own_group(gram):
    made = by(gram, "relu_mlp")
    blocks = by_parameter(made.params).blocks
    seen: dict[int, Any] = {}

    def rule(number, evals, evecs, gammas, lambdas):
        seen[number] = [evals.clone(), evecs.clone(), gammas.clone(), lambdas.clone()]
        for tensor in (evals, evecs, gammas, lambdas):  # the rule's own, to be spoiled
            tensor.fill_(math.nan)
        return (number + 1) * DELTA * seen[number][0]

    paths = paths_of(made.params)
    groups = [Group(path, damping=partial(rule, i)) for i, path in enumerate(paths)]
    s, infos = newton_step_and_info(*made, 1.0, groups=groups, gram=gram)
    matrices = gram_matrix(*made, groups=groups, gram=gram)
    for i, block in enumerate(blocks):
        mine = cut(truth("relu_mlp"), made.params, block)
        expected = walk(mine, lambda evals, *_, i=i: (i + 1) * DELTA * evals)
        agree(of_leaves(s, block), expected.step)
        evals, evecs, *record = seen[i]
        agree(evals, expected.kept.evals)
        agree(matrices[i] @ evecs, evecs * evals)
        agree(evecs.mT @ evecs, torch.eye(len(evals), dtype=FLOAT64))
        rounded(record, [infos[i].gammas, infos[i].lambdas])
        agree(infos[i].dampings, (i + 1) * DELTA * expected.kept.evals)


@GRAMS
def test_a_selection_gets_the_eigenvalues_of_its_own_group(gram):
    made = by(gram, "relu_mlp")
    groups, blocks = by_layer(made.params)
    seen: list[Tensor] = []

    def first_of(evals):
        seen.append(evals)
        return [len(evals) - 1]

    mine = [groups[0]._replace(select=first_of), groups[1]]
    _, infos = newton_step_and_info(*made, DELTA, select=energy(1.0), groups=mine, gram=gram)
    (evals,) = seen
    true = eigenpairs(cut(truth("relu_mlp"), made.params, blocks[0]))[0]
    agree(evals, true[-len(evals) :])
    assert [len(info.evals) for info in infos] == [1, int(infos[1].rank)]


@GRAMS
@pytest.mark.parametrize(
    "damping", [math.inf, torch.tensor(0.2, dtype=FLOAT64), 0.0, lambda e, *_: e + math.inf]
)
def test_dampings_of_any_kind(damping, gram):
    """Infinity keeps a group where it is, and zero makes an undamped step."""
    made = by(gram, "relu_mlp")
    groups = [Group("0", damping=damping), Group("2")]
    s = newton_step(*made, DELTA, groups=groups, gram=gram)
    delta = math.inf if callable(damping) else float(damping)
    for block, each in (([0, 1], delta), ([2, 3], DELTA)):
        expected = walk(cut(truth("relu_mlp"), made.params, block), each).step
        agree(of_leaves(s, block), expected, 1e-7 if each == 0 else TOLERANCE[FLOAT64])


@GRAMS
def test_a_group_may_keep_nothing(gram):
    made = by(gram, "relu_mlp")
    groups = [Group("0", select=lambda evals: []), Group("2")]
    s, infos = newton_step_and_info(*made, DELTA, groups=groups, gram=gram)
    assert not of_leaves(s, [0, 1]).any()
    assert infos[0].evals.shape == (0,)
    assert infos[0].gammas.shape == (5, 0)
    agree(of_leaves(s, [2, 3]), solve(cut(truth("relu_mlp"), made.params, [2, 3]), DELTA))


# --- sub-sampling, Monte-Carlo, the empirical Fisher ------------------------------------------

SAMPLES = [  # of the slopes, of the directions, of the curvatures
    ([0, 1], None, None),
    (None, [1, 2], None),
    ([3, 0, 1], [1, 2], [3, 1, 0]),
    (None, None, [2]),
    ([2], [2, 0], [1]),
]


@GRAMS
@pytest.mark.parametrize("name", ["relu_mlp", "deeply_nested"])
@pytest.mark.parametrize("partition", [by_parameter, by_layer])
def test_sub_samples(name, partition, gram):
    made = by(gram, name)
    groups, blocks = partition(made.params)
    for slopes, ggn, curvature in SAMPLES:
        options = {
            "subsampling_grad": slopes,
            "subsampling_ggn": ggn,
            "subsampling_curvature": curvature,
        }
        rest = {"groups": groups, "gram": gram}
        s, infos = newton_step_and_info(*made, DELTA, **options, **rest)
        alongs = directional_derivatives(*made, **options, **rest)
        every = ggn_eigvalsh(*made, subsampling_ggn=ggn, **rest)
        for block, info, along, evals in zip(blocks, infos, alongs, every, strict=True):
            on = partial(cut, truth(name), made.params, block)
            held = None if curvature is None else on(curvature)
            expected = walk(on(ggn), DELTA, slopes=on(slopes), curvatures=held)
            equal = expected.kept.evals
            record = basis_free(expected.kept, equal)
            for found in (info, expected.kept._replace(**along._asdict())):
                for mine, true in zip(basis_free(found, equal), record, strict=True):
                    agree(mine, true)
            if curvature is None or all(run.stop - run.start == 1 for run in runs(equal)):
                agree(of_leaves(s, block), expected.step)
            agree(info.gradient_norm, expected.gradient.norm())
            true = eigenpairs(on(ggn))[0]
            agree(evals, true[len(true) - len(evals) :])


def runs(evals: Tensor) -> list[slice]:
    """Runs of equal eigenvalues."""
    return clusters(evals) if len(evals) else []


@GRAMS
@pytest.mark.parametrize("name", ["relu_mlp", "list_of_layers", "eval_batch_norm"])
def test_the_empirical_fisher_of_every_block(name, gram):
    made = by(gram, name)
    groups, blocks = by_layer(made.params)
    whole = truth(name)
    # A mean over outputs as well is one over N C losses, whose gradients are C times as large.
    losses = 1 if isinstance(made.criterion, nn.CrossEntropyLoss) else whole.slopes.shape[1]
    fisher = losses * torch.einsum("nc,nd->ncd", whole.slopes, whole.slopes)
    whole = whole._replace(hessians=fisher)
    made = made._replace(criterion=empirical_fisher(made.criterion))
    s, infos = newton_step_and_info(*made, DELTA, groups=groups, gram=gram)
    for block, info in zip(blocks, infos, strict=True):
        mine = cut(whole, made.params, block)
        agree(of_leaves(s, block), solve(mine, DELTA))
        agree(info.evals, directions(mine).evals)


@GRAMS
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_all_groups_see_the_same_drawn_targets(chunk_size, gram):
    """A block is the block of the whole: the outer products of the same columns."""
    made = by(gram, "relu_mlp")
    blocks = by_parameter(made.params).blocks

    def drawn():
        generator = torch.Generator().manual_seed(3)
        return made._replace(criterion=monte_carlo(made.criterion, 2, generator))

    options = {"gram": gram, "chunk_size": chunk_size}
    evals, vectors = ggn_eigh(*drawn(), **options)
    E = torch.cat([rows(leaf) for leaf in tree_leaves(vectors)], 1)
    ggn = E.T @ (evals[:, None] * E)
    groups = per_parameter(made.params)
    matrices = gram_matrix(*drawn(), groups=groups, **options)
    agree(sum(matrices), gram_matrix(*drawn(), **options))
    s, infos = newton_step_and_info(*drawn(), DELTA, groups=groups, complement=DELTA, **options)
    for block, info in zip(blocks, infos, strict=True):
        inside = places(made.params, block)
        mine = ggn[inside][:, inside]
        g = truth("relu_mlp").gradient[inside]
        identity = torch.eye(len(g), dtype=FLOAT64)
        agree(of_leaves(s, block), -torch.linalg.solve(mine + DELTA * identity, g), 1e-8)
        agree(info.evals, torch.linalg.eigvalsh(mine)[len(g) - len(info.evals) :], 1e-8)
        agree(info.gradient_norm, g.norm())


# --- one visit of the model ------------------------------------------------------------------


def functions(damping=DELTA) -> dict[str, Callable]:
    return {
        "newton_step": lambda *a, **o: newton_step(*a, damping, **o),
        "newton_step, top": lambda *a, **o: newton_step(*a, damping, select=top_k(2), **o),
        "newton_step_and_info": lambda *a, **o: newton_step_and_info(*a, damping, **o),
        "ggn_eigvalsh": ggn_eigvalsh,
        "ggn_eigh": ggn_eigh,
        "directional_derivatives": directional_derivatives,
        "gram_matrix": gram_matrix,
    }


@pytest.fixture
def visits(monkeypatch):
    """How often a program is visited."""
    count = []
    plain = linearization.visit

    def counting(*arguments):
        count.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(linearization, "visit", counting)

    def of(function, *arguments, **options) -> int:
        count.clear()
        function(*arguments, **options)
        return len(count)

    return of


@pytest.mark.parametrize("function", functions())
def test_a_prepared_model_is_visited_once_for_all_blocks(function, visits):
    made = by("structured", "convolution")
    for groups in (None, [Group("0")], per_layer(made.params), per_parameter(made.params)):
        assert visits(functions()[function], *made, groups=groups) == 1


@pytest.mark.parametrize("function", functions())
def test_a_model_is_called_no_more_often_for_several_blocks(function):
    made = problem("relu_mlp")
    calls = []

    def counting(params, X):
        calls.append(X)
        return made.model_fn(params, X)

    counts = []
    for groups in (None, per_layer(made.params), per_parameter(made.params)):
        calls.clear()
        arguments = made._replace(model_fn=counting)
        functions()[function](*arguments, groups=groups, gram="dense")
        counts.append(len(calls))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("function", ["ggn_eigvalsh", "gram_matrix", "directional_derivatives"])
def test_several_chunks_are_paired_in_one_sweep_for_all_blocks(function, visits):
    """What needs no lift from Gram coordinates to parameters needs no second sweep."""
    made = by("structured", "convolution")
    large = [Group("0.weight"), Group("3.weight")]
    options = {"chunk_size": 2}
    one = visits(functions()[function], *made, groups=large[:1], **options)
    assert visits(functions()[function], *made, groups=large, **options) == one


def test_a_step_in_several_chunks_sweeps_once_more_for_all_blocks(visits):
    made = by("structured", "convolution")
    options = {"chunk_size": 2}
    large = [Group(path) for path in ("0.weight", "3.weight")]  # on the side of the columns
    products, one, two = (
        visits(function, *made, *damping, groups=groups, **options)
        for function, damping, groups in [
            (gram_matrix, [], large),
            (newton_step, [DELTA], large[:1]),
            (newton_step, [DELTA], large),
        ]
    )
    assert products < one == two


# --- ensembles ------------------------------------------------------------------------------


@GRAMS
@pytest.mark.parametrize("partition", [by_parameter, weights_and_biases])
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "deeply_nested", "empty_tensors"])
def test_vmap_over_the_parameters(name, partition, gram):
    made = by(gram, name)
    members = [tree_map(lambda x, f=f: f * x, made.params) for f in (1.0, 0.5, -0.7)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *members)
    groups, blocks = partition(made.params)
    top = min(leaf.numel() for leaf in tree_leaves(made.params) if leaf.numel())
    options = {"groups": groups, "gram": gram, "select": top_k(min(top, 2)), "complement": 0.4}

    def take_step(params):
        return newton_step_and_info(made.model_fn, params, *made[2:], DELTA, **options)

    steps, infos = vmap(take_step)(stacked)
    assert isinstance(infos, tuple)
    for i, params in enumerate(members):
        s, others = take_step(params)
        agree(of_leaves(tree_map(lambda x, i=i: x[i], steps), range(len(blocks))), of_leaves(
            s, range(len(blocks))
        ))  # fmt: skip
        for info, other in zip(infos, others, strict=True):
            agree(info.evals[i], other.evals)
            assert info.rank[i] == other.rank


# --- names ----------------------------------------------------------------------------------


def tensors(count: int) -> list[Tensor]:
    return list(normal(count, 2).double())


def summing(params, X):
    """A model to which every parameter matters."""
    return X @ torch.cat([leaf.reshape(-1) for leaf in tree_leaves(params)])[:, None]


TREES = {
    "dict": lambda t: {
        "a": t[0],
        "a.b": t[1],
        "c": {"d": t[2], "e": [t[3], t[4]]},
        "f": Layers(t[5], t[6]),
        "ab": t[7],
        "a b": t[8],
        7: t[9],
    },
    "list": lambda t: [t[0], (t[1], {"w": t[2]}), *t[3:12]],
    "fields": lambda t: Layers(t[0], Layers(t[1], [t[2], t[3]])),
    "tensor": lambda t: t[0],
}
NAMES = [
    ("dict", "a", [0]),
    ("dict", "a.b", [1]),
    ("dict", "ab", [7]),
    ("dict", "a b", [8]),
    ("dict", "7", [9]),
    ("dict", "c", [2, 3, 4]),
    ("dict", "c.d", [2]),
    ("dict", "c.e", [3, 4]),
    ("dict", "c.e.1", [4]),
    ("dict", "f", [5, 6]),
    ("dict", "f.shift", [6]),
    ("dict", ["f.code", "c.e", "a"], [0, 3, 4, 5]),
    ("dict", ("c", "c.d", "c.d"), [2, 3, 4]),
    ("dict", "", list(range(10))),
    ("dict", "['a']", [0]),
    ("dict", "['a.b']", [1]),
    ("dict", "['c']['d']", [2]),
    ("dict", "['c']['e'][1]", [4]),
    ("dict", "['c']['e']", [3, 4]),
    ("dict", "['c']", [2, 3, 4]),
    ("dict", "['f'].shift", [6]),
    ("dict", "['f']", [5, 6]),
    ("dict", "[7]", [9]),
    ("dict", lambda path: path.startswith("c.e"), [3, 4]),
    ("dict", lambda path: "a" in path, [0, 1, 7, 8]),
    ("list", "0", [0]),
    ("list", "1", [1, 2]),
    ("list", "1.1", [2]),
    ("list", "1.1.w", [2]),
    ("list", "[1][1]['w']", [2]),
    ("list", "[1]", [1, 2]),
    ("list", "10", [11]),
    ("fields", "code", [0]),
    ("fields", "shift", [1, 2, 3]),
    ("fields", "shift.shift.1", [3]),
    ("fields", ".code", [0]),
    ("fields", ".shift.shift[1]", [3]),
    ("fields", ".shift.shift", [2, 3]),
    ("fields", ".shift", [1, 2, 3]),
    ("tensor", "", [0]),
    ("tensor", lambda path: not path, [0]),
]


@pytest.mark.parametrize(
    ("tree", "name", "leaves"), NAMES, ids=lambda x: "predicate" if callable(x) else str(x)
)
def test_a_name_names(tree, name, leaves):
    params = TREES[tree](tensors(14))
    X = normal(3, sum(leaf.numel() for leaf in tree_leaves(params))).double()
    s = newton_step(summing, params, X, X[:, :1], nn.MSELoss(), 1.0, groups=[Group(name)])
    assert [i for i, leaf in enumerate(tree_leaves(s)) if leaf.any()] == leaves


@pytest.mark.parametrize("tree", TREES)
def test_predicates_are_asked_about_dotted_paths(tree):
    params, seen = TREES[tree](tensors(14)), []
    X = normal(3, sum(leaf.numel() for leaf in tree_leaves(params))).double()

    def asked(path):
        seen.append(path)
        return True

    ggn_eigvalsh(summing, params, X, X[:, :1], nn.MSELoss(), groups=[Group(asked)])
    assert seen == paths_of(params)


AMBIGUOUS = {
    "a dot in a key": lambda t: {"a": {"b": t[0]}, "a.b": t[1]},
    "a number and its digits": lambda t: {0: t[0], "0": t[1]},
    "a prefix": lambda t: {"a": t[0], "a.b": t[1], "a.b.c": t[2]},
    "a key like a path": lambda t: {"a": t[0], "['a']": t[1]},
    "an empty key": lambda t: {"": t[0], "a": t[1], "b": {"": t[2]}},
    "an empty key above": lambda t: {"a": t[0], "": {"a": t[1], "": t[2]}},
}


@pytest.mark.parametrize("make", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_every_parameter_has_a_block_however_its_path_reads(make):
    params = make(tensors(3))
    X = normal(3, sum(leaf.numel() for leaf in tree_leaves(params))).double()
    arguments = (summing, params, X, X[:, :1], nn.MSELoss())
    s = newton_step(*arguments, 1.0, groups=per_parameter(params))
    whole = dense(*arguments)
    for i in range(len(tree_leaves(params))):
        agree(of_leaves(s, [i]), solve(cut(whole, params, [i]), 1.0))
    assert newton_step(*arguments, 1.0, groups=per_layer(params))


@every_problem
def test_ready_made_groups_hold_every_parameter_once(name):
    params, paths = problem(name).params, paths_of(problem(name).params)
    assert [group.params for group in per_parameter(params)] == [[path] for path in paths]
    layers = [list(group.params) for group in per_layer(params)]
    assert sorted(path for layer in layers for path in layer) == sorted(paths)
    for layer in layers:
        assert len({path.rpartition(".")[0] for path in layer}) == 1
    assert len({layer[0].rpartition(".")[0] for layer in layers}) == len(layers)
    for group in (*per_parameter(params), *per_layer(params)):
        assert group.select is group.damping is None


# --- refusals -------------------------------------------------------------------------------

PARAMS = {"W": torch.linspace(-0.5, 0.7, 6).reshape(2, 3), "b": {"c": torch.tensor([0.1, -0.2])}}
MANY = {f"p{i}": torch.ones(1) for i in range(12)}

REFUSALS = {
    "a group alone": (
        Group("W"),
        TypeError,
        r"groups must be a sequence of Group, or None; got Gr",
    ),
    "a path": ("W", TypeError, "groups must be a sequence of Group, or None; got 'W'"),
    "a function": (lambda path: True, TypeError, "groups must be a sequence of Group"),
    "a generator": (
        (Group("W") for _ in range(1)),
        TypeError,
        "groups must be a sequence of Group",
    ),
    "a dict": ({"a": Group("W")}, TypeError, "groups must be a sequence of Group"),
    "a set": ({"W"}, TypeError, "groups must be a sequence of Group"),
    "a number": (1, TypeError, "sequence of Group, or None; got 1. Pass .Group"),
    "none of them": ([], ValueError, "sequence of Group, or None; got an empty one"),
    "an empty tuple": ((), ValueError, "got an empty one"),
    "paths": (["W"], TypeError, "got 'W' in it"),
    "None inside": ([Group("W"), None], TypeError, "got None in it"),
    "a tuple inside": ([("W", None, None)], TypeError, r"got \('W', None, None\) in it"),
    "unknown": (
        [Group("weight")],
        ValueError,
        r"a group must name parameters that there are; got 'weight'.*'W', 'b.c'\.",
    ),
    "unknown, second": ([Group("W"), Group(["b", "nothing"])], ValueError, "got 'nothing'"),
    "part of a key": ([Group("b.")], ValueError, r"got 'b\.'"),
    "below a leaf": ([Group("W.weight")], ValueError, r"got 'W\.weight'"),
    "by its shown name": ([Group("params['W']")], ValueError, "got .params"),
    "nothing matches": (
        [Group("W"), Group(lambda path: False)],
        ValueError,
        r"got groups\[1\]\.params, which is false for every path,?.*'W', 'b.c'",
    ),
    "twice": (
        [Group("W"), Group("b"), Group(["W"])],
        ValueError,
        r"a parameter must be in one group only; got 'W' in groups 0 and 2\. Take it out",
    ),
    "twice by a prefix": ([Group("b.c"), Group("b")], ValueError, "'b.c' in groups 0 and 1"),
    "twice by a function": (
        [Group(lambda path: True), Group("W")],
        ValueError,
        "'W' in groups 0 and 1",
    ),
    "twice by another name": ([Group("W"), Group("['W']")], ValueError, "'W' in groups 0 and 1"),
    "params None": ([Group(None)], TypeError, r"groups\[0\].params must be a path, a sequence of"),
    "params a number": ([Group("W"), Group(1)], TypeError, r"groups\[1\].params must be .*; got 1"),
    "params of numbers": ([Group([0])], TypeError, r"got \[0\]\. Name parameters as in"),
    "params nested": ([Group([["W"]])], TypeError, r"groups\[0\].params must be a path"),
    "params a set": ([Group({"W"})], TypeError, r"groups\[0\].params must be a path"),
    "params tensors": ([Group([PARAMS["W"]])], TypeError, r"groups\[0\].params must be a path"),
    "params a tensor": ([Group(PARAMS["W"])], TypeError, r"groups\[0\].params must be a path"),
    "params none": ([Group([])], ValueError, r"groups\[0\].params .* got none\. Name at least one"),
    "select": (
        [Group("W", select=3)],
        TypeError,
        r"groups\[0\].select must be a function or None; got 3\. Pass a rule such as top_k",
    ),
    "select indices": ([Group("W", select=[0])], TypeError, r"groups\[0\].select must be a fun"),
}
DAMPINGS = {
    "negative": (
        [Group("W", damping=-1.0)],
        ValueError,
        r"groups\[0\].damping must be a .*got -1.0",
    ),
    "nan": (
        [Group("W"), Group("b", damping=math.nan)],
        ValueError,
        r"groups\[1\].damping must .*nan",
    ),
    "string": ([Group("W", damping="1")], TypeError, r"groups\[0\].damping must be a .*; got '1'"),
    "boolean": ([Group("W", damping=True)], TypeError, r"groups\[0\].damping must be a number"),
    "vector": ([Group("W", damping=torch.ones(2))], TypeError, r"got a tensor of shape \[2\]"),
    "negative tensor": ([Group("W", damping=-torch.ones(()))], ValueError, r"\[0\].damping"),
    "rule's shape": (
        [Group("b", damping=lambda evals, *_: torch.ones(7))],
        ValueError,
        r"for each of the K = 2 directions; got shape \[7\]",
    ),
    "rule's sign": (
        [Group("b", damping=lambda evals, *_: -evals)],
        ValueError,
        "must not be negative or nan",
    ),
    "select's answer": ([Group("b", select=lambda evals: [99])], ValueError, "from 99 to 99"),
    "select's mask": (
        [Group("b", select=lambda evals: evals[1:] > 0)],
        ValueError,
        "a mask of length",
    ),
}


def linear(p, x):
    return x @ p["W"].T + p["b"]["c"]


def call(function, groups, model_fn=linear):
    X, y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(0, 1, 8).reshape(4, 2)
    given = {"damping": 1.0} if "damping" in inspect.signature(function).parameters else {}
    return function(model_fn, PARAMS, X, y, F.mse_loss, groups=groups, **given)


PUBLIC = (
    newton_step,
    newton_step_and_info,
    ggn_eigvalsh,
    ggn_eigh,
    directional_derivatives,
    gram_matrix,
)


@pytest.mark.parametrize("case", REFUSALS, ids=REFUSALS)
def test_refusals_come_before_any_work_and_say_where(case):
    groups, kind, message = REFUSALS[case]

    def untouched(p, x):
        raise AssertionError("work was done")

    for function in PUBLIC:
        with pytest.raises(kind, match=f"(?s)^{function.__name__}: .*{message}"):
            call(function, groups, untouched)


@pytest.mark.parametrize("case", DAMPINGS, ids=DAMPINGS)
def test_refusals_of_dampings_and_selections(case):
    groups, kind, message = DAMPINGS[case]
    for function in (newton_step, newton_step_and_info):
        with pytest.raises(kind, match=f"(?s)^{function.__name__}: .*{message}"):
            call(function, groups)


def test_a_message_names_a_few_parameters_of_many():
    X = torch.ones(2, 12)
    known = r"got 'q' in groups\[0\]. The parameters are 'p0', .*'p7', …\.$"
    with pytest.raises(ValueError, match=known):
        newton_step(summing, MANY, X, X[:, :1], F.mse_loss, 1.0, groups=[Group("q")])


def test_what_a_predicate_raises_is_passed_on():
    with pytest.raises(ZeroDivisionError):
        call(newton_step, [Group(lambda path: 1 / 0)])


# --- any partition --------------------------------------------------------------------------

VARIED = ("relu_mlp", "tanh_mlp", "convolution", "one_bias_two_weights", "deeply_nested",
          "one_convolution_twice", "list_of_layers", "packed_attention")  # fmt: skip


class Own(NamedTuple):
    """What a group has of its own, as numbers."""

    top: int | None
    delta: float | None


@st.composite
def partitions(draw):
    """Every parameter in one of a few groups, or in none."""
    name = draw(st.sampled_from(VARIED))
    count = len(tree_leaves(problem(name).params))
    owner = draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count))
    numbers = draw(st.permutations(sorted({number for number in owner if number >= 0})))
    blocks = [[i for i in range(count) if owner[i] == number] for number in numbers]
    blocks = blocks or [[draw(st.integers(0, count - 1))]]
    tops, deltas = st.sampled_from([None, 1, 2, 5]), st.sampled_from([None, 0.05, 1.0])
    own = [Own(draw(tops), draw(deltas)) for _ in blocks]
    shuffled = [draw(st.permutations(block)) for block in blocks]
    return name, blocks, own, shuffled


@settings(max_examples=40)
@given(
    partitions(),
    st.sampled_from(["dense", "structured"]),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, [0, 1], [2, 0]]),
    st.sampled_from([None, [0, 1], [1, 2]]),
)
def test_any_partition_into_groups(partition, gram, chunk_size, complement, slopes, ggn):
    name, blocks, own, shuffled = partition
    made = by(gram, name)
    paths, groups, expected = paths_of(made.params), [], []
    for block, named, each in zip(blocks, shuffled, own, strict=True):
        on = partial(cut, truth(name), made.params, block)
        evals = eigenpairs(on(ggn))[0]
        top = None if each.top is None else apart_from(evals, each.top)
        select = None if top is None else top_k(top)
        groups.append(Group([paths[i] for i in named], select, each.delta))
        kept = None if top is None else min(top, rank(evals))
        delta = DELTA if each.delta is None else each.delta
        expected.append(walk(on(ggn), delta, kept, complement, on(slopes)))
    s, infos = newton_step_and_info(
        *made,
        DELTA,
        groups=groups,
        complement=complement,
        subsampling_grad=slopes,
        subsampling_ggn=ggn,
        gram=gram,
        chunk_size=chunk_size,
    )
    for block, each, info in zip(blocks, expected, infos, strict=True):
        agree(of_leaves(s, block), each.step)
        agree(info.gradient_norm, each.gradient.norm())
        count = len(each.kept.evals)
        agree(info.evals[len(info.evals) - count :], each.kept.evals)
    left = set(range(len(paths))) - {leaf for block in blocks for leaf in block}
    assert not any(tree_leaves(s)[leaf].any() for leaf in left)


def test_the_table_of_problems_is_that_of_the_models():
    assert not set(PROBLEMS) & {build.__name__ for build in OWN}
    assert models.PROBLEMS is PROBLEMS
