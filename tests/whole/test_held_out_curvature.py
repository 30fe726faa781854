"""Curvature of held-out samples, pushed forward or multiplied."""

import copy

import pytest
import torch
from torch import nn

from ddnewton import (
    directional_derivatives,
    empirical_fisher,
    ggn_eigh,
    gram_matrix,
    newton_step_and_info,
    top_k,
)
from tests.methods import DTYPES, FLOAT32, FLOAT64, SMALL_AND_LARGE, truth
from tests.models import PROBLEMS, Problem, normal, problem
from tests.reference import dense, error
from tests.whole.chosen_samples import (
    CHOICES,
    TOLERANCE,
    Choice,
    along,
    check_info,
    no_forward_mode,
    refuse,
    rows,
    truth_of,
)

PUSHED = [(name, "dense") for name in PROBLEMS if name != "one_sample"]
PUSHED += [(name, "structured") for name in ("relu_mlp", "many_points")]


@pytest.mark.parametrize(("name", "gram"), PUSHED)
def test_pushed_and_multiplied_slopes_agree(name, gram, monkeypatch):
    """The one is taken where directions are fewer than columns of a sample, the other elsewhere."""
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    given, reference = problem(name), truth(name)
    M = len(gram_matrix(*given)) // len(reference.slopes)
    for held, ggn in (([0, 1, 2], [2, 1]), ([2, 1], [0])):
        options = {"subsampling_ggn": ggn, "subsampling_curvature": held, "gram": gram}
        for k, chunk_size in ((1, None), (M, 1)):
            options |= {"select": top_k(k), "chunk_size": chunk_size}
            found = directional_derivatives(*given, **options)
            with monkeypatch.context() as patch:
                patch.setattr("ddnewton.quadratic.unseen_samples._pushed", no_forward_mode)
                multiplied = directional_derivatives(*given, **options)
            assert error(found, multiplied) < 1e-10
        E = rows(ggn_eigh(*given, select=top_k(1), subsampling_ggn=ggn, gram=gram)[1])
        expected = along(reference, E, Choice(None, ggn, held), None)
        one = directional_derivatives(*given, **options | {"select": top_k(1)})
        assert error(one.lambdas, expected.lambdas) < 1e-10


@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp", "many_points", "tuple_of_two"])
def test_which_way_is_taken(name, gram, monkeypatch):
    """Parameters without axes are pushed like all others."""
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    given = problem(name)
    M = len(gram_matrix(*given)) // len(truth(name).slopes)
    held = {"subsampling_ggn": [0, 1], "subsampling_curvature": [2], "gram": gram}
    with monkeypatch.context() as patch:
        patch.setattr("ddnewton.quadratic.unseen_samples._multiplied", refuse)
        directional_derivatives(*given, select=top_k(M), **held)
    with monkeypatch.context() as patch:
        patch.setattr("ddnewton.quadratic.unseen_samples._pushed", refuse)
        directional_derivatives(*given, select=top_k(M + 1), **held)
        directional_derivatives(*given, select=lambda evals: [], **held)
        directional_derivatives(*given, select=top_k(1), subsampling_curvature=[1])
        seen = held | {"subsampling_curvature": [1, 0]}
        directional_derivatives(*given, select=top_k(1), **seen)


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_directions_are_pushed_some_at_a_time(name, monkeypatch):
    given = problem(name)
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    options = {"select": top_k(2), "subsampling_ggn": [0, 1, 4], "subsampling_curvature": [2, 3]}
    expected = directional_derivatives(*given, **options)
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PUSHED_AT_ONCE", 1)
    assert error(directional_derivatives(*given, **options), expected) < 1e-12


