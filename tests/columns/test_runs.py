"""An order of a few ranges is that of all places, whatever the parts that they are cut from."""

import pytest
import torch

from ddnewton.columns import runs
from ddnewton.columns.runs import in_runs, runs_of

ORDERS = {
    "two swapped": [3, 4, 0, 1, 2],
    "inside and across parts": [2, 3, 4, 5, 0, 1, 6],
    "one by one": [3, 2, 1, 0],
    "a part": [4, 5, 1],
    "one": [0],
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("sizes", [[7], [3, 4], [0, 1, 5, 1]])
def test_entries_in_ranges(name, sizes):
    entries = torch.arange(14.0).reshape(2, 7)
    ranges = runs_of(torch.tensor(ORDERS[name]))
    assert torch.equal(in_runs(entries.split(sizes, 1), ranges), entries[:, ORDERS[name]])


def test_parameters_without_entries_have_none():
    assert runs_of(torch.tensor([0, 1, 2, 2])) is None


def test_many_ranges_are_none(monkeypatch):
    monkeypatch.setattr(runs, "MOST_RUNS", 4)
    assert runs_of(torch.tensor([3, 2, 1, 0])) is not None
    assert runs_of(torch.tensor([4, 3, 2, 1, 0])) is None
