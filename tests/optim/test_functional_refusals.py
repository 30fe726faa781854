"""What the optimizer of pure functions and the dampings that adapt refuse."""

import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from ddnewton import Group, directional_newton, fixed, held_out, levenberg_marquardt
from ddnewton.damping import constant
from tests.methods import ADAPTATIONS, FLOAT32
from tests.models import problem
from tests.optim.textbook import optimizer_of

REFUSED = {
    "damping below zero": ({"damping": -1.0}, ValueError, "damping must be a number ≥ 0; got -1.0"),
    "damping nan": ({"damping": math.nan}, ValueError, "damping must be a number ≥ 0; got nan"),
    "damping a word": ({"damping": "x"}, TypeError, "damping must be a number ≥ 0; got 'x'"),
    "a maker": ({"damping": held_out}, TypeError, r"damping must be .* call it: held_out\(…\)"),
    "learning_rate zero": (
        {"learning_rate": 0.0},
        ValueError,
        "learning_rate must be positive; got 0.0",
    ),
    "learning_rate below": ({"learning_rate": -0.1}, ValueError, "learning_rate must be a number"),
    "learning_rate true": ({"learning_rate": True}, TypeError, "learning_rate must be a number"),
    "learning_rate a word": (
        {"learning_rate": "best"},
        ValueError,
        "learning_rate must be a number, a function or \"exact\"; got 'best'",
    ),
    "momentum one": ({"momentum": 1.0}, ValueError, "momentum must be below 1; got 1.0"),
    "momentum below": ({"momentum": -0.1}, ValueError, "momentum must be a number ≥ 0; got -0.1"),
    "momentum a word": (
        {"momentum": "best"},
        ValueError,
        "momentum must be a number from 0 to below 1, or \"exact\"; got 'best'",
    ),
    "momentum a list": ({"momentum": [0.9]}, TypeError, "momentum must be a number ≥ 0"),
    "weight_decay": ({"weight_decay": -1.0}, ValueError, "weight_decay must be a number ≥ 0"),
    "weight_decay none": ({"weight_decay": None}, TypeError, "weight_decay must be a number ≥ 0"),
    "trust_radius": ({"trust_radius": 0.0}, ValueError, "trust_radius must be positive; got 0.0"),
    "trust_radius a word": ({"trust_radius": "1"}, TypeError, "trust_radius must be a number"),
    "complement a word": (
        {"complement": "all"},
        ValueError,
        "complement must be a positive number, \"damping\" or None; got 'all'",
    ),
    "complement zero": ({"complement": 0.0}, ValueError, "complement must be positive; got 0.0"),
    "select": ({"select": 3}, TypeError, "select must be a function or None; got 3"),
    "gram": ({"gram": "fast"}, ValueError, "gram must be one of .*; got 'fast'"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
    "chunk_size 1.5": ({"chunk_size": 1.5}, TypeError, "chunk_size must be an integer or None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_optimizer_refuses(case):
    given = problem("relu_mlp", FLOAT32)
    options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"^directional_newton: {message}"):
        optimizer_of(given, **options)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"^directional_newton: model_fn must be a function; got 3"):
        directional_newton(3, nn.MSELoss())
    message = "^directional_newton: model_fn must take params and X; got the module Linear"
    with pytest.raises(TypeError, match=message):
        directional_newton(nn.Linear(1, 1), nn.MSELoss())


MAKERS = {
    "fixed": (lambda: fixed(-1.0), ValueError, "fixed: damping must be a number ≥ 0; got -1.0"),
    "fixed none": (lambda: fixed(None), TypeError, "fixed: damping must be a number ≥ 0; got None"),
    "fixed rule": (lambda: fixed(lambda x: x), TypeError, "fixed: damping must be .* evals, evecs"),
    **{
        f"{make.__name__} {name}": (
            lambda make=make, keywords=keywords: make(**keywords),
            kind,
            f"{make.__name__}: {message}",
        )
        for make in (one.function for one in ADAPTATIONS.values() if one.adapts)
        for name, keywords, kind, message in (
            ("start", {"start": 0.0}, ValueError, "start must be positive; got 0.0"),
            ("start below", {"start": -1.0}, ValueError, "start must be a number ≥ 0; got -1.0"),
            ("start a word", {"start": "1"}, TypeError, "start must be a number ≥ 0; got '1'"),
            ("rule", {"rule": -1.0}, ValueError, "rule must be a number ≥ 0; got -1.0"),
            ("rule a word", {"rule": "1"}, TypeError, "rule must be a number ≥ 0; got '1'"),
            ("a wrong rule", {"rule": constant}, TypeError, r"rule must be .* constant\(…\)"),
        )
    },
    "fraction one": (lambda: held_out(1.0), ValueError, "held_out: fraction must be less than 1"),
    "fraction 0": (lambda: held_out(0.0), ValueError, "held_out: fraction must be positive; got 0"),
    "every 0": (lambda: held_out(every=0), ValueError, "held_out: every must be at least 1; got 0"),
    "every 1.5": (lambda: held_out(every=1.5), TypeError, "held_out: every must be an integer"),
    "every true": (lambda: held_out(every=True), TypeError, "held_out: every must be an integer"),
    "no grid": (lambda: held_out(grid=()), (TypeError, ValueError), "held_out: grid must be a seq"),
    "a number": (lambda: held_out(grid=1.0), TypeError, "held_out: grid must be a sequence of pos"),
    "a grid with 0": (lambda: held_out(grid=(1.0, 0.0)), ValueError, "held_out: grid must be posi"),
}


@pytest.mark.parametrize("case", MAKERS)
def test_what_dampings_refuse(case):
    make, kind, message = MAKERS[case]
    with pytest.raises(kind, match=f"^{message}"):
        make()


def test_what_init_refuses():
    optimizer = optimizer_of(problem("relu_mlp"))
    for params, kind, message in (
        ({}, ValueError, "params must hold at least one tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "params must hold floating-point"),
        ({"a": 1.0}, TypeError, "params must hold floating-point tensors only"),
    ):
        with pytest.raises(kind, match=f"^init: {message}"):
            optimizer.init(params)


STATE = "state must be of the same parameters, and of an optimizer with the same momentum"


def test_what_update_refuses():
    given, other = problem("relu_mlp"), problem("tanh_mlp")
    plain, heavy = optimizer_of(given), optimizer_of(given, momentum=0.9)
    state = plain.init(given.params)
    batch = (given.X, given.y)
    with pytest.raises(
        TypeError, match=r"^update: state must be a State; got dict. Pass what init"
    ):
        plain.update(given.params, state._asdict(), *batch)
    with pytest.raises(TypeError, match=r"^update: state must be a State; got tuple"):
        plain.update(given.params, tuple(state), *batch)
    with pytest.raises(ValueError, match=f"^update: {STATE}"):
        heavy.update(given.params, state, *batch)
    with pytest.raises(ValueError, match=f"^update: {STATE}"):
        plain.update(given.params, heavy.init(given.params), *batch)
    with pytest.raises(ValueError, match=f"^update: {STATE}"):
        heavy.update(given.params, heavy.init(other.params), *batch)
    with pytest.raises(ValueError, match=r"^update: X and y must hold the same number of samples"):
        plain.update(given.params, state, given.X, given.y[:2])
    with pytest.raises(TypeError, match=r"^update: X and y must be tensors or pytrees"):
        plain.update(given.params, state, [1.0], given.y)
    with pytest.raises(ValueError, match=r"^update: params must hold at least one tensor"):
        plain.update({}, state, *batch)
    with pytest.raises(ValueError, match=r"^update: subsampling_ggn must hold distinct indices"):
        optimizer_of(given, subsampling_ggn=[7]).update(given.params, state, *batch)
    with pytest.raises(ValueError, match=r"^update: a group must name parameters that there are"):
        optimizer_of(given, groups=[Group("none")]).update(given.params, state, *batch)
    with pytest.raises(ValueError, match=r"^update: the outputs of model_fn must be finite"):
        plain.update(tree_map(lambda x: x * math.nan, given.params), state, *batch)
    with pytest.raises(TypeError, match=r"^update: X and y must be tensors"):
        optimizer_of(given, held_out(every=1)).update(
            given.params, optimizer_of(given, held_out()).init(given.params), [1.0], given.y
        )


@pytest.mark.parametrize("damping", [fixed, lambda rule: levenberg_marquardt(rule=rule)])
@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda evals: [0.1] * len(evals), TypeError, "damping must return a tensor of shape"),
        (lambda evals: 0.1, TypeError, "damping must return a tensor of shape"),
        (lambda evals: evals.numpy(), TypeError, "damping must return a tensor of shape"),
        (lambda evals: None, TypeError, "damping must return a tensor of shape"),
        (lambda evals: evals[:1], ValueError, "damping must return one value for each of the K"),
        (lambda evals: 0 * evals - 1e-6, ValueError, "damping must not be negative or nan"),
    ],
)
def test_what_rules_must_not_return(answer, kind, message, damping):
    given = problem("relu_mlp")
    optimizer = optimizer_of(given, damping(lambda evals, *_: answer(evals)))
    with pytest.raises(kind, match=f"^update: {message}"):
        optimizer.update(given.params, optimizer.init(given.params), given.X, given.y)
