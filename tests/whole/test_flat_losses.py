"""Slopes without curvature, outputs without parameters: refused or said, never a silent zero."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

from ddnewton import (
    Group,
    directional_derivatives,
    directional_newton,
    fixed,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    top_k,
    trust_region,
)
from ddnewton.damping import signal_to_noise
from ddnewton.optim import DirectionalNewton
from tests.reference import error

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
PARAMS = {name: p.detach() for name, p in NET.named_parameters()}
X = torch.randn(12, 3).double()
Y, CLASSES = X.sin(), X.argmax(1)
FLAT = r"the loss must have curvature where its gradient is not zero; got {name} with a gradient of"
UNUSED = "model_fn must use params; .* No output depends on any parameter"


def logits(p, x):
    return functional_call(NET, p, (x,))


def log_probabilities(p, x):
    return logits(p, x).log_softmax(1)


def pinball(outputs, y):
    return torch.maximum(0.9 * (y - outputs), -0.1 * (y - outputs)).mean()


def minus_log_p(outputs, y):
    return -outputs.mean()


CASES = {
    "L1Loss": (logits, Y, nn.L1Loss()),
    "l1_loss": (logits, Y, F.l1_loss),
    "pinball": (logits, Y, pinball),
    "NLLLoss": (log_probabilities, CLASSES, nn.NLLLoss()),
    "minus_log_p": (logits, Y, minus_log_p),
    "HuberLoss": (logits, Y + 50, nn.HuberLoss()),
    "SmoothL1Loss": (logits, Y - 50, nn.SmoothL1Loss(beta=0.1)),
}
EVERY_CASE = pytest.mark.parametrize(
    ("name", "model_fn", "y", "criterion"), [(k, *v) for k, v in CASES.items()], ids=CASES
)


def gradient(criterion, y, model_fn=logits):
    return jacrev(lambda p: criterion(model_fn(p, X), y))(PARAMS)


# --- no curvature at all -------------------------------------------------------------------------


@EVERY_CASE
@pytest.mark.parametrize("damping", [0.0, 0.1, signal_to_noise()], ids=["0", "0.1", "rule"])
def test_a_loss_without_curvature_is_refused(name, model_fn, y, criterion, damping):
    refused = pytest.raises(ValueError, match="newton_step: " + FLAT.format(name=name))
    with refused as raised:
        newton_step(model_fn, PARAMS, X, y, criterion, damping)
    for way_out in ("CrossEntropyLoss", r"majorized\(criterion\)", r"fisher\(criterion\)"):
        raised.match(way_out)
    with pytest.raises(ValueError, match="newton_step_and_info: " + FLAT.format(name=name)):
        newton_step_and_info(model_fn, PARAMS, X, y, criterion, damping)


@EVERY_CASE
def test_a_complement_follows_all_of_the_gradient(name, model_fn, y, criterion):
    step, info = newton_step_and_info(model_fn, PARAMS, X, y, criterion, 0.1, complement=0.5)
    for leaf, slope in gradient(criterion, y, model_fn).items():
        assert error(step[leaf], -slope / 0.5) < 1e-10
    assert info.rank == 0
    assert abs(info.flat_share - 1) < 1e-12
    alike = newton_step(model_fn, PARAMS, X, y, criterion, 0.5, complement=0.5)
    assert all(error(alike[leaf], step[leaf]) < 1e-10 for leaf in step)


@EVERY_CASE
@pytest.mark.parametrize(
    "damping", [None, 0.1, trust_region(), held_out(every=1)], ids=["none", "0.1", "radius", "held"]
)
def test_the_optimizer_refuses_it(name, model_fn, y, criterion, damping):
    optimizer = directional_newton(model_fn, criterion, damping)
    with pytest.raises(ValueError, match="update: " + FLAT.format(name=name)):
        optimizer.update(PARAMS, optimizer.init(PARAMS), X, y)


def test_options_that_move_something_else_do_not_hide_it():
    for options in ({"weight_decay": 0.1}, {"momentum": 0.5}, {"select": top_k(2)}):
        optimizer = directional_newton(logits, nn.L1Loss(), 0.1, **options)
        with pytest.raises(ValueError, match=FLAT.format(name="L1Loss")):
            optimizer.update(PARAMS, optimizer.init(PARAMS), X, Y)


def test_a_damping_relative_to_no_curvature_is_refused_too():
    optimizer = directional_newton(logits, nn.L1Loss(), levenberg_marquardt(), complement="damping")
    with pytest.raises(ValueError, match=FLAT.format(name="L1Loss")):
        optimizer.update(PARAMS, optimizer.init(PARAMS), X, Y)
    # A number, or a damping that is not relative to the curvature, leads to a step.
    for optimizer in (
        directional_newton(logits, nn.L1Loss(), trust_region(), complement="damping"),
        directional_newton(logits, nn.L1Loss(), complement=10.0),
        directional_newton(logits, nn.L1Loss(), fixed(10.0), complement="damping"),
    ):
        _, _, info = optimizer.update(PARAMS, optimizer.init(PARAMS), X, Y)
        assert info.loss_after < info.loss


def test_refused_for_one_member_of_an_ensemble_and_in_groups():
    stacked = {name: torch.stack([p, p / 2]) for name, p in PARAMS.items()}
    with pytest.raises(ValueError, match=FLAT.format(name="L1Loss")):
        vmap(lambda p: newton_step(logits, p, X, Y, nn.L1Loss(), 0.1))(stacked)
    groups = [Group(["0.weight", "0.bias"]), Group(["2.weight", "2.bias"])]
    with pytest.raises(ValueError, match=FLAT.format(name="L1Loss")):
        newton_step(logits, PARAMS, X, Y, nn.L1Loss(), 0.1, groups=groups)


@pytest.mark.parametrize("gram", ["dense", "structured"])
def test_refused_on_either_side_of_the_matrix(gram):
    few = (lambda p, x: p * x, torch.ones(1).double(), X[:, :1], Y[:, :1] + 9, nn.L1Loss())
    with pytest.raises(ValueError, match=FLAT.format(name="L1Loss")):
        newton_step(*few, 0.1, gram=gram)
    with pytest.raises(ValueError, match=FLAT.format(name="L1Loss")):
        newton_step(logits, PARAMS, X, Y, nn.L1Loss(), 0.1, gram=gram)


def test_an_optimum_is_none():
    """Where the gradient vanishes with the curvature there is nothing to refuse."""
    params, x = {"w": torch.zeros(1).double()}, torch.ones(2, 1).double()
    ends = torch.tensor([[-1.0], [1.0]]).double()
    step, info = newton_step_and_info(lambda p, x: x * p["w"], params, x, ends, nn.L1Loss(), 0.1)
    assert step["w"] == info.flat_share == 0
    # Right and certain: rounding leaves a slope of 1e-22 and no curvature.
    certain = {"w": torch.full((1,), 50.0).double()}
    model_fn = lambda p, x: torch.cat([x * p["w"], 0 * x], 1)  # noqa: E731
    custom = lambda o, y: 1.0 * F.cross_entropy(o, y)  # noqa: E731 - by torch.func, with rounding
    labels = torch.zeros(2, dtype=torch.long)
    optimizer = directional_newton(model_fn, custom)
    _, _, info = optimizer.update(certain, optimizer.init(certain), x, labels)
    assert info.gradient_norm < 1e-15
    assert info.accepted


# --- a part without curvature --------------------------------------------------------------------


def dense_share(outliers):
    """Return the share of Huber's gradient outside the range of G, of plain matrices."""
    leaves = jacrev(lambda p: logits(p, X))(PARAMS)
    J = torch.cat([leaf.reshape(12 * 3, -1) for leaf in leaves.values()], 1)
    residual = (logits(PARAMS, X) - outliers).reshape(-1)
    inside = residual.abs() < 1
    G = J[inside].T @ J[inside] / 36
    g = J.T @ residual.clamp(-1, 1) / 36
    evals, evecs = torch.linalg.eigh(G)
    flat = evecs[:, evals < 1e-12 * evals[-1]].T @ g
    return flat.square().sum() / g.square().sum()


