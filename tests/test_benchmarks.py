"""The benchmarks run, every peer agrees with the truth, and both files say so; no times."""

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_plan, gpu_tests, nets, ranks_model, several_processes, wheels

ROOT = Path(__file__).parents[1]
QUANTITIES = ("top10", "all", "eigenvalues")
PEERS = {
    "ddnewton": QUANTITIES,
    "ddnewton-unprepared": ("top10",),
    "ddnewton-dense": ("top10",),
    "jacrev": QUANTITIES,
}


def command(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module of the benchmarks as its users do."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def bench(folder: Path, *arguments: str) -> tuple[dict, str]:
    """Run the command line; return what it wrote, as data and as a table."""
    ended = command("bench", "--threads", 1, "--output", folder, *arguments)
    assert ended.returncode == 0, ended.stderr
    written = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return written, (folder / "bench.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_quick(tmp_path):
    written, table = bench(tmp_path / "new", "--quick", "--device", "cpu")
    records = written["records"]
    assert {record["status"] for record in records} == {"ok"}
    asked = {(r["problem"], r["peer"], r["quantity"]) for r in records}
    assert len(asked) == len(records)
    assert asked == {
        (problem, peer, quantity)
        for problem in ("reference", "tiny-conv")
        for peer, quantities in (PEERS | {"floor": QUANTITIES}).items()
        for quantity in quantities
    }
    for record in records:
        assert record["seconds"] > 0
        if record["peer"] in PEERS:
            assert record["difference"] < (1e-6 if "ddnewton" in record["peer"] else 1e-4)
            assert record["runs"] == 2
            assert record["peak"] >= 0
    assert written["machine"]["threads"] == 1
    assert table.count("### ") == 2
    assert all(f"| {peer} |" in table for peer in PEERS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_what_cannot_run_is_an_entry(tmp_path):
    arguments = ("--quick", "--problem", "tiny-conv", "--peer", "jacrev", "--minutes", "0")
    written, table = bench(tmp_path, *arguments)
    assert {r["status"] for r in written["records"]} == {"not run: the time was up"}
    assert "not run: the time was up" in table


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)
def test_compiled_steps():
    ended = command("compiled_steps", "--turns", 1, "--problem", "reference")
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("|")[1:5] for line in ended.stdout.splitlines() if line.startswith("| ref")]
    assert {name.strip() for _, name, *_ in rows} == {
        *("ddnewton, prepared", "ddnewton, compiled", "vmap(jacrev)"),
        "ddnewton, compiled, without guards on globals",
        *(name for name, module in (("ViViT", "vivit"), ("netket", "netket")) if find_spec(module)),
    }
    assert all(float(ms) > 0 for *_, ms, _ in rows)


def test_small_fits():
    ended = command("small_fits", "--updates", 1, "--problem", "poisson2d", "reference")
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("|")[1:4] for line in ended.stdout.splitlines() if line.startswith("|")]
    peers = {peer.strip(): float(ms) for peer, ms, _ in rows if ms.strip()[0].isdigit()}
    assert {"torch.func", "ddnewton", "ddnewton, prepared, one trial"} <= set(peers)
    assert all(ms > 0 for ms in peers.values())


def test_leading_directions():
    ended = command("leading_directions", "--quick")
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("|")[1:-1] for line in ended.stdout.splitlines() if line.startswith("| ")]
    expected = [(side, k) for side in (32, 400) for k in (1, 10, 50, 100) if k <= side]
    assert [(int(row[0]), int(row[1])) for row in rows[1:]] == expected
    for row in rows[1:]:
        _, _, eigh, subset, *ours = row
        assert (subset.strip() != "–") == (find_spec("scipy") is not None)
        assert all(float(cell) > 0 for cell in (eigh, *ours))


