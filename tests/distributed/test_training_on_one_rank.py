"""Training in a group of one is, to the bit, training without a group.

It is in the process of the tests, where the shapes of arguments are checked.
"""

import pytest
from torch import distributed

from ddnewton import covariance, standard_errors
from tests.distributed import (
    split_problems,
    test_curvature_of_ranks,
    test_fits_of_ranks,
    test_torch_optimizer_of_ranks,
    test_updates_of_ranks,
)
from tests.distributed.split_problems import assert_close, assert_same_bits

ON_RANKS = (
    test_curvature_of_ranks,
    test_fits_of_ranks,
    test_torch_optimizer_of_ranks,
    test_updates_of_ranks,
)


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Return the results of a function without a group, and in a group of one."""

    def results(function, *args):
        without = function(0, *args)
        store = f"file://{tmp_path}/store"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            for module in (*ON_RANKS, split_problems):
                monkeypatch.setattr(module, "group_of", lambda size: distributed.group.WORLD)
            return without, function(0, *args)
        finally:
            distributed.destroy_process_group()

    return results


@pytest.mark.parametrize("name", test_curvature_of_ranks.CASES)
def test_curvature(name, both):
    assert_same_bits(both(test_curvature_of_ranks.curvature, name, 1))


@pytest.mark.parametrize("function", [covariance, standard_errors])
def test_uncertainty(function, both):
    """Rows are factorized on their rank, and then those of all ranks."""
    assert_close(*both(test_curvature_of_ranks.uncertain, 1, function))


@pytest.mark.parametrize("name", test_updates_of_ranks.CASES)
def test_updates(name, both):
    assert_same_bits(both(test_updates_of_ranks.updated, name, 1, 2))


@pytest.mark.parametrize("name", test_fits_of_ranks.CASES)
def test_fits(name, both):
    without, within = both(test_fits_of_ranks.fitted, name, 1)
    seconds = without.history.seconds
    assert_same_bits([without, within._replace(history=within.history._replace(seconds=seconds))])


@pytest.mark.parametrize("name", test_torch_optimizer_of_ranks.CASES)
def test_steps_of_a_module(name, both):
    assert_same_bits(both(test_torch_optimizer_of_ranks.stepped, name, 1))
