"""Steps of many samples, or of many columns, in bounded memory, as a process of its own shows."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import jvp

from ddnewton import newton_step
from ddnewton.columns import tiles
from ddnewton.linearize import independence
from ddnewton.linearize.independence import evaluate
from tests.models import normal, of_module
from tests.reference import error, flat

FLOAT64 = torch.float64
LINUX = Path("/proc/self/clear_refs").exists()

MEASURED = """
import json, re, sys
import torch
from pathlib import Path
from ddnewton import newton_step
from tests.whole import test_bounded_memory as cases

torch.set_num_threads(1)

def kilobytes(name):
    return int(re.findall(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[0])

case = getattr(cases, sys.argv[1])
newton_step(*case(40), 1.0)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
newton_step(*case(int(sys.argv[2])), 1.0)
print(json.dumps((kilobytes("VmHWM") - before) / 1024))
"""


def pinn(n):
    """The Laplacian of a net of 1,185 parameters at n points."""
    sizes = [2, 32, 32, 1]
    pairs = pairwise(sizes)
    params = [(normal(o, i).double() / i**0.5, normal(o).double() / 10) for i, o in pairs]

    def net(p, X):
        for weight, bias in p[:-1]:
            X = (X @ weight.T + bias).tanh()
        return X @ p[-1][0].T + p[-1][1]

    def laplacian(p, X):
        total = torch.zeros_like(X[:, :1])
        for axis in range(2):
            along = torch.zeros_like(X)
            along[:, axis] = 1

            def slope(x, along=along):
                return jvp(lambda z: net(p, z), (x,), (along,))[1]

            total = total + jvp(slope, (X,), (along,))[1]
        return total

    X = torch.rand(n, 2, dtype=FLOAT64, generator=torch.Generator().manual_seed(1))
    y = -(torch.pi * X).sin().prod(1, keepdim=True)
    return laplacian, params, X, y, nn.MSELoss()


def classifier(n):
    """Three columns for each of n samples, along 10,504 parameters."""
    net = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 4))
    return tuple(
        of_module(net, normal(n, 100), normal(n, 4).argmax(1), nn.CrossEntropyLoss(), FLOAT64)
    )


def sentence(n):
    """The 31 columns of each of n tokens, which a net takes by themselves once they are mixed."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 32), nn.Linear(64, 32)
            self.hidden = nn.Linear(32, 64)

        def forward(self, X):
            x = self.embed(X).cumsum(1) / n
            return self.head(self.hidden(x).tanh()).movedim(-1, 1)

    X, y = torch.randint(32, (2, 1, n), generator=torch.Generator().manual_seed(0))
    return tuple(of_module(Causal(), X, y, nn.CrossEntropyLoss(), FLOAT64))


def extra_mebibytes(case, n):
    """The memory of a step at its peak, beside that of a process that has made a small one."""
    command = [sys.executable, "-c", MEASURED, case, str(n)]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not LINUX, reason="peaks are measured as Linux tells them")
def test_points_without_number_take_300_mebibytes():
    assert extra_mebibytes("pinn", 30_000) <= 300


@pytest.mark.skipif(not LINUX, reason="peaks are measured as Linux tells them")
def test_columns_take_one_copy_of_their_matrix():
    side = 3 * 1700
    assert extra_mebibytes("classifier", 1700) <= 1.3 * 8 * side**2 / 2**20 + 150


@pytest.mark.skipif(not LINUX, reason="peaks are measured as Linux tells them")
def test_columns_of_tokens_hold_no_zeros_of_other_tokens():
    side = 31 * 96
    assert extra_mebibytes("sentence", 96) <= 1.3 * 8 * side**2 / 2**20 + 150


def test_many_samples_are_run_some_at_a_time(monkeypatch):
    counts = []

    def model_fn(p, X):
        counts.append(len(X))
        return (X @ p).tanh()

    params, X = normal(3, 2).double(), normal(5000, 3).double()
    model = evaluate(model_fn, params, X, None)
    assert counts == [independence.WATCHED_SAMPLES, 5000 - independence.WATCHED_SAMPLES]
    assert model.at_once is None or model.at_once >= 5000 - independence.WATCHED_SAMPLES
    # Where results are large beside a chunk.
    counts.clear()
    monkeypatch.setattr(independence, "CHUNK_BYTES", 2**16)
    model = evaluate(model_fn, params, X, None)
    assert max(counts) == independence.WATCHED_SAMPLES == model.at_once
    assert sum(counts) == 5000
    assert error(model.outputs, (X @ params).tanh()) < 1e-14
    # A number asked for is the number taken.
    counts.clear()
    assert evaluate(model_fn, params, X, 2500).at_once == 2500
    assert counts == [2500, 2500]


@pytest.mark.parametrize("size", [100, 1000])
def test_points_in_chunks_give_the_step_of_all(size):
    *problem, y, criterion = pinn(1500)
    whole = newton_step(*problem, y, criterion, 1e-2, chunk_size=1500)
    chunked = newton_step(*problem, y, criterion, 1e-2, chunk_size=size)
    assert error(flat(chunked), flat(whole)) < 1e-12


@pytest.mark.parametrize("chunk_size", [None, 11])
def test_tiles_give_the_step_of_all(chunk_size, monkeypatch):
    net = nn.Sequential(nn.Conv1d(2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(40, 12))
    given = of_module(
        net, normal(40, 2, 10), normal(40, 12).argmax(1), nn.CrossEntropyLoss(), FLOAT64
    )
    whole = newton_step(*given, 1e-2)
    monkeypatch.setattr(tiles, "TILE_COLUMNS", 30)
    tiled = newton_step(*given, 1e-2, chunk_size=chunk_size)
    assert error(flat(tiled), flat(whole)) < 1e-12
