"""The demo runs, prints what it promises, and leaves its figure."""

import subprocess
import sys

import pytest
import torch

from ddnewton import demo
from ddnewton.__main__ import main


def test_one_epoch(tmp_path, capsys):
    before = torch.get_rng_state()
    assert main(["--epochs", "1", "--seed", "1", "--out", str(tmp_path / "new" / "folder")]) == 0
    printed, bar = capsys.readouterr()
    assert "match at rtol 1e-5, atol 1e-7: yes" in printed
    assert "mini-batches, but not the same time" in printed
    for name in ("damped Newton", "SGD", "Adam"):
        assert f"   {name}" in printed
    assert printed.count(" s for 22 steps") == 3
    figure = tmp_path / "new" / "folder" / "demo.png"
    assert str(figure) in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert bar == ""
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mismatch_is_no_success(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "dense_step", lambda *problem: torch.zeros(88))
    assert main(["--out", str(tmp_path)]) == 1
    assert "NO" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--epochs", "--seed", "--out"))


def test_no_epochs_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--epochs", "0"])
    assert "--epochs: must be at least 1; got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "extra"), [("sklearn.datasets", "demo"), ("tqdm", "demo"), ("matplotlib", "plot")]
)
def test_a_missing_extra_is_named(module, extra):
    hide = f"import sys; sys.modules['{module}'] = None; sys.argv = ['ddnewton']; "
    run = "import runpy; runpy.run_module('ddnewton', run_name='__main__')"
    ended = subprocess.run(
        [sys.executable, "-c", hide + run], capture_output=True, text=True, check=False
    )
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
