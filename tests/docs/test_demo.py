"""The demo runs, prints what it promises, and leaves its figure; so does a run that is drawn."""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from ddnewton.__main__ import main
from ddnewton.demo import poisson_fits, vivit_example
from ddnewton.diagnostics import append
from ddnewton.trees import flattened


def test_one_epoch_and_one_second(tmp_path, capsys):
    before = torch.get_rng_state()
    short = ["--seconds", "1", "--epochs", "1", "--seed", "1"]
    assert main([*short, "--out", str(tmp_path / "new" / "folder")]) == 0
    printed, bar = capsys.readouterr()
    assert "match at rtol 1e-5, atol 1e-7: yes" in printed
    assert "mini-batches, but not the same time" in printed
    for name in ("damped Newton", "SGD", "Adam", "ddnewton.fit", "BFGS", "L-BFGS"):
        assert f"   {name}" in printed
    assert printed.count(" s for 22 steps") == 3
    figure = tmp_path / "new" / "folder" / "demo.png"
    assert str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert bar == ""
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mismatch_is_no_success(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vivit_example, "dense_step", lambda *problem: torch.zeros(88))
    assert main(["--out", str(tmp_path)]) == 1
    assert "NO" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_course_has_the_errors_and_the_seconds_of_its_method_alone():
    problem = poisson_fits.poisson_problem(0)
    watch, course = poisson_fits.observed(problem, torch.inf)
    for scale in (1.0, 2.0):
        watch({name: scale * leaf for name, leaf in problem.params.items()})
    assert (
        course.errors[0] == course.errors[1] == poisson_fits.solution_error(problem, problem.params)
    )
    assert course.errors[2] != course.errors[0]
    assert course.seconds == sorted(course.seconds)
    assert course.error_after(course.seconds[1]) == course.errors[1]
    assert course.error_after(torch.inf) == course.errors[2]
    watch, _ = poisson_fits.observed(problem, 0.0)
    with pytest.raises(StopIteration):
        watch(problem.params)


def test_all_methods_have_the_loss_of_the_fit():
    problem = poisson_fits.poisson_problem(0)
    first = poisson_fits.by_fit(problem, lambda params: None, updates=1)
    before, _ = poisson_fits.loss_and_gradient(problem, flattened(problem.params))
    after, gradient = poisson_fits.loss_and_gradient(problem, flattened(first.params))
    torch.testing.assert_close((first.info.loss, first.loss), (before, after))
    # The change of the loss along a direction is the gradient's.
    way = 1e-6 * gradient / gradient.norm()
    ends = [
        poisson_fits.loss_and_gradient(problem, flattened(first.params) + w)[0] for w in (way, -way)
    ]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, gradient.norm(), rtol=1e-6, atol=0)


def test_the_solution_solves_the_equation():
    points = torch.rand(5, 2, dtype=torch.float64)
    residual = poisson_fits.residual(
        None, points, net_fn=lambda _, x: poisson_fits.exact(x)[..., None]
    )
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-12, rtol=0)


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--seconds", "--epochs", "--seed", "--out", "plot"))


def test_no_epochs_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--epochs", "0"])
    assert "--epochs: must be at least 1; got 0" in capsys.readouterr().err


class Told(NamedTuple):
    loss: torch.Tensor
    damping: torch.Tensor


def log(path):
    for loss in (1.0, 0.5):
        append(path, Told(torch.tensor(loss), torch.tensor(0.1)), step=3)


def without(modules, *arguments):
    """Run the command line where some modules are missing."""
    hide = f"import sys; sys.modules |= dict.fromkeys({modules!r}); sys.argv[1:] = {arguments!r}; "
    run = "import runpy; runpy.run_module('ddnewton', run_name='__main__')"
    command = [sys.executable, "-c", hide + run]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("folder", "figure"), [("a.run", "a.run/history.png"), ("runs/b.c.jsonl", "runs/b.c.png")]
)
def test_a_run_is_drawn_beside_it(folder, figure, tmp_path, capsys):
    log(tmp_path / folder)
    assert main(["plot", str(tmp_path / folder)]) == 0
    assert capsys.readouterr().out == f"Figure of 2 steps: {tmp_path / figure}\n"
    assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_a_run_is_drawn_where_it_is_asked_for(tmp_path, capsys):
    log(tmp_path)
    assert main(["plot", "--out", str(tmp_path / "figure.pdf"), str(tmp_path)]) == 0
    assert f"{tmp_path / 'figure.pdf'}" in capsys.readouterr().out
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_a_run_that_cannot_be_drawn_is_named(tmp_path):
    file = tmp_path / "run.jsonl"
    with pytest.raises(SystemExit, match=r"^read: path must name a run.*run\.jsonl: No such file"):
        main(["plot", str(tmp_path)])
    file.touch()
    with pytest.raises(SystemExit, match=r"^overview: a run must have at least one step; got none"):
        main(["plot", str(tmp_path)])
    log(tmp_path)
    with pytest.raises(SystemExit, match=r"[Ff]ormat.*'?docx'?.*is not supported"):
        main(["plot", str(tmp_path), "--out", str(tmp_path / "figure.docx")])
    with pytest.raises(SystemExit, match=r"No such file or directory"):
        main(["plot", str(tmp_path), "--out", str(tmp_path / "none" / "figure.png")])
    file.write_text("loss 1.0\n")
    with pytest.raises(SystemExit, match=r"^read: line 1 of .*run\.jsonl must be a JSON object"):
        main(["plot", str(file)])
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_drawing_a_run_needs_matplotlib_alone(tmp_path):
    log(tmp_path)
    demos = ("sklearn", "sklearn.datasets", "tqdm", "scipy")
    ended = without(demos, "plot", str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    ended = without((*demos, "matplotlib"), "plot", str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("python -m pip install 'ddnewton[plot]'")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("module", "extra"), [("sklearn.datasets", "demo"), ("tqdm", "demo"), ("matplotlib", "plot")]
)
def test_a_missing_extra_is_named(module, extra):
    ended = without((module,))
    assert ended.returncode == 1
    assert f"pip install 'ddnewton[{extra}]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_library_needs_no_extra():
    code = """if True:
        import sys, torch  # which takes tqdm itself, where there is one
        before = {*sys.modules}
        import ddnewton
        print({"matplotlib", "sklearn", "scipy", "tqdm"} & ({*sys.modules} - before))
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
