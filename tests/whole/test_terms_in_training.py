"""The terms of a loss in training and in its records, and what is refused of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import ddnewton
from ddnewton import levenberg_marquardt, monte_carlo, newton_step, newton_step_and_info
from ddnewton.criteria import mse
from ddnewton.optim import DirectionalNewton
from tests.reference import error, flat
from tests.whole.test_terms import net, physics, torch_loss

# --- the optimizers -------------------------------------------------------------------------------

DAMPINGS = {
    "levenberg_marquardt": levenberg_marquardt(),
    "trust_region": ddnewton.trust_region(),
    "held_out": ddnewton.held_out(every=2),
    "fixed": 0.5,
}


@pytest.mark.parametrize("damping", DAMPINGS.values(), ids=DAMPINGS)
def test_losses_of_an_update(damping):
    problem = physics(16)
    optimizer = ddnewton.directional_newton(problem.model_fn, problem.criterion, damping)
    params, state = problem.params, optimizer.init(problem.params)
    for _ in range(3):
        before = params
        params, state, info = optimizer.update(params, state, problem.X, problem.y)
        for name, function in problem.model_fn.items():
            truth = torch_loss(problem, name)(function(before, problem.X[name]), problem.y[name])
            assert error(info.losses[name], truth) < 1e-10
    assert info.losses.keys() == problem.model_fn.keys()


def test_the_loss_after_an_update_is_that_of_all_terms():
    problem = physics(16)
    optimizer = ddnewton.directional_newton(problem.model_fn, problem.criterion)
    params, _, info = optimizer.update(
        problem.params, optimizer.init(problem.params), problem.X, problem.y
    )
    after = sum(
        torch_loss(problem, name)(function(params, problem.X[name]), problem.y[name])
        for name, function in problem.model_fn.items()
    )
    assert error(info.loss_after, after) < 1e-12
    assert info.loss_after < info.loss


@pytest.mark.parametrize("gram", ["auto", "structured", "dense"])
def test_a_module_with_a_forward_for_every_term(gram):
    problem = physics(16)
    forward = {
        "inside": lambda module, x: module(x).square(),
        "edge": lambda module, x: module(x),
    }
    X = {name: problem.X[name] for name in forward}
    y = {name: problem.y[name] for name in forward}
    criterion = {name: problem.criterion[name] for name in forward}
    module = net(16)
    model_fn, params = ddnewton.as_function(module, forward)
    assert list(model_fn) == list(forward)
    params = {name: p.clone() for name, p in params.items()}
    functional = ddnewton.directional_newton(model_fn, criterion)
    state = functional.init(params)
    optimizer = DirectionalNewton(module, criterion, forward=forward, gram=gram)
    for _ in range(3):
        params, state, info = functional.update(params, state, X, y)
        loss = optimizer.step(X, y)
        assert error(loss, info.loss) < 1e-10
        assert optimizer.info.losses.keys() == forward.keys()
    assert error(dict(module.named_parameters()), flat(params)) < 1e-7


def test_drawn_terms_go_on_from_a_stored_state():
    torch.manual_seed(0)
    forward = {"a": lambda module, x: module(x), "b": lambda module, x: 2 * module(x)}
    X = {name: torch.randn(6, 2) for name in forward}
    y = {"a": torch.randint(3, (6,)), "b": torch.randn(6, 3)}

    def optimizer_of(seed):
        torch.manual_seed(1)
        module = nn.Linear(2, 3)
        draws = {
            "a": monte_carlo(nn.CrossEntropyLoss(), 1, torch.Generator().manual_seed(seed)),
            "b": nn.MSELoss(),
        }
        return module, DirectionalNewton(module, draws, 0.1, forward=forward)

    module, optimizer = optimizer_of(5)
    optimizer.step(X, y)
    state, weights = optimizer.state_dict(), {k: v.clone() for k, v in module.state_dict().items()}
    optimizer.step(X, y)
    other_module, other = optimizer_of(99)
    other_module.load_state_dict(weights)
    other.load_state_dict(state)
    other.step(X, y)
    assert error(dict(other_module.named_parameters()), flat(dict(module.named_parameters()))) == 0


# --- records of it --------------------------------------------------------------------------------


def test_a_log_and_its_figure_have_the_losses_of_the_terms(tmp_path):
    from ddnewton import diagnostics, plotting

    problem = physics(16)
    optimizer = ddnewton.directional_newton(problem.model_fn, problem.criterion)
    params, state = problem.params, optimizer.init(problem.params)
    for _ in range(4):
        params, state, info = optimizer.update(params, state, problem.X, problem.y)
        diagnostics.append(tmp_path, info)
    lines = diagnostics.read(tmp_path)
    assert lines[-1]["losses"] == {name: loss.item() for name, loss in info.losses.items()}
    plotting.overview(lines, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    _, of_step = newton_step_and_info(*problem, 0.1)
    diagnostics.append(tmp_path / "steps.jsonl", of_step)
    assert diagnostics.read(tmp_path / "steps.jsonl")[0]["losses"].keys() == problem.X.keys()


# --- wrong arguments ------------------------------------------------------------------------------


SAME = "must be dicts with the same keys, one for every term"
NAMES = "'inside', 'edge', 'data'"
ELLIPSES = "'inside': …, 'edge': …, 'data': …"
GIVE = f"Give each of them the keys {NAMES}."
WEIGHT = (
    "A number is no loss: to give a term a weight, write ddnewton.weighted(torch.nn.MSELoss(), "
)
ORDER = "If it is the criterion, pass it after y: the order is model_fn, params, X, y, criterion."


def wrong_arguments() -> dict[str, Any]:
    problem = physics(4)
    return {
        "X no dict": (problem._replace(X=problem.X["edge"]), {}, "X must be a dict with the same"),
        "y with other keys": (
            problem._replace(y={"inside": problem.y["inside"]}),
            {},
            f"X, y and criterion {SAME}; got y: missing 'edge', 'data'. {GIVE}",
        ),
        "criterion with other keys": (
            problem._replace(criterion={"inside": nn.MSELoss()}),
            {},
            f"model_fn, X, y and criterion {SAME}; got criterion: missing 'edge', 'data'. {GIVE}",
        ),
        "a term too many": (
            problem._replace(criterion=problem.criterion | {"start": nn.MSELoss()}),
            {},
            f"{SAME}; got criterion: unexpected 'start'. {GIVE} One criterion that is in no dict",
        ),
        "a function that is missing": (
            problem._replace(model_fn={k: problem.model_fn[k] for k in ("inside", "edge")}),
            {},
            f"{SAME}; got model_fn: missing 'data'. {GIVE}",
        ),
        "several with other keys": (
            problem._replace(
                X={k: problem.X[k] for k in ("inside", "edge")},
                y=problem.y | {"start": problem.y["edge"]},
                criterion={k.replace("e", "E"): loss for k, loss in problem.criterion.items()},
            ),
            {},
            (
                f"{SAME}; got X: missing 'data'; y: unexpected 'start'; "
                f"criterion: missing 'inside', 'edge', unexpected 'insidE', 'EdgE'. {GIVE} One crit"
            ),
        ),
        "no key in common": (
            problem._replace(
                X={"a": problem.X["edge"]}, y={"b": problem.y["edge"]}, criterion=mse()
            ),
            {},
            f"model_fn, X and y {SAME}; got X: missing {NAMES}, unexpected 'a'; y: missing {NAMES}",
        ),
        "a weight for a criterion": (
            problem._replace(criterion=problem.criterion | {"edge": 10.0}),
            {},
            f"term 'edge': criterion must be a loss function; got 10.0. {WEIGHT}10.0) in its pl",
        ),
        "a tensor for a criterion": (
            problem._replace(criterion=problem.criterion | {"edge": torch.tensor(10.0)}),
            {},
            f"criterion must be a loss function; got tensor(10.). {WEIGHT}weight) in its place.",
        ),
        "criteria for y": (
            problem._replace(y=problem.criterion, criterion=problem.y),
            {},
            "term 'inside': X and y must be tensors or pytrees of tensors; got y: ",
        ),
        "a criterion for y": (
            problem._replace(y=nn.MSELoss(), criterion=problem.y),
            {},
            f"got MSELoss. The terms are {NAMES}: pass y = {{{ELLIPSES}}}. {ORDER}",
        ),
        "no term": (problem._replace(model_fn={}), {}, "model_fn must hold at least one term"),
        "no function": (
            problem._replace(model_fn=problem.model_fn | {"edge": 3}),
            {},
            "model_fn must be a function; got 3",
        ),
        "criteria of one function": (
            problem._replace(
                model_fn=problem.model_fn["edge"], X=problem.X["edge"], y=problem.y["edge"]
            ),
            {},
            "criterion may be a dict only where model_fn is a dict of terms",
        ),
        "counts of samples": (
            problem._replace(y=problem.y | {"edge": problem.y["inside"]}),
            {},
            "term 'edge': X and y must hold the same number of samples; got X: 9, y: 20",
        ),
        "a term's outputs": (
            problem._replace(y=problem.y | {"data": torch.zeros(4, 3).double()}),
            {},
            "term 'data': ",
        ),
        "indices of one term": (
            problem,
            {"subsampling_ggn": [0, 1]},
            "subsampling_ggn must be a dict of indices",
        ),
        "indices of no term": (
            problem,
            {"subsampling_grad": {"outside": [0]}},
            "subsampling_grad must name terms of model_fn; got 'outside'",
        ),
        "indices beyond a term": (
            problem,
            {"subsampling_grad": {"data": [4]}},
            "term 'data': subsampling_grad must hold distinct indices",
        ),
        "a dict of ways": (
            problem,
            {"gram": {"inside": "dense"}},
            f"model_fn, X, y, criterion and gram {SAME}; got gram: missing 'edge', 'data'",
        ),
    }


@pytest.mark.parametrize("name", wrong_arguments())
def test_wrong_arguments_are_refused_by_name(name):
    problem, options, message = wrong_arguments()[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        newton_step(*problem, 0.1, **options)
    assert str(raised.value).startswith("newton_step: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["criterion with other keys", "a weight for a criterion"])
def test_wrong_criteria_are_refused_alike_by_all(name):
    problem, _, message = wrong_arguments()[name]
    optimizer = ddnewton.directional_newton(problem.model_fn, problem.criterion)
    state = optimizer.init(problem.params)
    calls = {
        "fit": lambda: ddnewton.fit(*problem),
        "standard_errors": lambda: ddnewton.standard_errors(*problem),
        "ggn_eigvalsh": lambda: ddnewton.ggn_eigvalsh(*problem),
        "update": lambda: optimizer.update(problem.params, state, problem.X, problem.y),
    }
    for function, call in calls.items():
        with pytest.raises((ValueError, TypeError), match=re.escape(f"{function}: {message}")):
            call()


def test_keys_that_a_model_has_and_its_points_have_not():
    problem = physics(4)
    with pytest.raises(
        ValueError, match=r"^prepare: model_fn and X must be dicts .*X: missing 'ed"
    ):
        ddnewton.prepare(problem.model_fn, problem.params, {"inside": problem.X["inside"]})


def test_forwards_are_refused_by_name():
    for wrong in ({"a": 3}, {}, {"a": None}):
        with pytest.raises((ValueError, TypeError), match="as_function: forward must"):
            ddnewton.as_function(net(4), wrong)


UNEQUAL = {"inside": torch.rand(5, 2), "edge": torch.rand(3, 2)}
WEIGHTS, POINTS = torch.rand(8, 1), torch.rand(8, 2)
OTHER_WAYS = {
    "weights in the closure": (lambda p, x: WEIGHTS * (x @ p), torch.rand(8, 2)),
    "blocks of rows": (lambda p, x: torch.cat([x[:5] @ p, x[:3] @ p]), torch.rand(8, 2)),
    "points in the closure": (lambda p, x: POINTS @ p, torch.arange(8)),
    "unequal inputs": (
        lambda p, x: torch.cat([x["inside"] @ p, x["edge"] @ p]),
        UNEQUAL,
    ),
    "a dict of outputs": (
        lambda p, x: {"inside": x @ p, "edge": 2 * x @ p},
        torch.rand(8, 2),
    ),
}


@pytest.mark.parametrize(("model_fn", "X"), OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_other_ways_to_write_terms_are_told_of_this_one(model_fn, X):
    params, y = torch.rand(2, 1), torch.zeros(8, 1)
    with pytest.raises((ValueError, TypeError), match="terms of the loss: pass model_fn, X"):
        newton_step(model_fn, params, X, y, nn.MSELoss(), 0.1)
