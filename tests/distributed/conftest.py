"""The pools of processes that tests of several ranks share; none starts before it is used."""

import contextlib

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def one():
    with Pool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def two():
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def four():
    with Pool(4) as pool:
        yield pool


@pytest.fixture
def disposable():
    """Make pools for one test, which may kill their ranks or wait less for a collective."""
    with contextlib.ExitStack() as pools:
        yield lambda size, **options: pools.enter_context(Pool(size, **options))
