"""Whatever the partition into groups, its step is that of the dense blocks."""

from functools import partial
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from ddnewton import Group, newton_step_and_info, top_k
from tests import models
from tests.models import PROBLEMS
from tests.reference import eigenpairs, rank
from tests.whole.blocks import (
    DELTA,
    OWN,
    agree,
    apart_from,
    by,
    cut,
    of_leaves,
    paths_of,
    problem,
    truth,
    walk,
)

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
