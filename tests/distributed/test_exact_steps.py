"""Steps of several processes that hold the samples together are those of one that holds all."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from torch.utils._pytree import tree_leaves

from tests.distributed import exact_cases
from tests.distributed.exact_cases import CASES, FUNCTIONS, on_rank
from tests.distributed.exact_references import REFERENCES, reference_step

TOLERANCE = 1e-12
TINY = 1e-14
TOLERANCES = {
    "float32": 1e-6,  # products of float32 columns are summed in another order
    "positions of samples": 1e-11,  # as are positions, of formed columns
    "terms with samples": 1e-10,  # whose G has hardly any curvature along some directions
}
NUMBERS = {name: number for number, name in enumerate(CASES)}
OF_FEW = ["columns", "parameters", "terms", "curvature's samples", "chunks", "positions in layers"]


def splits_of(case, size, number):
    """Unequal numbers of samples on so many ranks, and once more, where one of them has none."""
    if not isinstance(case.model_fn, dict):
        return splits(len(tree_leaves(case.X)[0]), size, number)
    # Which rank has none differs from term to term.
    counts = {name: len(tree_leaves(tree)[0]) for name, tree in case.X.items()}
    of_terms = [splits(n, size, number + term) for term, n in enumerate(counts.values())]
    return [dict(zip(counts, parts, strict=True)) for parts in zip(*of_terms, strict=True)]


def splits(n, size, number):
    """As for a case, of samples of one kind; which rank has none differs from case to case."""
    shares = torch.arange(1, size + 1)
    counts = (n * shares // shares.sum()).tolist()
    counts[-1] += n - sum(counts)
    if size == 1:
        return [counts]
    without, empty = list(counts), number % size
    without[(empty + 1) % size] += without[empty]
    without[empty] = 0
    return [counts, without]


def differences(result, reference):
    """By how much numbers differ, relatively; signs of directions are not determined."""
    assert result.keys() == reference.keys()
    return {name: difference(result[name], value) for name, value in reference.items()}


def difference(values, references):
    assert values.shape == references.shape
    finite = references.isfinite()
    assert torch.equal(values[~finite], references[~finite])
    distance = (values[finite].abs() - references[finite].abs()).norm()
    return float(distance / references[finite].norm().clamp(min=TINY))


def check_steps(ranks, name, parts, first=0, tolerance=TOLERANCE):
    """Require the same bits of all ranks, and the numbers of one process."""
    by_rank = ranks.results(on_rank, name, parts, first)
    for number, counts in enumerate(parts):
        assert len({of_rank[number][0] for of_rank in by_rank}) == 1, counts
        reference = FUNCTIONS[(first + number) % 2](CASES[name]())
        errors = differences(by_rank[0][number][1], reference)
        wrong = {key: error for key, error in errors.items() if not error <= tolerance}
        assert not wrong, (counts, wrong)


@pytest.mark.parametrize("name", list(CASES))
def test_steps_of_four_are_those_of_one_process(name, four):
    parts = splits_of(CASES[name](), 4, NUMBERS[name])
    check_steps(four, name, parts, NUMBERS[name], TOLERANCES.get(name, TOLERANCE))


@pytest.mark.parametrize("name", OF_FEW)
@pytest.mark.parametrize("pool", ["one", "two"])
def test_steps_of_few_are_those_of_one_process(pool, name, request):
    ranks = request.getfixturevalue(pool)
    check_steps(ranks, name, splits_of(CASES[name](), ranks.size, NUMBERS[name]), NUMBERS[name])


@pytest.mark.parametrize("name", list(REFERENCES))
def test_steps_are_the_textbook_s(name, four):
    case = CASES[name]()
    (parts, _) = splits_of(case, 4, 0)
    step = four.results(on_rank, name, [parts], 0)[0][0][1]["step"]
    assert difference(step, reference_step(case)) <= REFERENCES[name]


@pytest.mark.parametrize("name", ["split", "split in layers", "split by a rule"])
@drawn(data=st.data())
@settings(max_examples=8)
def test_it_does_not_matter_where_samples_are(name, four, data):
    n = len(CASES[name]().X)
    ends = sorted(data.draw(st.lists(st.integers(0, n), min_size=3, max_size=3)))
    counts = [stop - start for start, stop in zip([0, *ends], [*ends, n], strict=True)]
    check_steps(four, name, [counts, counts[::-1]])


def test_what_is_drawn_does_not_depend_on_the_ranks_that_draw(four, two):
    steps = {
        tuple(of_rank[0][1]["step"].tolist())
        for ranks, counts in [(four, [11, 0, 0, 0]), (two, [11, 0])]
        for of_rank in ranks.results(on_rank, "monte_carlo", [counts], 0)[:1]
    }
    assert len(steps) == 1


def test_generators_go_on_everywhere_from_where_they_are_on_one(four):
    case = exact_cases.drawing()
    FUNCTIONS[0](case)
    FUNCTIONS[0](case)
    expected = exact_cases.generator_states(case)
    assert all(states == expected for states in four.results(exact_cases.drawn_twice))


def test_a_small_shard_beside_a_large_one_goes_its_way(four):
    # By itself it would go by dense columns.
    ways = four.results(exact_cases.ways, [7, 200, 0, 13])
    assert ways == [(True, True), (True, True), (None, None), (True, True)]


def test_columns_of_other_forms_are_multiplied_all_the_same(four):
    reference = FUNCTIONS[0](CASES["convolutions"]())
    steps, forms = zip(*four.results(exact_cases.of_other_forms), strict=True)
    assert forms == ([True], [False], [], [True])
    assert all(difference(step, reference["step"]) <= TOLERANCE for step in steps)


@pytest.mark.parametrize("culprit", [0, 3])
@pytest.mark.parametrize("gram", ["dense", "structured"])
def test_samples_of_one_rank_may_have_fewer_digits(gram, culprit, four):
    by_rank = four.results(exact_cases.in_two_precisions, gram, culprit)
    assert len({digest for digest, _ in by_rank}) == 1
    case = exact_cases.perceptron(dtype=torch.float32)
    assert difference(by_rank[0][1], reference_step(case)) <= 1e-5


def test_no_samples_may_be_of_any_shape(four):
    by_rank = four.results(on_rank, "columns", [[5, 0, 4, 2]], 0)
    steps = {digest for ((digest, _),) in by_rank}
    assert set(four.results(exact_cases.with_shapeless_nothing)) == steps


def ring_bytes(counts, bytes_of_sample):
    """To the rank before it each of four sends all; to the opposite one the upper two send half."""
    return [(n + (n if rank < 2 else n // 2)) * bytes_of_sample for rank, n in enumerate(counts)]


def tile_bytes(counts, m):
    """Products with itself, with the rank behind it, and half of those with the opposite rank."""
    halves = [counts[2] // 2, counts[3] // 2]
    opposite = [
        *(counts[rank] * halves[rank] for rank in (0, 1)),
        *(counts[rank - 2] * (counts[rank] - halves[rank - 2]) for rank in (2, 3)),
    ]
    return [
        8 * m**2 * (n * n + n * counts[(rank + 1) % 4] + opposite[rank])
        for rank, n in enumerate(counts)
    ]


COUNTS = [1, 2, 3, 5]
N, C, M, D = 11, 4, 3, 44
WHOLE = {"orders": 8 * M * N, "results": 8 * D, "bases": 8 * C * M * (N - COUNTS[0])}


def test_bytes_of_a_step_by_columns_are_those_counted_on_paper(four):
    columns, tiles = ring_bytes(COUNTS, 8 * M * D), tile_bytes(COUNTS, M)
    told = four.results(exact_cases.traffic, "dense", COUNTS)
    for rank, (sent, exchanges) in enumerate(told):
        n = COUNTS[rank]
        own = {"outputs": 8 * C * n, "targets": 8 * n, "tiles": tiles[rank], "sums": 8 * (D + 1)}
        assert sent == {"columns": columns[rank], **(own if rank else WHOLE)}
        assert exchanges == 2


def test_bytes_of_a_step_by_parameters_are_those_counted_on_paper(four):
    counts = [3, 9, 4, 15]
    for rank, (sent, _) in enumerate(four.results(exact_cases.traffic, "parameters", counts)):
        n = counts[rank]
        own = {"outputs": 8 * C * n, "targets": 8 * n, "matrices": 8 * (D**2 + D + 1)}
        whole = {"orders": 16 * M * 31, "results": 8 * D, "bases": 8 * C * M * (31 - counts[0])}
        assert sent == (own if rank else whole)


def test_nothing_is_sent_to_ranks_without_samples(four):
    sent = [of_rank for of_rank, _ in four.results(exact_cases.traffic, "dense", [5, 0, 6, 0])]
    # Opposite ranks alone: all of one, and half of the other.
    assert [of_rank.get("columns", 0) for of_rank in sent] == [5 * 8 * M * D, 0, 3 * 8 * M * D, 0]


@pytest.mark.parametrize("name", ["dense", "chunks", "chunks of samples"])
def test_columns_of_one_other_rank_are_held_at_a_time(name, four):
    for turns in four.results(exact_cases.held_in_ring, name, COUNTS):
        assert sum(arriving for _, arriving in turns) > 1
        assert all(alive == 0 for alive, _ in turns)
