"""On a device a step reads its values once, at its end; whatever they say happens all the same."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddnewton import (
    directional_derivatives,
    host_reads,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
)
from ddnewton.quadratic.matrix_free import ways
from tests.models import problem
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