def some_far():
    y = Y.clone()
    y[:9] += 20
    return y


@pytest.mark.parametrize("gram", ["dense", "structured"])
def test_the_share_without_curvature_is_that_of_plain_matrices(gram):
    y = some_far()
    step, info = newton_step_and_info(logits, PARAMS, X, y, nn.HuberLoss(), 0.1, gram=gram)
    assert 0.05 < info.flat_share < 0.95
    assert error(info.flat_share, dense_share(y)) < 1e-9
    assert error(info.flat_share + info.gradient_share, torch.ones(()).double()) < 1e-9
    assert any((leaf != 0).any() for leaf in step.values())


def test_no_share_where_every_sample_has_curvature():
    for criterion, y in ((nn.MSELoss(), Y), (nn.CrossEntropyLoss(), CLASSES)):
        _, info = newton_step_and_info(logits, PARAMS, X, y, criterion, 0.1)
        assert info.flat_share == 0
    drawn = monte_carlo(nn.CrossEntropyLoss(), 1, torch.Generator())
    _, info = newton_step_and_info(logits, PARAMS, X, CLASSES, drawn, 0.1)
    assert info.flat_share == 0


def test_the_optimizer_says_it_once():
    y = some_far()
    optimizer = directional_newton(logits, nn.HuberLoss())
    params, state = PARAMS, optimizer.init(PARAMS)
    share = f"{float(dense_share(y)):.0%} of the squared gradient of HuberLoss has no curvature"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        params, state, info = optimizer.update(params, state, X, y)
        assert error(info.flat_share, dense_share(y)) < 1e-9
        for _ in range(3):
            params, state, info = optimizer.update(params, state, X, y)
    assert [str(each.message).startswith(share) for each in said] == [True]
    assert said[0].category is UserWarning


