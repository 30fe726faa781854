"""The training benchmark runs, is resumed and told of; its equations, grids and seeds are right."""

import gzip
import json
import math
import os
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, hessian, vmap

from benchmarks import nets
from benchmarks.problem import Problem
from benchmarks.training import (
    aims,
    data,
    installed_packages,
    pdes,
    results,
    train,
    training_tables,
)
from benchmarks.training.competitors import COMPETITORS, gauss_newton_cg
from benchmarks.training.grids import GRIDS, SHIPPED, SIZE
from benchmarks.training.instances import Instance, batches
from benchmarks.training.learning_curve import (
    METHODS,
    Clock,
    Job,
    follow,
    on_schedule,
    score,
    sized,
    stops,
    times,
)
from benchmarks.training.tasks import SEEDS, TASKS, TUNING_SEEDS
from benchmarks.training.updates import Finished, flat, moved

ROOT = Path(__file__).parents[1]
TASKS_TRIED = ("poisson-1d", "engd-poisson-2d", "poisson-10d", "digits", "late-digits")
METHODS_TRIED = (
    "Adam",
    "Adam, cosine",
    "trust region, as shipped",
    "constant",
    "held-out, as shipped",
    "Monte-Carlo steps",
    "SSBroyden",
    "ENGD",
    "SPRING",
    "spring, as shipped",
    "SciPy L-BFGS-B",
)
OPTIONS = ("--quick", "--workers=1", "--task", *TASKS_TRIED, "--method", *METHODS_TRIED)


def command(folder: Path) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.train", *OPTIONS, "--out", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_quick_runs_then_has_nothing_left_to_do(tmp_path):
    command(tmp_path)
    done = train.read(tmp_path / "runs.jsonl")
    ran = {(run["stage"], run["task"], run["method"]) for run in done.values()}
    for name in TASKS_TRIED:
        for method in set(METHODS_TRIED) & set(GRIDS[TASKS[name].kind]) - set(TASKS[name].without):
            assert ("report", name, method) in ran
            shipped = GRIDS[TASKS[name].kind][method] == SHIPPED
            assert (("tune", name, method) in ran) != shipped
    for run in done.values():
        assert run["status"] == "ok"
        assert run["steps"] == 3
        assert [point["steps"] for point in run["curve"]] == [0, 1, 2, 3]
        assert all(math.isfinite(point["train"]) for point in run["curve"])
        assert {"valid", "test"} == set(run["reached"]) or run["task"] != "digits"
    table = (tmp_path / "training.md").read_text(encoding="utf-8")
    assert all(f"## {name}, 2 seeds" in table for name in TASKS_TRIED)
    assert all(f"| {method} |" in table for method in METHODS_TRIED)
    assert all(f"- ({letter})" in table for letter in "bcdefg")
    groups = ("pde", "drawn", "images", "late")
    assert all((tmp_path / f"{group}.png").stat().st_size for group in groups)
    assert "error after 20 s 10 times smaller on 2 equations" in table

    runs = tmp_path / "runs.jsonl"
    *kept, last = runs.read_text(encoding="utf-8").splitlines()
    runs.write_text("\n".join([*kept, last[:50]]), encoding="utf-8")  # cut off in mid-line
    assert "\n1 new runs" in command(tmp_path)
    assert train.read(runs).keys() == done.keys()


def test_plan_takes_less_than_five_hours_on_two_cores():
    plan = train.Plan(train.arguments([]))
    assert set(plan.names) == set(TASKS)
    assert sum(minutes for _, minutes in plan.minutes(2).values()) < 300


def test_a_package_that_is_missing_is_told_of_and_not_run(monkeypatch):
    monkeypatch.setitem(installed_packages.PACKAGES, "SOAP", ("no_such_package",))
    assert "SOAP" not in train.Plan(train.arguments([])).grids("engd-heat")
    told = training_tables.absent("engd-heat", {})
    assert "SOAP: not installed (no_such_package)." in told


def test_a_task_that_counts_steps_is_tuned_over_fewer():
    about = [Job(stage, "poisson-10d", "SOAP", {}, 0, 0.0).about for stage in ("tune", "report")]
    assert [task.steps for task in about] == [100, 400]
    assert stops(10, 40) == set(range(11))
    assert {1, 100, 200, 400} <= stops(400, 40)
    assert len(stops(400, 40)) <= 42
    assert max(stops(400, 40)) == 400


