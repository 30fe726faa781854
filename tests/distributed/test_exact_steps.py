"""Steps of several processes that hold the samples together are those of one that holds all."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.distributed.exact_cases import CASES, on_rank, step_and_info

TOLERANCE = 1e-12
TINY = 1e-14


def splits_of(case, size, number):
    """Unequal numbers of samples on so many ranks, one after the other of which has none."""
    if isinstance(case.model_fn, dict):
        counts = {name: len(tree_leaves(tree)[0]) for name, tree in case.X.items()}
        of_terms = {name: splits(n, size, number) for name, n in counts.items()}
        # Which rank has none differs from term to term.
        first, *further = of_terms
        of_terms[first] = of_terms[first][::-1]
        return [
            dict(zip(of_terms, parts, strict=True))
            for parts in zip(*of_terms.values(), strict=True)
        ]
    return splits(len(tree_leaves(case.X)[0]), size, number)


def splits(n, size, number):
    """Numbers of samples, all unequal if there are enough; and once more, where one rank has none.

    Which one that is differs from case to case.
    """
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


@pytest.mark.parametrize("pool", ["one", "two", "four"])
@pytest.mark.parametrize("name", list(CASES))
def test_steps_are_those_of_one_process(name, pool, request):
    ranks = request.getfixturevalue(pool)
    case = CASES[name]()
    parts = splits_of(case, ranks.size, list(CASES).index(name))
    reference = step_and_info(case)
    by_rank = ranks.results(on_rank, name, parts)
    for number, counts in enumerate(parts):
        assert len({of_rank[number][0] for of_rank in by_rank}) == 1, counts
        errors = differences(by_rank[0][number][1], reference)
        tolerance = 1e-6 if name == "float32" else TOLERANCE
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not wrong, (counts, wrong)
