"""The first step of a process: it imports no compiler, which would take it seconds."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from torch import nn
from torch.func import functional_call
from ddnewton import damping, directional_newton, newton_step, newton_step_and_info, trust_region

net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
params = {name: p.detach() for name, p in net.named_parameters()}
model_fn = lambda p, x: functional_call(net, p, (x,))
X, y, loss = torch.randn(8, 4), torch.randint(0, 3, (8,)), nn.CrossEntropyLoss()
if sys.argv[1] == "step":
    newton_step(model_fn, params, X, y, loss, 0.1)
if sys.argv[1] == "record":
    newton_step_and_info(model_fn, params, X, y, loss, damping.relative(0.1))
if sys.argv[1] == "update":
    optimizer = directional_newton(model_fn, loss, trust_region())
    optimizer.update(params, optimizer.init(params), X, y)
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & {*sys.modules}))
"""


@pytest.mark.parametrize("call", ["step", "record", "update"])
def test_it_imports_no_compiler(call):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, call], capture_output=True, text=True, check=False
    )
    assert result.stdout == "[]\n", result.stderr