@pytest.mark.parametrize("kind", GRIDS)
def test_every_grid_has_one_size(kind):
    for method, grid in GRIDS[kind].items():
        assert method in METHODS
        assert grid == SHIPPED if "as shipped" in method else len(grid) == SIZE
        assert len({json.dumps(config) for config in grid}) == len(grid)


def test_no_reported_seed_is_one_of_tuning():
    assert not set(SEEDS) & set(TUNING_SEEDS)
    for task in TASKS.values():
        assert 5 <= task.seeds <= len(SEEDS)
        assert 1 <= task.tuning_seeds <= len(TUNING_SEEDS)


@pytest.mark.parametrize("name", pdes.EQUATIONS)
def test_the_exact_solution_solves_the_equation(name):
    equation = pdes.EQUATIONS[name]
    X = torch.rand(50, equation.axes, dtype=torch.float64)

    def u(x):
        return equation.exact(x[None])[0]

    first = vmap(grad(u))(X)
    second = vmap(hessian(u))(X).diagonal(dim1=1, dim2=2)
    assert equation.residual(X, pdes.Jet(equation.exact(X), first, second)).abs().max() < 1e-10


@pytest.mark.parametrize("name", pdes.EQUATIONS)
def test_an_ansatz_has_the_boundary_values_and_its_own_derivatives(name):
    equation = pdes.EQUATIONS[name]
    net = nets.mlp(equation.axes, 8, 8, 1, activation=torch.nn.Tanh).double()
    params = {key: p.detach() for key, p in net.named_parameters()}
    grid = pdes.fine_grid(equation.axes)
    edge = (grid[:, 0] == 0) | (grid[:, 0] == 1)
    if equation.axes == 2:
        edge |= grid[:, 1] == 0
        edge |= (grid[:, 1] == 1) & (name != "heat")
    gap = (equation.ansatz(params, grid).value - equation.exact(grid))[edge]
    assert gap.abs().max() < 1e-14

    def u(x):
        x = x[None]
        value = functional_call(net, params, (x,))[:, 0] * equation.factor(x).value
        return (value if equation.fixed is None else value + equation.fixed(x).value)[0]

    X = torch.rand(20, equation.axes, dtype=torch.float64)
    jet = equation.ansatz(params, X)
    torch.testing.assert_close(jet.value, vmap(u)(X))
    torch.testing.assert_close(jet.first, vmap(grad(u))(X))
    torch.testing.assert_close(jet.second, vmap(hessian(u))(X).diagonal(dim1=1, dim2=2))


def small_instance(criterion, y, outputs: int = 3) -> Instance:
    net = nets.mlp(4, 3, outputs, activation=torch.nn.Tanh).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    X = torch.randn(len(y), 4, dtype=torch.float64)

    def measure(params):
        return {"train": float(criterion(model_fn(params, X), y))}

    def model_fn(params, X):
        return functional_call(net, params, (X,))

    return Instance(Problem(model_fn, params, X, y, criterion), None, measure)


@pytest.mark.parametrize("name", ["MSELoss", "CrossEntropyLoss"])
def test_many_iterations_of_gauss_newton_cg_are_the_dense_solve(name):
    torch.manual_seed(0)
    n, delta = 12, 1e-2
    y = torch.randint(3, (n,)) if name == "CrossEntropyLoss" else torch.randn(n, 3).double()
    problem = small_instance(getattr(torch.nn, name)(), y).problem
    X = problem.X
    start = flat(problem.params)
    zeros = {key: torch.zeros_like(p) for key, p in problem.params.items()}

    def outputs(vector):
        return problem.model_fn(moved(zeros, vector), X).flatten()

    def loss(f):
        return problem.criterion(f.view(n, 3), y)

    J, f = torch.func.jacrev(outputs)(start), outputs(start)
    G, g = J.T @ hessian(loss)(f) @ J, J.T @ grad(loss)(f)
    dense = -torch.linalg.solve(G + delta * torch.eye(len(g)).double(), g)
    move = gauss_newton_cg(problem, problem.params, X, y, delta=delta, iterations=200)
    assert (move.step - dense).norm() < 1e-8 * dense.norm()
    torch.testing.assert_close(move.loss, loss(f))
    torch.testing.assert_close(move.predicted, -(g @ dense + dense @ G @ dense / 2))