def test_gradient_steps():
    options = ("--net", "digits", "--samples", 16, "--rounds", 1, "--exact")
    ended = command("gradient_steps", *options)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| digits")]
    rows = [[entry.strip() for entry in line.split("|")[2:-1]] for line in lines]
    methods = ["gradient step, Adam", "Monte-Carlo step", "held-out Monte-Carlo update"]
    assert [row[0] for row in rows] == [*methods, "Levenberg-Marquardt update"]
    for _, milliseconds, ratio, _, calls, reads in rows:
        assert float(milliseconds) > 0
        assert float(ratio) > 0
        assert min(int(count) for count in calls.split(",") + reads.split(",")) > 0
    # A choice asks for more.
    without, chosen = map(int, rows[2][4].split(","))
    assert without < chosen


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_large_problems(tmp_path):
    ended = command("large_problems", "--quick", "--json", tmp_path / "large.json")
    assert ended.returncode == 0, ended.stderr
    records = json.loads((tmp_path / "large.json").read_text(encoding="utf-8"))["records"]
    asked = {(r["problem"], r["quantity"], r["way"]) for r in records}
    assert len(asked) == len(records)
    steps = {"tiny GPT": "step, δ = 0.1 λ", "tiny PINN": "step, δ = 0.01 λ"}
    assert asked == {
        (problem, quantity, way)
        for problem, step in steps.items()
        for quantity in ("product", step, "eigenpairs")
        for way in ("ddnewton", "curvlinops + SciPy", "ddnewton, exact")
        if way != "ddnewton, exact" or (problem == "tiny PINN" and quantity != "product")
    }
    for record in records:
        if record["way"] == "curvlinops + SciPy" and not all(
            map(find_spec, ("curvlinops", "scipy"))
        ):
            assert record["status"] == "not installed"
            continue
        assert record["status"] == "ok"
        assert record["runs"] == 1
        assert record["seconds"] >= 0
        assert record["peak"] >= 0
        # How right it is, and that what is told of a step is no less than the truth.
        assert record["error"] < (1e-2 if "step" in record["quantity"] else 1e-5)
        if "told" in record:
            assert record["error"] <= record["told"] <= 1e-2
    assert ended.stdout.count("| tiny ") == 6


def test_large_problems_must_be_known():
    ended = command("large_problems", "--only", "huge")
    assert ended.returncode == 2
    assert "--only must name beginnings of GPT, V = 1000, N = 4" in ended.stderr


def test_several_processes(tmp_path):
    ended = command("several_processes", "--quick", "--json", tmp_path / "ranks.json")
    assert ended.returncode == 0, ended.stderr
    records = json.loads((tmp_path / "ranks.json").read_text(encoding="utf-8"))["records"]
    tasks = several_processes.QUICK
    asked = [(r["problem"], r["samples"], r["quantity"], r["prepared"]) for r in records]
    assert asked == [tuple(task) for task in tasks]
    for record in records:
        assert record["ranks"] == 2
        assert record["runs"] == 1
        assert min(record["seconds"], record["seconds_of_ranks"]) > 0
        # Products in float32 are summed in another order, to a tolerance of the step.
        assert record["difference"] < (1e-3 if record["quantity"] == "free" else 1e-6)
        assert {"orders", "results"} < set(record["sent"])
    # The matrix of the parameters is summed once, with the gradient and a place for failures.
    d = 7 * 5 + 5 + 5 * 5 + 5 + 5 * 3 + 3
    assert records[-1]["sent"]["matrices"] == 8 * (d**2 + d + 1)
    assert ended.stdout.count("| tiny-") == 4
    assert ended.stdout.count("| reference |") == 1


def test_several_processes_must_be_of_problems_that_are_there():
    ended = command("several_processes", "--only", "huge")
    assert ended.returncode == 2
    assert "--only must name beginnings of mlp, 3c3d-128, pinn; got ['huge']" in ended.stderr


