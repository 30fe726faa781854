"""Steps, records and eigenpairs of groups are those of the dense blocks."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ddnewton import (
    Group,
    above,
    directional_derivatives,
    empirical_fisher,
    energy,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    per_layer,
    per_parameter,
    top_k,
)
from tests.reference import directions, eigenpairs, error, rank, solve
from tests.whole.blocks import (
    DELTA,
    FLOAT32,
    FLOAT64,
    GRAMS,
    TOLERANCE,
    agree,
    apart_from,
    basis_free,
    by,
    by_layer,
    by_parameter,
    check_info,
    cut,
    every_partition,
    every_problem,
    from_the_end,
    of_leaves,
    paths_of,
    places,
    problem,
    rounded,
    rows,
    runs,
    some_problems,
    truth,
    walk,
    weights_and_biases,
)

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
