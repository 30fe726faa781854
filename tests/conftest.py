"""What holds for every test: one thread, a fixed seed, and how hard Hypothesis tries."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "ddnewton",
    max_examples=25,
    deadline=None,  # the first derivative a process takes costs seconds
    derandomize=True,  # a failure is one that can be had again; search with the profile below
)
hypothesis.settings.register_profile("search", max_examples=200, deadline=None)
hypothesis.settings.load_profile("ddnewton")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start every test from the same random numbers, whichever ran before it."""
    torch.manual_seed(0)
