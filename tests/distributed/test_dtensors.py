"""Parameters that are DTensors: steps, eigenpairs and updates are those of whole tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import ddnewton
from ddnewton import Batches, Group, directional_newton, fit, top_k
from ddnewton.damping import relative
from tests import reference
from tests.distributed.meshes import (
    gathered,
    mesh_of,
    placed,
    placed_tree,
    same_on_all,
    texts_of,
)

LOSSES = {"mse": nn.MSELoss(), "cross-entropy": nn.CrossEntropyLoss()}

# Neither 5 nor 3 rows can be divided by two or four ranks.
SHAPES = {"w": (5, 4), "b": (5,), "scale": (5,), "v": (3, 5), "c": (3,)}

PLACES = {
    "rows": {"w": "0", "b": "0", "scale": "0", "v": "0", "c": "0"},
    "columns": {"w": "1", "b": "r", "scale": "r", "v": "1", "c": "r"},
    "plain among them": {"w": "0", "b": "0", "scale": "", "v": "1", "c": ""},
}

SQUARE = {"w": "01", "b": "0r", "scale": "rr", "v": "r1", "c": "00"}

CALLS = {
    "one damping": {"damping": 0.1, "complement": 0.1},
    "one damping, in the range": {"damping": 0.05},
    "leading directions": {"damping": 0.1, "select": top_k(3)},
    "a rule": {"damping": relative(0.3), "select": top_k(4)},
    "another damping outside": {"damping": 0.1, "select": top_k(3), "complement": 0.7},
}

GROUPS = [Group("w"), Group(["b", "v"], damping=0.3)]


def net(p, x):
    return torch.tanh(x @ p["w"].T + p["b"]) * p["scale"] @ p["v"].T + p["c"]


def params(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def batch(loss="mse"):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    if loss == "mse":
        return X, torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return X, torch.randint(3, (6,), generator=generator)


def dense(loss):
    return reference.dense(net, params(), *batch(loss), LOSSES[loss])


def arguments_on_mesh(texts, inputs="", loss="mse"):
    """The problem, placed."""
    X, y = batch(loss)
    X = placed(X, inputs, mesh_of(len(inputs) or 1))
    return net, placed_tree(params(), texts), X, y, LOSSES[loss]


def steps(rank, texts, inputs, loss, calls):
    """The steps of some calls, whole; how they are placed; and their records."""
    problem = arguments_on_mesh(texts, inputs, loss)
    results = {}
    for name, options in calls.items():
        step, info = ddnewton.newton_step_and_info(*problem, tol=1e-24, **options)
        results[name] = gathered(step), texts_of(step), info
    return results


def check_steps(results, texts, loss):
    for name, options in CALLS.items():
        step, places, _ = results[0][name]
        assert places == texts
        assert reference.error(step, reference.step(dense(loss), **options)) < 1e-10, name
    assert same_on_all([{name: result[::2] for name, result in of.items()} for of in results])


@pytest.mark.parametrize("texts", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("inputs", ["", "r", "0"], ids=["plain", "replicated", "sharded"])
def test_steps_of_two_ranks(two, texts, inputs):
    check_steps(two.results(steps, texts, inputs, "mse", CALLS), texts, "mse")


@pytest.mark.parametrize("inputs", ["", "0"], ids=["plain", "sharded"])
def test_steps_of_cross_entropy(two, inputs):
    texts = PLACES["plain among them"]
    check_steps(two.results(steps, texts, inputs, "cross-entropy", CALLS), texts, "cross-entropy")


@pytest.mark.parametrize(
    ("texts", "inputs"),
    [(PLACES["rows"], "0"), (SQUARE, ""), (SQUARE, "0r")],
    ids=["a rank without rows", "a square", "a square and inputs"],
)
def test_steps_of_four_ranks(four, texts, inputs):
    check_steps(four.results(steps, texts, inputs, "mse", CALLS), texts, "mse")


def test_groups_have_blocks_of_their_own(two):
    call = {"groups": {"damping": 0.1, "complement": 0.2, "groups": GROUPS}}
    (step, places, _), _ = (
        of["groups"] for of in two.results(steps, PLACES["rows"], "", "mse", call)
    )
    problem, sizes = (
        dense("mse"),
        {name: torch.Size(shape).numel() for name, shape in SHAPES.items()},
    )
    columns = dict(
        zip(SHAPES, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True)
    )
    expected = torch.zeros(sum(sizes.values()), dtype=torch.float64)
    for names, damping in ((["w"], 0.1), (["b", "v"], 0.3)):
        of_block = torch.cat([columns[name] for name in names])
        block = problem._replace(jacobians=problem.jacobians[:, :, of_block])
        expected[of_block] = reference.step(block, damping, complement=0.2)
    assert places == PLACES["rows"]
    assert reference.error(step, expected) < 1e-10


def eigenpairs(rank, texts):
    evals, evecs = ddnewton.ggn_eigh(*arguments_on_mesh(texts), select=top_k(3), tol=1e-12)
    problem = arguments_on_mesh(texts, "0")
    derivatives = ddnewton.directional_derivatives(*problem, select=top_k(3), tol=1e-12)
    return evals, gathered(evecs), texts_of(evecs), derivatives


def test_eigenpairs_have_axes_in_front(two):
    results = two.results(eigenpairs, PLACES["columns"])
    evals, evecs, places, derivatives = results[0]
    expected = reference.directions(dense("mse"), top_k(3))
    assert places == {"w": "2", "b": "r", "scale": "r", "v": "2", "c": "r"}
    vectors = torch.cat([leaf.flatten(1) for leaf in evecs.values()], 1)
    torch.testing.assert_close(evals, expected.evals, rtol=1e-12, atol=0)
    signs = (vectors @ expected.vectors).diagonal().sign()
    torch.testing.assert_close(vectors.T * signs, expected.vectors, rtol=0, atol=1e-10)
    torch.testing.assert_close(derivatives.gammas.abs(), expected.gammas.abs(), rtol=0, atol=1e-10)
    torch.testing.assert_close(derivatives.lambdas, expected.lambdas, rtol=0, atol=1e-10)
    assert same_on_all([(of[0], of[1], of[3]) for of in results])


def scaled_step(rank, texts):
    """A step with a scale that is placed as the parameters are."""
    scale = {name: 1 + leaf.abs() for name, leaf in params().items()}
    problem, options = arguments_on_mesh(texts), {"complement": 0.1, "tol": 1e-24}
    return gathered(ddnewton.newton_step(*problem, 0.1, scale=placed_tree(scale, texts), **options))


def test_a_scale_of_dtensors(two):
    step = two.results(scaled_step, PLACES["columns"])[0]
    scale = 1 + reference.flat(params()).abs()
    problem = dense("mse")
    scaled = problem._replace(jacobians=problem.jacobians * scale)
    assert reference.error(step, scale * reference.step(scaled, 0.1, complement=0.1)) < 1e-10


def narrow_step(rank, texts):
    P = placed_tree(params(torch.float32), texts)
    step = ddnewton.newton_step(
        net, P, batch()[0].float(), batch()[1].float(), nn.MSELoss(), 0.1, tol=1e-20
    )
    return gathered(step), texts_of(step), {leaf.dtype for leaf in step.values()}


def test_narrow_parameters_are_widened(two):
    step, places, dtypes = two.results(narrow_step, PLACES["rows"])[0]
    narrow = params(torch.float32)
    X, y = (part.float().double() for part in batch())
    wide = {name: leaf.double() for name, leaf in narrow.items()}
    problem = reference.dense(net, wide, X, y, nn.MSELoss())
    assert (places, dtypes) == (PLACES["rows"], {torch.float32})
    assert reference.error(step, reference.step(problem, 0.1)) < 1e-6


def waves(p, x):
    return (x @ p["w"]).abs().square()


def complex_step(rank, text):
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(4, 3, generator=generator, dtype=torch.complex128)
    X, y = batch()
    X = X.to(w.dtype)
    plain = ddnewton.newton_step(waves, {"w": w}, X, y, nn.MSELoss(), 0.1, gram="dense")
    step = ddnewton.newton_step(
        waves, placed_tree({"w": w}, {"w": text}), X, y, nn.MSELoss(), 0.1, tol=1e-24
    )
    return float((step["w"].full_tensor() - plain["w"]).norm() / plain["w"].norm()), texts_of(step)


def test_complex_parameters(two):
    error, places = two.results(complex_step, "1")[0]
    assert (error < 1e-10, places) == (True, {"w": "1"})


def step_of_parts(rank, texts):
    """A step by batches of a loader, by sub-samples, and in chunks of two samples."""
    model_fn, P, X, y, loss = arguments_on_mesh(texts)
    options = {"tol": 1e-24, "complement": 0.1}
    loader = [(X[:2], y[:2]), (X[2:], y[2:])]
    sharded = placed(X, "0", mesh_of())
    half = [0, 2, 3]
    return gathered(
        {
            "batches": ddnewton.newton_step(
                model_fn, P, Batches(loader), None, loss, 0.1, **options
            ),
            "chunks": ddnewton.newton_step(
                model_fn, P, sharded, y, loss, 0.1, chunk_size=2, **options
            ),
            "half": ddnewton.newton_step(
                model_fn,
                P,
                sharded,
                y,
                loss,
                0.1,
                subsampling_grad=half,
                subsampling_ggn=half,
                **options,
            ),
        }
    )


def test_parts_of_the_samples(two):
    steps_of_parts = two.results(step_of_parts, PLACES["plain among them"])[0]
    whole = reference.step(dense("mse"), 0.1, complement=0.1)
    half = [0, 2, 3]
    X, y = batch()
    of_half = reference.dense(net, params(), X[half], y[half], nn.MSELoss())
    assert reference.error(steps_of_parts["batches"], whole) < 1e-10
    assert reference.error(steps_of_parts["chunks"], whole) < 1e-10
    assert (
        reference.error(steps_of_parts["half"], reference.step(of_half, 0.1, complement=0.1))
        < 1e-10
    )


def updates(rank, texts, options):
    """Four updates with DTensors, and the same ones with whole tensors by products."""
    X, y = batch()
    runs = {}
    for name, tree in {"placed": placed_tree(params(), texts), "plain": params()}.items():
        gram = "auto" if name == "placed" else "free"
        optimizer = directional_newton(net, nn.MSELoss(), gram=gram, tol=1e-26, **options)
        at, state = tree, optimizer.init(tree)
        for _ in range(4):
            at, state, info = optimizer.update(at, state, X, y)
        runs[name] = gathered(at), gathered(state.previous), info.loss_after
        if name == "placed":
            places = texts_of(at), texts_of(state.previous)
    return runs, places


OPTIONS = {
    "trust region": {},
    "fixed, with momentum": {"damping": 0.1, "momentum": 0.5, "complement": "damping"},
    "weight decay and radius": {"weight_decay": 1e-2, "trust_radius": 0.3},
    "held out": {"damping": ddnewton.held_out(), "complement": "damping"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_updates(two, name):
    results = two.results(updates, PLACES["plain among them"], OPTIONS[name])
    runs, (places, previous) = results[0]
    # Where a damping is searched for, 1e-15 of the parameters moves the plain run by 1e-8.
    tolerance = 1e-7 if name == "held out" else 1e-9
    assert places == PLACES["plain among them"]
    assert previous in ((), places)
    assert bool(previous) == bool(runs["plain"][1])
    for of_dtensors, plain in zip(runs["placed"], runs["plain"], strict=True):
        assert plain == () or reference.error(of_dtensors, plain) < tolerance
    assert same_on_all([of[0]["placed"] for of in results])


def fits(rank, texts):
    X, y = batch()
    lower = {name: torch.full(shape, -0.5, dtype=torch.float64) for name, shape in SHAPES.items()}
    start = tree_map(lambda leaf: leaf.clamp(min=-0.4), params())
    options = {"max_updates": 5, "tol": 1e-20}
    plain = fit(net, start, X, y, bounds=(lower, 9.0), gram="free", **options)
    on_mesh = placed_tree(start, texts), placed_tree(lower, texts)
    result = fit(net, on_mesh[0], placed(X, "0", mesh_of()), y, bounds=(on_mesh[1], 9.0), **options)
    return gathered(result.params), texts_of(result.params), plain.params, result.history.losses


def test_a_fit_with_bounds(two):
    found, places, plain, losses = two.results(fits, PLACES["rows"])[0]
    assert places == PLACES["rows"]
    assert reference.error(found, plain) < 1e-8
    assert losses[-1] < losses[0] / 2
    assert min(float(leaf.min()) for leaf in found.values()) == -0.5


def test_importing_costs_nothing():
    code = "import sys, ddnewton; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
