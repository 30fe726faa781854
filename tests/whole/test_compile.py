"""A step on a prepared model under `torch.compile`, in one graph, and whole updates.

In a process of its own: the hook that checks shapes in the tests cannot be compiled.
"""

import json
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

name, dtype, backend = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
model_fn, params, X, y, criterion = problem(name, dtype)
prepared = prepare(model_fn, params, X)
number, tensor = 0.1, torch.tensor(0.1, dtype=dtype)
cases = (
    (number, {}),
    (tensor * 1e-8, {}),
    (tensor, {"select": top_k(3)}),
    (number, {"select": top_k(3), "complement": 0.5}),
)
# Every case of one net; of the others a tensor and a number, without a selection and with one.
for delta, options in cases if name == "relu_mlp" else cases[1::2]:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def step(params, X, y):
        return newton_step(prepared, params, X, y, criterion, delta, **options)

    truth = newton_step(prepared, params, X, y, criterion, delta, **options)
    for one, other in zip(tree_leaves(step(params, X, y)), tree_leaves(truth), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
print("compiled")
"""

CRITERIA_SCRIPT = """
import torch
from ddnewton import newton_step, prepare
from ddnewton.criteria import (
    clipped, heteroscedastic_nll, majorized, weighted, with_curvature
)

def mean(outputs, y):
    return (outputs - y).square().mean()

def over_valid(outputs, y):
    valid = y > 0
    return torch.where(valid, (outputs - y) ** 2, 0).sum() / valid.sum()

def of_the_mean(outputs, y):
    return (outputs - y).mean(0).square().sum()

generator = torch.Generator().manual_seed(0)
params, X, y = torch.randn(3, 2, generator=generator), *torch.randn(2, 6, 3, generator=generator)
y = y[:, :2]
prepared = prepare(lambda w, x: torch.tanh(x @ w), params, X)

def compiled(criterion, y):
    torch.compiler.reset()
    step = lambda params, X, y: newton_step(prepared, params, X, y, criterion, 0.1)
    return torch.compile(step, fullgraph=True, backend="aot_eager")(params, X, y)

huber = majorized(lambda outputs, y: torch.nn.functional.huber_loss(outputs, y))
pairs = clipped(heteroscedastic_nll())
for criterion, targets in (
    (with_curvature(weighted(over_valid, 3.0), mean), y), (huber, y), (pairs, y[:, 0])
):
    truth = newton_step(prepared, params, X, targets, criterion, 0.1)
    torch.testing.assert_close(compiled(criterion, targets), truth, rtol=1e-6, atol=1e-9)
try:
    compiled(of_the_mean, y)
except RuntimeError as error:
    assert "samples interact" in str(error)
    print("compiled")
"""

UPDATES = """
import torch
from tests.models import problem
from torch.utils._pytree import tree_leaves
from ddnewton import directional_newton, held_out, levenberg_marquardt, prepare, trust_region

model_fn, start, X, y, criterion = problem("tanh_mlp", torch.float64)
prepared = prepare(model_fn, start, X)
for damping in (levenberg_marquardt(1e-9), trust_region(), held_out(every=2)):
    torch.compiler.reset()
    optimizer = directional_newton(prepared, criterion, damping)
    compiled = torch.compile(optimizer.update, backend="aot_eager")
    params, state, attempts = start, optimizer.init(start), []
    for _ in range(3):
        one, other = (f(params, state, X, y) for f in (compiled, optimizer.update))
        for a, b in zip(tree_leaves(one[:2]), tree_leaves(other[:2]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert one[2].attempts == other[2].attempts, (one[2], other[2])
        params, state, info = other
        attempts.append(info.attempts.item())
    print(attempts)
"""

DRAWN_UPDATES = """
import torch
from tests.models import problem
from torch.utils._pytree import tree_leaves
from ddnewton import directional_newton, held_out, monte_carlo, prepare

model_fn, start, X, y, criterion = problem("tanh_mlp", torch.float64)
prepared, graphs = prepare(model_fn, start, X), []

def keep(graph, _):
    graphs.append(graph)
    return graph.forward

def run(generator):
    drawn = monte_carlo(criterion, 1, generator)
    options = {"damping": held_out(1e-6, every=4), "complement": "damping"}
    optimizer = directional_newton(prepared, drawn, **options)
    return optimizer.update, start, optimizer.init(start)

sources = [torch.Generator().manual_seed(0) for _ in range(2)]
(update, *one), (uncompiled, *other) = map(run, sources)
compiled, attempts = torch.compile(update, backend=keep), []
for _ in range(7):
    *one, info = compiled(*one, X, y)
    *other, again = uncompiled(*other, X, y)
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert torch.equal(*(generator.get_state() for generator in sources))
    attempts.append(again.attempts.item())
    assert info.attempts == attempts[-1]
print([attempts, len([g for g in graphs if "uniform_numbers" in g.code])])
"""


def _printed(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("name", "dtype", "backend"),
    [
        ("relu_mlp", "float32", "aot_eager"),
        ("convolution", "float32", "eager"),
        ("tied_autoencoder", "float64", "eager"),
    ],
)
def test_a_step_on_a_prepared_model_compiles_to_one_graph(name, dtype, backend):
    assert _printed(SCRIPT, name, dtype, backend) == "compiled\n"


def test_callable_criteria_compile_to_one_graph_and_are_refused_where_samples_interact():
    assert _printed(CRITERIA_SCRIPT) == "compiled\n"


def test_a_compiled_update_is_the_update_with_its_search():
    searching = json.loads(_printed(UPDATES).splitlines()[0])
    assert max(searching) > 1  # a step that is not taken is followed by another


def test_a_compiled_update_draws_one_seed_however_long_it_searches():
    attempts, graphs = json.loads(_printed(DRAWN_UPDATES))
    assert graphs == 1
    assert max(attempts) > 1 == min(attempts)