def test_a_chunk_bounds_the_samples_that_directions_are_pushed_through(monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    given, sizes = problem("tanh_mlp"), set()

    def watched(p, x):
        sizes.add(len(x))
        return given.model_fn(p, x)

    options = {"subsampling_ggn": [0], "subsampling_curvature": range(1, len(given.X))}
    expected = directional_derivatives(*given, **options)
    found = directional_derivatives(watched, *given[1:], chunk_size=2, gram="dense", **options)
    assert len(given.X) > 3
    assert max(sizes) <= 2
    assert error(found.lambdas, expected.lambdas) < 1e-12


def test_shared_directions_have_the_same_curvature_however_many_are_asked_for(monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    for name in ("relu_mlp", "tanh_mlp", "convolution", "many_points"):
        held = {"subsampling_ggn": [0, 1], "subsampling_curvature": [3, 1, 2]}
        one, more = (
            directional_derivatives(*problem(name), select=top_k(k), **held).lambdas for k in (1, 9)
        )
        assert error(one[:, -1], more[:, -1]) < 1e-11


class Cube(torch.autograd.Function):
    """No forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class WrongForward(Cube):
    """A forward mode that is two thirds of what it should be."""

    calls = 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        WrongForward.calls += 1
        (x,) = ctx.saved_tensors
        return 2 * x**2 * tangent


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, X):
        return self.head(self.cell(X)[0][:, -1])


def with_cube(function):
    def model_fn(p, X):
        return function.apply(X @ p["a"]) @ p["b"]

    return model_fn


def plain_cube(p, X):
    return (X @ p["a"]) ** 3 @ p["b"]


def cubes(model_fn, samples: int) -> Problem:
    torch.manual_seed(3)
    params = {"a": normal(3, 2).double(), "b": normal(2, 3).double()}  # D = 12
    X, y = normal(samples, 3).double(), torch.arange(samples) % 3
    return Problem(model_fn, params, X, y, nn.CrossEntropyLoss())


@pytest.mark.parametrize("samples", [5, 15], ids=["Gram side", "parameter side"])
@pytest.mark.parametrize("function", [Cube, WrongForward])
def test_a_forward_mode_that_is_missing_or_wrong_is_not_used(function, samples, monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1e-6)
    given, reference = (
        cubes(with_cube(function), samples),
        dense(*cubes(plain_cube, samples)),
    )
    ggn = list(range(0, samples, 2)) if samples == 5 else list(range(12))
    WrongForward.calls = 0
    for choice in (Choice([1], ggn, [1, -2]), Choice(None, ggn, None), Choice([1], ggn, range(5))):
        for select in (top_k(1), top_k(2), top_k(5)):
            expected = truth_of(given, reference, choice, select=select)
            step, info = newton_step_and_info(*given, 0.1, select=select, **choice.options)
            check_info(info, expected, 0.1, reference, 1e-9)
            assert error(step, expected.step(0.1)) < 1e-9
    assert bool(WrongForward.calls) == (function is WrongForward)


@DTYPES
def test_recurrent_nets_have_held_out_curvature(dtype, monkeypatch):
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    from tests.models import of_module

    torch.manual_seed(0)
    module, X = Gated(), normal(5, 4, 2)
    y = torch.tensor([1, 0, 2, 1, 2])
    reference = dense(*of_module(copy.deepcopy(module), X, y, nn.CrossEntropyLoss(), FLOAT64))
    given = of_module(module, X, y, nn.CrossEntropyLoss(), dtype)
    for select in (top_k(1), top_k(2), top_k(4)):
        choice = Choice([1, 2], [0, 3], [4, 3])
        tolerance = 10 * TOLERANCE[dtype]
        expected = truth_of(given, reference, choice, tolerance, select=select)
        step, info = newton_step_and_info(*given, 0.1, select=select, **choice.options)
        check_info(info, expected, 0.1, reference, tolerance)
        assert error(step, expected.step(0.1)) < tolerance


@pytest.mark.parametrize("select", [top_k(1), top_k(4), None], ids=["1", "4", "all"])
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_large_models_in_float32_stay_in_float32(name, select, monkeypatch):
    monkeypatch.setattr("ddnewton.linearize.precision.CHEAP_FLOPS", 0)
    monkeypatch.setattr("ddnewton.quadratic.unseen_samples.PULLBACKS_PER_DIRECTION", 1)
    given, choice = problem(name, FLOAT32), Choice([3, 1], [0, 2, 1], [3, 0])
    options = {"select": select, "gram": "structured"}
    expected = truth_of(given, truth(name), choice, 1e-5, **options)
    step, info = newton_step_and_info(*given, 0.1, **options, **choice.options)
    assert error(info.gammas, expected.gammas) < 1e-5
    assert error(info.lambdas, expected.lambdas) < 1e-5
    assert error(step, expected.step(0.1)) < 1e-5


def test_the_empirical_fisher_matrix_of_samples():
    for name in ("relu_mlp", "more_columns_than_parameters"):
        given = problem(name)._replace(criterion=empirical_fisher(problem(name).criterion))
        g = truth(name).gradients
        for choice in CHOICES.values():
            evals, evecs = ggn_eigh(*given, select=top_k(2), **choice.of_the_ggn)
            E, mine = rows(evecs), g if choice.ggn is None else g[choice.ggn]
            assert error(mine.mT @ (mine @ E) / len(mine), E * evals) < 1e-10
            pair = directional_derivatives(*given, select=top_k(2), **choice.options)
            slopes = g if choice.grad is None else g[choice.grad]
            held = mine if choice.curvature is None else g[choice.curvature]
            assert error(pair.gammas, slopes @ E) < 1e-10
            assert error(pair.lambdas, (held @ E).square()) < 1e-10
