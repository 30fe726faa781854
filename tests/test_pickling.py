"""What users make is pickled and comes back the same: for processes, Ray and ``torch.save``.

The methods are those of methods.py, so that a new one is in it. What a user writes as a lambda is
not pickled.
"""

import copy
import io
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

from ddnewton import (
    criteria,
    directional_newton,
    majorized,
    monte_carlo,
    newton_step,
    prepare,
    top_k,
    weighted,
)
from ddnewton.optim import DirectionalNewton
from tests.methods import (
    ADAPTATIONS,
    CURVATURES,
    OF_RESIDUALS,
    OWN_LOSSES,
    READY_MADE,
    RULES,
    TORCH_LOSSES,
    seeded,
)
from tests.models import PROBLEMS, problem

COPIES = pytest.mark.parametrize(
    "copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"]
)


def step(name="tanh_mlp", criterion=None, damping=0.1, select=None):
    model_fn, params, X, y, usual = problem(name)
    return newton_step(model_fn, params, X, y, criterion or usual, damping, select=select)


def assert_same(one, other):
    (first, spec), (second, other_spec) = tree_flatten(one), tree_flatten(other)
    assert spec == other_spec
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@COPIES
@pytest.mark.parametrize("name", RULES)
def test_damping_rules(name, copied):
    rule = RULES[name].make()
    assert_same(step(damping=copied(rule)), step(damping=rule))


@COPIES
@pytest.mark.parametrize("name", READY_MADE)
def test_selections(name, copied):
    select = READY_MADE[name]
    assert_same(step(select=copied(select)), step(select=select))


@COPIES
@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_losses(name, copied):
    loss, outputs = TORCH_LOSSES[name], torch.linspace(-1, 1, 15).reshape(5, 3)
    record = loss.record("sum")
    assert_same(copied(record).expand(outputs, loss.y), record.expand(outputs, loss.y))


@COPIES
@pytest.mark.parametrize("make", OWN_LOSSES)
def test_losses_of_our_own(make, copied):
    outputs, y = torch.linspace(-1, 1, 10).reshape(5, 2), torch.ones(5)
    assert_same(copied(make()).fisher(outputs, y), make().fisher(outputs, y))


@COPIES
@pytest.mark.parametrize("name", CURVATURES)
def test_curvatures(name, copied):
    criterion = CURVATURES[name].make(nn.MSELoss(), 0)
    copies = copied(criterion)  # before the generator draws
    assert_same(step("many_points", copies), step("many_points", criterion))


@COPIES
@pytest.mark.parametrize(
    "make",
    [
        *(partial(kind.make, nn.HuberLoss(), 0) for kind in OF_RESIDUALS.values()),
        lambda: weighted(monte_carlo(nn.MSELoss(), 1, seeded()), 2.0),
        lambda: weighted(majorized(nn.SmoothL1Loss(beta=0.0)), torch.tensor(3.0)),
        lambda: criteria.as_loss(nn.MSELoss()),
        lambda: majorized(F.l1_loss),
    ],
    ids=["majorized", "drawn", "nested", "as_loss", "function"],
)
def test_criteria_of_criteria(make, copied):
    criterion = make()
    assert_same(step("many_points", copied(criterion), 1.0), step("many_points", criterion, 1.0))


def test_a_record_that_is_changed_by_hand_is_not_pickled_as_it_was_made():
    changed = criteria.mse()._replace(scores=None)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        pickle.dumps(changed)


@COPIES
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_updates(name, copied):
    model_fn, params, X, y, criterion = problem("tanh_mlp")
    prepared = prepare(model_fn, params, X)
    optimizer = directional_newton(prepared, criterion, ADAPTATIONS[name].make())
    again = copied(optimizer)
    results = []
    for one in (optimizer, again):
        moved, state = params, one.init(params)
        for _ in range(2):
            moved, state, info = copied(one.update(moved, state, X, y))
        results.append((moved, state, info))
    assert_same(*results)


@pytest.mark.parametrize("name", PROBLEMS)
def test_prepared_models(name):
    model_fn, params, X, y, criterion = problem(name, torch.float32)
    prepared = prepare(model_fn, params, X)
    again = pickle.loads(pickle.dumps(prepared))
    assert repr(again) == repr(prepared)
    assert_same(again(params, X), prepared(params, X))
    steps = [newton_step(f, params, X, y, criterion, 0.1) for f in (again, prepared)]
    assert_same(*steps)


@COPIES
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_optimizers_of_modules(name, copied):
    """With the module in it; a third copy goes through ``torch.save``."""
    torch.manual_seed(0)
    module, X, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), *torch.randn(2, 8, 2)
    X = torch.cat([X, X[:, :1].sin()], 1)
    optimizer = DirectionalNewton(
        module, monte_carlo(nn.MSELoss(), 1, seeded()), ADAPTATIONS[name].make(), select=top_k(8)
    )
    optimizer.step(X, y)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    several = [copied(optimizer), torch.load(buffer, weights_only=False), optimizer]
    losses = [[one.step(X, y) for _ in range(2)] for one in several]
    assert losses[0] == losses[1] == losses[2]
    assert_same(several[0].info, several[2].info)


SPAWNED = """
import pickle, sys
import torch
torch.set_num_threads(1)
optimizer, params, state, X, y = pickle.load(sys.stdin.buffer)
pickle.dump(optimizer.update(params, state, X, y), sys.stdout.buffer)
"""


def test_another_process_makes_the_same_update():
    model_fn, params, X, y, criterion = problem("relu_mlp")
    optimizer = directional_newton(prepare(model_fn, params, X), weighted(criterion, 2.0))
    sent = optimizer, params, optimizer.init(params), X, y
    result = subprocess.run(
        [sys.executable, "-c", SPAWNED],
        input=pickle.dumps(sent),
        stdout=subprocess.PIPE,
        check=True,
    )
    updated = pickle.loads(result.stdout)
    for one, other in zip(
        tree_leaves(updated), tree_leaves(optimizer.update(*sent[1:])), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, equal_nan=True)
