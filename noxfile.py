"""The project's tasks: ``nox`` checks everything; ``nox -s demo`` shows the library."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests", "notebooks"]

PROJECT = nox.project.load_toml("pyproject.toml")

# pip reads PIP_FIND_LINKS, separated by spaces; uv looks elsewhere, separated by commas.
if links := os.environ.get("PIP_FIND_LINKS"):
    os.environ.setdefault("UV_FIND_LINKS", ",".join(links.split()))

# Small matrices gain nothing from threads, and threads that wait for a busy core lose much.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# The torch that all numbers and messages of the documents are of.
TESTED = "torch==2.13.0"


def install(session: nox.Session, *groups: str, versions: Sequence[str] = (TESTED,)) -> None:
    """Install torch, the package and the named dependency groups, resolved together."""
    tools = nox.project.dependency_groups(PROJECT, *groups)
    session.install(*versions, "-e", ".[demo]", *tools)


def of_tests(session: nox.Session) -> dict[str, str]:
    """Let processes keep the bytecode of what they import, whatever is set outside.

    Tests start some two hundred of them, and torch takes 4 seconds longer from its sources.
    """
    kept = str(session.cache_dir.resolve() / "bytecode")
    return ONE_THREAD | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": kept}


def run_tests(session: nox.Session) -> None:
    """Run pytest with the shapes checked; its first lines say which versions it runs on."""
    checked = "--jaxtyping-packages=ddnewton,tests.shapes.check_shapes"
    # Neighbours share what is cached, so that each process takes a stretch of the list.
    shared = ("--numprocesses=auto", "--dist=worksteal")
    session.run("pytest", *shared, checked, *session.posargs, env=of_tests(session))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, the doctests and the notebooks; arguments go to pytest."""
    install(session, "tests")
    run_tests(session)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest versions that pyproject.toml promises; downloads gigabytes."""
    promised = PROJECT["project"]["dependencies"]
    install(session, "tests", versions=[lowest.replace(">=", "==") for lowest in promised])
    run_tests(session)


@nox.session(venv_backend="virtualenv")
def newest(session: nox.Session) -> None:
    """Run the tests with the newest torch that pip takes; downloads gigabytes."""
    install(session, "tests", versions=["--upgrade", "torch"])
    run_tests(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the format, the style, the types, which module imports which, and the house."""
    install(session, "lint")
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("mypy")
    session.run("lint-imports")
    session.run("python", "-m", "tests.house")


@nox.session
def house(session: nox.Session) -> None:
    """Measure the house: layers, chains, functions, names."""
    session.run("python", "-m", "tests.house", *session.posargs)


@nox.session
def notebooks(session: nox.Session) -> None:
    """Run the notebooks alone; ``-- FILE`` runs one and stores its new outputs."""
    install(session, "tests")
    if session.posargs:
        session.run("jupyter", "execute", "--inplace", *session.posargs, env=of_tests(session))
    else:
        session.run("pytest", "tests/docs/test_notebooks.py", env=of_tests(session))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into build/site, and look at it in a browser; Chromium must be installed."""
    install(session, "docs")
    session.run("python", "-m", "website")
    session.run("pytest", "website", "--numprocesses=auto", *session.posargs)


@nox.session
def package(session: nox.Session) -> None:
    """Build the package into dist/, check it, and try each archive in an environment of its own."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    archives = sorted(Path("dist").iterdir())
    session.run("twine", "check", "--strict", *map(str, archives))
    for archive in archives:
        environment = Path(session.create_tmp()) / archive.suffix
        session.run("uv", "venv", "--clear", environment, external=True)
        python = environment / "bin" / "python"
        session.run("uv", "pip", "install", "--python", python, archive, TESTED, external=True)
        session.run(python, "-P", "tests/smoke.py", ".", external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Run ``python -m ddnewton``; arguments go to it."""
    install(session)
    session.run("python", "-m", "ddnewton", *session.posargs)


# Peers whose dependencies name torchvision, which does not import beside a CPU build of torch.
ALONE = (
    "backpack-for-pytorch==1.7.1",
    "curvlinops-for-pytorch",
    "nngeometry",
    "vivit-for-pytorch==1.0.0",
)
JAX = ("netket", "python-somax")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure time, memory and accuracy beside the peers; arguments go to the benchmark."""
    install(session, "bench")
    session.install("--no-deps", *ALONE)
    session.install(*JAX, success_codes=range(256))  # a peer that is missing is an entry
    session.run("python", "-m", "benchmarks.bench", *session.posargs)


@nox.session
def large(session: nox.Session) -> None:
    """Measure what no matrix fits, beside curvlinops and SciPy; arguments go to the benchmark."""
    install(session, "bench")
    session.install("--no-deps", *ALONE)
    session.run("python", "-m", "benchmarks.large_problems", *session.posargs, env=ONE_THREAD)


@nox.session
def ranks(session: nox.Session) -> None:
    """Measure steps of several processes beside one; arguments go to the benchmark."""
    install(session)
    session.run("python", "-m", "benchmarks.several_processes", *session.posargs, env=ONE_THREAD)


# Peers of the trainings, taken without what they depend on besides torch.
TRAINERS = ("pytorch-optimizer", "torch-levenberg-marquardt")


@nox.session
def train(session: nox.Session) -> None:
    """Train the same nets by our methods and by others; arguments go to the benchmark."""
    install(session)
    for packages in (("--no-deps", *TRAINERS), ("pytorch-lightning",)):  # the second's needs
        session.install(*packages, success_codes=range(256))  # one that is missing is told
    module = "benchmarks.training.train"
    session.run("python", "-m", module, *session.posargs, env=ONE_THREAD)