def test_the_optimizer_for_modules_says_it_once():
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    module.load_state_dict(PARAMS)
    optimizer = DirectionalNewton(module, nn.HuberLoss())
    with pytest.warns(UserWarning, match="of the squared gradient of HuberLoss has no curvature"):
        optimizer.step(X, some_far())
    assert optimizer.info.flat_share > 0.05
    optimizer.step(X, some_far())  # warnings are errors here


def test_an_update_that_moves_nothing_is_said_once():
    nothing = lambda evals: []  # noqa: E731
    optimizer = directional_newton(logits, nn.MSELoss(), 0.1, select=nothing)
    state = optimizer.init(PARAMS)
    with pytest.warns(UserWarning, match="an update moved nothing, though the gradient of MSELoss"):
        params, state, info = optimizer.update(PARAMS, state, X, Y)
    assert info.step_norm == 0
    optimizer.update(params, state, X, Y)
    # A learning rate of zero is meant.
    still = directional_newton(logits, nn.MSELoss(), 0.1, learning_rate=lambda t: 0.0)
    still.update(PARAMS, still.init(PARAMS), X, Y)


# --- outputs that depend on no parameter ---------------------------------------------------------

INDEPENDENT = {
    "none": lambda p, x: x.sin(),
    "detached": lambda p, x: logits({name: q.detach() for name, q in p.items()}, x),
    "other names": lambda p, x: functional_call(
        NET, {f"{name}s": q for name, q in p.items()}, (x,)
    ),
    "the module itself": lambda p, x: NET(x),
}


@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize("model_fn", INDEPENDENT.values(), ids=INDEPENDENT)
def test_outputs_without_parameters_are_refused(model_fn, gram):
    for options in ({}, {"complement": 1.0}):
        with pytest.raises(ValueError, match="newton_step: " + UNUSED):
            newton_step(model_fn, PARAMS, X, Y, nn.MSELoss(), 0.1, gram=gram, **options)


@pytest.mark.parametrize(
    "public",
    [ggn_eigvalsh, ggn_eigh, gram_matrix, directional_derivatives],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("model_fn", INDEPENDENT.values(), ids=INDEPENDENT)
def test_their_curvature_is_refused_and_not_zero(model_fn, public):
    with pytest.raises(ValueError, match=f"{public.__name__}: " + UNUSED):
        public(model_fn, PARAMS, X, Y, nn.MSELoss())


def test_the_curvature_of_a_dead_net_is_zero():
    dead = lambda p, x: (logits(p, x) - 100).relu()  # noqa: E731
    assert not ggn_eigvalsh(dead, PARAMS, X, Y, nn.MSELoss()).any()


def test_refused_when_prepared_and_by_the_optimizer():
    with pytest.raises(ValueError, match="prepare: " + UNUSED):
        prepare(INDEPENDENT["none"], PARAMS, X)
    prepared = prepare(INDEPENDENT["detached"], PARAMS, X)
    optimizer = directional_newton(prepared, nn.MSELoss())
    with pytest.raises(ValueError, match="update: " + UNUSED):
        optimizer.update(PARAMS, optimizer.init(PARAMS), X, Y)

    class Detached(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.detach(), self.bias.detach())

    with pytest.raises(ValueError, match="update: " + UNUSED):
        DirectionalNewton(Detached(3, 3), nn.MSELoss()).step(X.float(), Y.float())


def test_an_unused_parameter_among_used_ones_stays():
    params = PARAMS | {"unused": torch.ones(2).double()}
    model_fn = lambda p, x: logits({k: v for k, v in p.items() if k != "unused"}, x)  # noqa: E731
    step = newton_step(model_fn, params, X, Y, nn.MSELoss(), 0.1)
    assert not step["unused"].any()
    assert step["0.weight"].any()


def test_a_dead_net_depends_on_its_parameters():
    model_fn = lambda p, x: (x @ p["w"] - 100).relu()  # noqa: E731
    params = {"w": torch.ones(3, 2).double()}
    step = newton_step(model_fn, params, X, Y[:, :2], nn.MSELoss(), 0.1)
    assert not step["w"].any()
