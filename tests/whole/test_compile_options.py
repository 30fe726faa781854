"""Every option under `torch.compile`: one graph for any N, or left alone by name.

The cases are in `compiled_options`, which runs in processes of its own.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddnewton.errors import sentence
from ddnewton.quadratic.compilable import SEEDS_REMEDY, SEEDS_RULE
from tests.whole.compiled_options import ALONE, DRAWN, OPTIONS

ROOT = Path(__file__).parents[2]
HAS_COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))
WAYS = {"graph": list(OPTIONS), "alone": list(ALONE), "drawn": list(DRAWN)}
if HAS_COMPILER:  # inductor writes C++: without a compiler, its case is left out
    WAYS["inductor"] = ["the reference example"]


def printed(*arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("way", WAYS)
def test_options(way):
    lines = printed("-m", "tests.whole.compiled_options", way, *WAYS[way]).splitlines()
    assert lines == WAYS[way]


def test_the_page_runs_and_quotes_what_is_said():
    page = (ROOT / "docs" / "compiled_steps.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    eagerly = "import functools, torch\n"
    eagerly += "torch.compile = functools.partial(torch.compile, backend='eager')\n"
    check = "assert step(params, X, y, torch.tensor(2.0)).keys() == s.keys() == params.keys()\n"
    printed("-c", f"{eagerly}{code}{check}print(float(info.loss_after) > 0)")
    said = sentence(SEEDS_RULE, "monte_carlo as criterion", SEEDS_REMEDY)
    assert said in " ".join(page.split())
