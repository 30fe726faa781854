"""What holds for every test: one thread, a fixed seed, and how hard Hypothesis tries."""

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "ddnewton",
    max_examples=25,
    deadline=None,  # the first derivative a process takes costs seconds
    derandomize="CI" in os.environ,  # a failure in CI is one that can be had again
)
hypothesis.settings.load_profile("ddnewton")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start every test from the same random numbers, whichever ran before it."""
    torch.manual_seed(0)
