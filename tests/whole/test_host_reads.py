"""On a device a step reads its values once, at its end; whatever they say happens all the same."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddnewton import (
    directional_derivatives,
    directional_newton,
    held_out,
    host_reads,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    spring,
    top_k,
)
from ddnewton.quadratic.matrix_free import ways
from tests.models import problem
from tests.optim.textbook import growth
from tests.reference import error

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}


class Reads(TorchDispatchMode):
    """Counts the values that are read on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Let steps on a CPU read their values as those elsewhere do."""
    monkeypatch.setattr(ways, "read_once", lambda call, device: host_reads.with_one_read(call))


def drawn(criterion):
    return monte_carlo(criterion, 1, torch.Generator().manual_seed(0))


CALLS = {
    "one damping": (newton_step, {"damping": 0.1}, 1),
    "complement": (newton_step, {"damping": 0.1, "complement": 0.1}, 1),
    "top k": (newton_step, {"damping": 0.1, "select": top_k(3)}, 1),
    "a rule": (newton_step, {"damping": lambda e, *_: 0.1 + 0 * e, "select": top_k(3)}, 1),
    "info": (newton_step_and_info, {"damping": 0.1, "select": top_k(3)}, 1),
    # All live directions, of which there are as many as their values say.
    "every direction": (newton_step, {"damping": lambda e, *_: 0.1 + 0 * e}, 2),
    "derivatives": (directional_derivatives, {"select": top_k(3)}, 1),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_prepared_call_reads_once(call, as_on_a_device):
    function, options, expected = CALLS[call]
    model_fn, params, X, y, criterion = problem("relu_mlp", torch.float64)
    prepared = prepare(model_fn, params, X)
    with Reads() as reads:
        function(prepared, params, X, y, criterion, **options)
    assert reads.count == expected


def test_a_drawn_column_reads_its_seed_as_well(as_on_a_device):
    model_fn, params, X, y, criterion = problem("relu_mlp", torch.float64)
    prepared, loss = prepare(model_fn, params, X), drawn(criterion)
    with Reads() as reads:
        newton_step(prepared, params, X, y, loss, 0.1, complement=0.1)
    assert reads.count == 2  # the seed is a number of a generator on the host


@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "poisson"])
@pytest.mark.parametrize(
    "options", [{}, {"select": top_k(3)}, {"complement": 0.5}], ids=["all", "top k", "complement"]
)
def test_the_step_is_the_same(name, options, as_on_a_device, monkeypatch):
    given = problem(name, torch.float64)
    step = newton_step(*given, 0.1, **options)
    monkeypatch.undo()
    assert error(step, newton_step(*given, 0.1, **options)) < 1e-14


@pytest.mark.parametrize("bad", ["target", "input", "parameter"])
def test_what_is_wrong_is_refused_as_ever(bad, as_on_a_device, monkeypatch):
    model_fn, params, X, y, criterion = problem("relu_mlp", torch.float64)
    if bad == "target":
        y = y + 100
    elif bad == "input":
        X = X.index_fill(0, torch.tensor([1]), torch.nan)
    else:
        params = {name: p / 0 for name, p in params.items()}
    call = partial(newton_step, model_fn, params, X, y, criterion, 0.1)
    with pytest.raises(ValueError, match="must") as at_the_end:
        call()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must") as at_once:
        call()
    assert str(at_the_end.value) == str(at_once.value)


def test_what_no_factorization_resolves_goes_by_eigenpairs(as_on_a_device, monkeypatch):
    given = problem("relu_mlp", torch.float64)
    step = newton_step(*given, 1e-12)
    monkeypatch.undo()
    assert error(step, newton_step(*given, 1e-12)) < 1e-10


UPDATES = {
    "held out": (problem("relu_mlp", torch.float64), {"damping": held_out(every=2)}),
    "momentum": (problem("tanh_mlp", torch.float64), {"damping": 0.1, "momentum": 0.5}),
    "spring": (problem("many_points", torch.float64), {"damping": spring()}),
    # The first trials lead to where the loss is not finite.
    "rescue": (growth(), {"damping": 1e-9, "momentum": 0.5}),
    "not taken": (growth(), {"damping": spring(1e-12)}),
}


def updated(name):
    """The states and the records of three updates."""
    given, options = UPDATES[name]
    optimizer = directional_newton(given.model_fn, given.criterion, **options)
    params, state = given.params, optimizer.init(given.params)
    results = []
    for _ in range(3):
        params, state, info = optimizer.update(params, state, given.X, given.y)
        results += [params, state, info]
    return results


@pytest.mark.parametrize("name", UPDATES)
def test_the_update_is_the_same(name, as_on_a_device, monkeypatch):
    results = updated(name)
    attempts = [int(info.attempts) for info in results[2::3]]
    assert max(attempts) > 1 or name not in ("rescue", "not taken")
    monkeypatch.undo()
    for on_a_device, here in zip(tree_leaves(results), tree_leaves(updated(name)), strict=True):
        torch.testing.assert_close(on_a_device, here, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_an_update_settles_what_was_asked_with_its_verdict(as_on_a_device):
    given = problem("relu_mlp", torch.float64)
    prepared = prepare(given.model_fn, given.params, given.X)
    optimizer = directional_newton(prepared, given.criterion, 0.1, momentum=0.5)
    state = optimizer.init(given.params)
    with Reads() as reads:
        info = optimizer.update(given.params, state, given.X, given.y)[2]
    assert reads.count == 1
    assert bool(info.accepted)


def test_what_is_wrong_with_an_update_is_refused_as_ever(as_on_a_device):
    given = problem("relu_mlp", torch.float64)
    optimizer = directional_newton(given.model_fn, given.criterion, 0.1, momentum=0.5)
    state = optimizer.init(given.params)
    X = given.X.index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(ValueError, match="update: the outputs of model_fn must be finite"):
        optimizer.update(given.params, state, X, given.y)