def test_the_model_on_paper():
    ended = command("several_processes", "--model")
    assert ended.returncode == 0, ended.stderr
    rows = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(ranks_model.NETS) * len(ranks_model.COUNTS)
    assert {len(row) for row in rows} == {len(ranks_model.HEADINGS)}
    # The nets are those of torch, but that their layers leave out biases.
    for net, module in (("MLP", nets.mlp(784, 512, 256, 10)), ("3c3d", nets.net_3c3d())):
        sizes, _ = ranks_model.NETS[net]
        matrices = [p for p in module.parameters() if p.dim() > 1]
        assert sizes.parameters == sum(p.numel() for p in module.parameters())
        assert [(x.outputs, x.inputs) for x in sizes.layers] == [
            (len(p), p[0].numel()) for p in matrices
        ]


def test_bytes_on_paper_of_two_ranks():
    net = ranks_model.Net(ranks_model.dense(4, 3, 2), 23, 2, 1)
    # Columns of 6 samples each: one rank passes all of its factors, the other one half of them.
    sent = ranks_model.bytes_of(net, 12, 2)
    assert sent["columns"] == (6 + 3) * (4 + 3 + 3 + 2) * 4
    # The second rank has its 6 columns with themselves, and half of those with the others.
    assert sent["tiles"] == (6 * 6 + 6 * 3) * 8
    assert sent["sums"] == 24 * 8
    assert ranks_model.bytes_of(net, 12, 1) == {}
    # On the side of the parameters one matrix, and no columns.
    sent = ranks_model.bytes_of(net, 24, 2)
    assert sent["matrices"] == (23**2 + 23 + 1) * 8
    assert "columns" not in sent


# --- on a GPU -------------------------------------------------------------------------------

GPU_PEERS = ("jacrev", "ddnewton", "floor", "ddnewton-compiled", "curvlinops")
SINGLE = ("ddnewton-compiled", "curvlinops")
A_TEST = "tests/test_cuda.py::test_an_ensemble_under_vmap"


