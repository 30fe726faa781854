"""What holds for every test: one thread, a fixed seed, Hypothesis's zeal, and who needs CUDA."""

from importlib.metadata import version

import hypothesis
import jaxtyping
import pytest
import torch

from tests.shapes import jaxtyped_once

torch.set_num_threads(1)

# Before ddnewton is imported, whose functions --jaxtyping-packages decorates.
jaxtyping.jaxtyped = jaxtyped_once(jaxtyping.jaxtyped)

hypothesis.settings.register_profile(
    "ddnewton",
    max_examples=25,
    deadline=None,  # the first derivative a process takes costs seconds
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # nothing depends on seconds
    derandomize=True,  # a failure is one that can be had again; search with the profile below
)
hypothesis.settings.register_profile(
    "search",
    hypothesis.settings.get_profile("ddnewton"),
    max_examples=200,
    derandomize=False,
)
hypothesis.settings.load_profile("ddnewton")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests marked ``cuda`` be tried where there is no CUDA device: ``--device cpu``."""
    parser.addoption("--device", default="cuda", help="where the tests marked cuda run")


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where the tests marked ``cuda`` run."""
    return torch.device(pytestconfig.getoption("--device"))


def pytest_report_header() -> str:
    """Say which versions are tested."""
    packages = ("torch", "jaxtyping", "numpy", "opt_einsum")
    return "versions: " + ", ".join(f"{package} {version(package)}" for package in packages)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start every test from the same random numbers; skip what needs a device that is not here."""
    on_cuda = item.get_closest_marker("cuda") and item.config.getoption("--device") == "cuda"
    if on_cuda and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