def test_newton_cg_lowers_a_full_batch_loss_at_every_step():
    torch.manual_seed(0)
    instance = small_instance(torch.nn.MSELoss(), torch.randn(20, 3).double())
    X, y = instance.problem.X, instance.problem.y
    update = COMPETITORS["Gauss-Newton CG"](instance, delta=1e-3, iterations=30)
    losses = [instance.measure(update(X, y, 0.0)[0])["train"] for _ in range(20)]
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < losses[0] / 2


def test_cosine_ends_at_rest():
    instance = small_instance(torch.nn.MSELoss(), torch.randn(20, 3).double())
    X, y = instance.problem.X, instance.problem.y
    update = COMPETITORS["Adam, cosine"](instance, lr=0.1)
    moves = []
    for progress in (0.0, 0.5, 1.0):
        before = flat(update(X, y, progress)[0]).detach().clone()
        moves.append((flat(update(X, y, progress)[0]) - before).norm())
    assert moves[0] > moves[1] > 0 == moves[2]


def test_parts_of_the_data_are_disjoint_and_drawn_by_the_seed():
    parts = data.digits(3)
    rows = [tuple(row.tolist()) for X, _ in parts for row in X]
    assert len(rows) == 1797
    assert len(set(rows)) == len(
        {tuple(row.tolist()) for row in data.digits(4).train[0]} | set(rows)
    )
    assert (data.digits(3).test[1] == parts.test[1]).all()
    assert not torch.equal(data.digits(4).test[1], parts.test[1])


@pytest.fixture
def no_fashion_kept():
    data._fashion.cache_clear()
    yield
    data._fashion.cache_clear()


def test_fashion_is_read_from_its_files(tmp_path, monkeypatch, no_fashion_kept):
    for part, n in (("train", 20), ("t10k", 10)):
        pixels, labels = torch.arange(n).repeat_interleave(784), torch.arange(n) % 10
        for kind, header, content in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            packed = gzip.compress(bytes(header) + bytes(content.tolist()))
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(packed)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    parts = data.fashion(0, flat=False, test=5)
    assert [X.shape[0] for X, _ in parts] == [18, 2, 5]
    for X, y in parts:
        assert X.shape[1:] == (1, 28, 28)
        assert torch.equal((255 * X[:, 0, 0, 0]).round().long() % 10, y)
    assert data.fashion(0, flat=True).train[0].shape == (18, 784)


def test_without_fashion_there_are_digits(monkeypatch, caplog, no_fashion_kept):
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    monkeypatch.setattr(data, "FOLDERS", ())
    parts = data.fashion(0, flat=False)
    assert "digits" in caplog.text
    assert [X.shape for X, _ in parts] == [(n, 1, 28, 28) for n in (1258, 139, 400)]


def test_an_epoch_of_batches_takes_every_sample_once():
    y = torch.arange(10)
    problem = small_instance(torch.nn.MSELoss(), y).problem._replace(X=y[:, None])
    draws = batches(Instance(problem, 5, dict), 0)
    assert torch.equal(torch.cat([next(draws)[1] for _ in range(2)]).sort().values, y)


def test_a_run_is_measured_at_every_budget_and_its_clock_counts_updates_alone():
    task = TASKS["poisson-1d"]
    assert set(task.budgets) <= set(times(task, 30.0))
    assert max(times(task, 8.0)) == 8
    clock = Clock()
    ask = on_schedule(task, clock, 30.0)
    measured = []
    for made in range(400):
        clock.seconds, clock.last = 0.1 * made, 0.1
        now, ended, progress = ask(made)
        measured += [clock.seconds] if now else []
        assert progress == clock.seconds / 30
        if ended:
            break
    assert all(min(abs(t - budget) for t in measured) <= 0.051 for budget in task.budgets)
    assert abs(measured[-1] - 30) <= 0.051