def gpu(folder: Path, *arguments: object) -> tuple[dict, str]:
    """Run the command line on the CPU; return what it wrote, as data and as a table."""
    options = ("--device", "cpu", "--quick", "--output", folder)
    ended = command("gpu", *options, *arguments)
    assert ended.returncode == 0, ended.stderr
    written = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    return written, (folder / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_gpu_quick(tmp_path):
    asked = ("--only", "tests", "steps", "--peer", *GPU_PEERS, "--tests", A_TEST)
    written, table = gpu(tmp_path / "new", *asked)
    assert [tests["words"] for tests in written["tests"]] == ["2 passed, 0 failed, 0 skipped"]
    entries = {(r["problem"], r["precision"], r["quantity"], r["peer"]) for r in written["steps"]}
    assert entries == {
        (problem, precision, quantity, peer)
        for problem in ("tiny-mlp", "tiny-conv")
        for peer in GPU_PEERS
        for precision in (("float32",) if peer in SINGLE else ("float64", "float32"))
        for quantity in (("all",) if peer == "curvlinops" else ("top10", "all"))
        # Each problem, and each quantity, is compiled once.
        if peer != "ddnewton-compiled" or (quantity == "all") == (problem == "tiny-conv")
    }
    assert len(entries) == len(written["steps"])
    for record in written["steps"]:
        if record["peer"] == "curvlinops" and find_spec("curvlinops") is None:
            assert record["status"] == "not installed"
            continue
        assert record["status"] == "ok"
        assert record["seconds"] > 0
        if record["peer"] == "floor":
            assert record["seconds"] == pytest.approx(sum(record["parts"].values()))
            assert set(record["rates"]) == {"float64", "float32", "TF32"}
            continue
        assert record["runs"] == 2
        if (record["peer"], record["precision"]) == ("jacrev", "float64"):
            assert record["difference"] is None
        else:
            exact = record["peer"] == "ddnewton" and record["precision"] == "float64"
            assert record["difference"] < (1e-12 if exact else 1e-5)
    assert written["machine"]["torch"] == torch.__version__
    assert table.count("### ") == 2
    assert all(f"| {peer} |" in table for peer in GPU_PEERS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_gpu_waits_accuracy_ratios_batches_and_training(tmp_path):
    sections = ("syncs", "accuracy", "ratios", "largest", "poisson")
    written, table = gpu(tmp_path, "--only", *sections)
    assert set(written) == {"machine", *sections}
    # Where a value is read on the host is told by file and function; what is compiled hides it.
    for record in written["syncs"]:
        assert record["status"] == "ok"
        if record["way"] == "prepared":
            assert record["waits"] == sum(record["places"].values()) > 0
            assert all(".py:" in place for place in record["places"])
            assert record["profile"]["calls of torch"] > 0
    assert [r["way"] for r in written["syncs"]] == [*["prepared"] * 4, "compiled"]
    for record in written["accuracy"]:
        assert record["status"] == "ok"
        assert len(record["errors"]) == len(record["dampings"])
        assert max(record["errors"]) < 1e-5
    (ratios,) = written["ratios"]
    assert ratios["ratios"]["gradient step, Adam"] == 1.0
    assert [r["samples"] for r in written["largest"]] == [4, 4]
    assert [r["updates"] for r in written["poisson"]] == [1, 2]
    assert all(r["error"] > 0 for r in written["poisson"])
    assert table.count("\n## ") == len(sections)


def test_gpu_when_the_time_is_up(tmp_path):
    written, table = gpu(tmp_path, "--peer", "ddnewton", "--minutes", 0)
    records = [r for name, section in written.items() if name != "machine" for r in section]
    told = {r.get("status", r.get("words")) for r in records}
    assert told == {"not run: the time was up"}
    assert "not run: the time was up" in table


def test_time_is_shared_with_what_comes_after():
    first, last = gpu_plan.Task("tests"), gpu_plan.Task("poisson")
    shares = {first: 3.0, last: 1.0}
    assert gpu_plan.shared(80.0, shares, first) == 60.0
    assert gpu_plan.shared(50.0, shares, last) == 50.0
    assert gpu_plan.shared(math.inf, shares, last) == math.inf
    # Six minutes are enough for all of them.
    assert sum(gpu_plan.SECTIONS.values()) <= 355.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_without_a_gpu_says_what_to_do():
    ended = command("gpu")
    assert ended.returncode == 1
    assert "--device must be one that torch has; got cuda" in ended.stderr


def test_tests_that_fail_or_do_not_end_are_told_of(tmp_path):
    given = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    file = tmp_path / "test_sums.py"
    file.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.cuda\n"
        "def test_right(): assert 1 + 1 == 2\n"
        "def test_wrong(): assert 1 + 1 == 3\n",
        encoding="utf-8",
    )
    names = [str(ROOT / A_TEST), str(file)]
    told = gpu_tests.run_tests(names, "cpu", math.inf, tmp_path, os.environ | given)
    assert told["words"] == "3 passed, 1 failed, 0 skipped"
    assert [(name.split("::")[1], words) for name, words in told["failures"].items()] == [
        ("test_wrong", "assert (1 + 1) == 3")
    ]
    cut_off = gpu_tests.run_tests(names, "cpu", 0.0, tmp_path / "new", os.environ | given)
    assert cut_off["words"] == "not run: the time was up"


def test_the_marked_tests_are_the_ones_of_cuda():
    files = ["tests/test_cuda.py", "tests/whole/test_host_data.py"]
    assert gpu_tests.marked_files() == files


def test_only_what_is_missing_is_unpacked(tmp_path):
    for name in ("numpy-9.9-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "answer = 42")
    target = tmp_path / "target"
    assert wheels.unpack(tmp_path, target) == ["no_such_package-1.0-py3-none-any.whl"]
    assert [path.name for path in target.iterdir()] == ["no_such_package"]
    with pytest.raises(SystemExit, match="--wheels must name a folder of wheels"):
        wheels.unpack(tmp_path / "nothing", target)
