"""A step on a prepared model under `torch.compile`, in one graph.

In a process of its own: the hook that checks shapes in the tests cannot be compiled.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from tests.models import problem
from torch.utils._pytree import tree_leaves
from ddnewton import newton_step, prepare, top_k

name, dtype = sys.argv[1], getattr(torch, sys.argv[2])
model_fn, params, X, y, criterion = problem(name, dtype)
prepared = prepare(model_fn, params, X)
number, tensor = 0.1, torch.tensor(0.1, dtype=dtype)
for delta, options in (
    (number, {}),
    (tensor, {"select": top_k(3)}),
    (number, {"select": top_k(3), "complement": 0.5}),
):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params, X, y):
        return newton_step(prepared, params, X, y, criterion, delta, **options)

    truth = newton_step(prepared, params, X, y, criterion, delta, **options)
    for one, other in zip(tree_leaves(step(params, X, y)), tree_leaves(truth), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
print("compiled")
"""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("relu_mlp", "float32"),
        ("relu_mlp", "float64"),
        ("convolution", "float32"),
        ("tied_autoencoder", "float64"),
    ],
)
def test_a_step_on_a_prepared_model_compiles_to_one_graph(name, dtype):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, dtype],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "compiled\n", result.stderr