def test_settings_may_ask_for_batches_of_another_size():
    y = torch.arange(10)
    problem = small_instance(torch.nn.MSELoss(), y).problem._replace(X=y[:, None])
    instance, settings = sized(Instance(problem, 2, dict), {"batches": 3, "lr": 0.1})
    assert settings == {"lr": 0.1}
    assert len(next(batches(instance, 0))[1]) == 6
    assert sized(instance, {"lr": 0.1})[0].batch == 6


def reaching(method: str, seconds: float, accuracy: float) -> dict[str, list[dict]]:
    end = {"seconds": 20.0, "steps": 100, "test_accuracy": accuracy}
    run = {"status": "ok", "seconds": 20.0, "curve": [end], "reached": {"test": (10, seconds)}}
    return {method: [run]}


@pytest.mark.parametrize(("seconds", "accuracy", "word"), [(4.9, 0.9, "yes"), (5.1, 0.89, "no")])
def test_aims_of_seconds_and_accuracy_are_in_units_of_adam(seconds, accuracy, word):
    methods = reaching("Adam", 1.0, 0.9) | reaching("Monte-Carlo steps", seconds, accuracy)
    (line,) = aims.in_seconds("fashion-mlp", methods, 5.0)
    assert f"**{word}**; Monte-Carlo steps {seconds} s, Adam 1 s, {seconds} times" in line
    (line,) = aims.at_the_end("fashion-2c2d", methods)
    assert f"**{word}**; Monte-Carlo steps {100 * accuracy:.1f} %, Adam 90.0 %" in line


def test_monte_carlo_steps_lower_the_loss_with_a_falling_rate():
    torch.manual_seed(0)
    y = torch.randint(3, (60,))
    instance = small_instance(torch.nn.CrossEntropyLoss(), y)._replace(batch=30)
    start = METHODS["Monte-Carlo steps"]
    update = start(instance, damping=0.1, learning_rate=0.5, momentum=0.5)
    curve = [instance.measure(instance.problem.params)["train"]]
    for X, target in islice(batches(instance, 0), 30):
        curve.append(instance.measure(update(X, target, 0.0)[0])["train"])
    assert curve[-1] < curve[0] - 0.05


def test_what_diverges_or_raises_counts_as_failed():
    torch.manual_seed(0)
    instance = small_instance(torch.nn.MSELoss(), torch.randn(20, 3).double())
    job = Job("tune", "diabetes", "SGD", {"lr": 1e6, "momentum": 0.9}, 0, 0.05, quick=True)
    record = follow(job, instance, COMPETITORS["SGD"])
    assert record["status"] == "diverged"
    assert score(record, TASKS["diabetes"]) == math.inf
    assert results.value(record, "train", 0.05) == math.inf

    def broken(instance):
        def update(X, y, progress):
            raise ValueError("no step\nat all")

        return update

    record = follow(job._replace(config={}), instance, broken)
    assert record["status"] == "failed: ValueError: no step"
    assert results.failures([record]) == 1


def test_a_method_that_has_finished_stays_where_it_is_until_the_end():
    torch.manual_seed(0)
    instance = small_instance(torch.nn.MSELoss(), torch.randn(20, 3).double())

    def short(instance):
        calls = iter(range(2))

        def update(X, y, progress):
            if next(calls, None) is None:
                raise Finished
            return instance.problem.params, 1

        return update

    record = follow(Job("report", "diabetes", "SGD", {}, 0, 50.0), instance, short)
    assert (record["status"], record["steps"]) == ("ok", 2)
    assert record["curve"][-1]["seconds"] == 50 > record["finished"] > 0
    assert results.milliseconds([record | {"seconds": 50.0}]) < 50_000 / 2
    assert results.after([record], "train", 2).median == record["curve"][0]["train"]


def test_spread_and_paired_differences():
    assert results.spread([3.0, math.inf, 1.0]) == (3.0, 1.0, math.inf)
    runs, baseline = (
        [
            {"seed": seed, "status": "ok", "curve": [{"test": 1.0}, {"test": 1.0 + by + seed}]}
            for seed in range(2)
        ]
        for by in (0.5, 0.25)
    )
    assert results.paired(runs, baseline, "test") == (0.25, 0.0)
