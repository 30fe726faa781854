"""Weight decay of its own for every leaf, or for every parameter group."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ddnewton import Group, directional_newton, levenberg_marquardt, top_k
from ddnewton.damping import constant, relative
from ddnewton.optim import DirectionalNewton
from tests.methods import ADAPTATIONS
from tests.models import problem
from tests.optim.textbook import (
    LOSSLESS,
    Pulls,
    at,
    error,
    far,
    loss_of,
    marquardt,
    optimizer_of,
    updated,
)
from tests.reference import dense, flat

DECAYS = (0.0, 0.3, 0.05)
"""The decays of the leaves, in turn."""

SIDES = ("relu_mlp", "many_points", "list_of_layers")


def by_leaf(params, decays=DECAYS):
    """A tree like the parameters with a number a leaf, and the same as one vector."""
    leaves, spec = tree_flatten(params)
    numbers = list(itertools.islice(itertools.cycle(decays), len(leaves)))
    vector = torch.cat(
        [
            torch.full((leaf.numel(),), w, dtype=torch.float64)
            for leaf, w in zip(leaves, numbers, strict=True)
        ]
    )
    return tree_unflatten(numbers, spec), vector


def exact(g, G, theta, previous, pulls):
    """argmin gᵀs + ½ sᵀGs + ½ δ‖s − μs'‖² + ½ (θ + s)ᵀ diag(w) (θ + s)."""
    delta, momentum, w = pulls
    damped = G + torch.diag(w) + delta * torch.eye(len(g), dtype=torch.float64)
    return torch.linalg.solve(damped, -g + delta * momentum * previous - w * theta)


WAYS = {
    "auto": {},
    "structured": {"gram": "structured"},
    "dense in chunks": {"gram": "dense", "chunk_size": 2},
    "outside too": {"complement": "damping"},
    "by eigenpairs": {"damping": 1e-12},
}


@pytest.mark.parametrize(("name", "way"), [*itertools.product(SIDES, WAYS)])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_several_updates(name, momentum, way):
    options = {"momentum": momentum, "learning_rate": 0.5} | WAYS[way]
    given, delta = problem(name), options.pop("damping", 0.2)
    decays, w = by_leaf(given.params, (0.01, 0.3, 0.05) if delta < 0.1 else DECAYS)
    optimizer = optimizer_of(given, delta, weight_decay=decays, **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(w)
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        g, G, before = reference.gradient, reference.ggn, loss_of(given, params, w)
        vector = exact(g, G, theta, previous, Pulls(delta, momentum, w))
        params, state, info = optimizer.update(params, state, given.X, given.y)
        s = 0.5 * vector
        assert error(flat(params) - theta, s) < 1e-10
        assert error(info.loss, before) < 1e-12
        assert error(info.loss_after, loss_of(given, params, w)) < 1e-12
        slope = g @ s + (w * theta) @ s
        predicted = -slope - (s @ G @ s + (w * s) @ s) / 2
        assert abs(info.predicted_decrease - predicted) < 1e-9 * slope.abs()
        previous = vector


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_every_adaptation(adaptation, name):
    """Whatever δ it comes to, the step is that of this δ."""
    if not isinstance(ADAPTATIONS[adaptation].make(), float):
        given = problem(name)
        decays, w = by_leaf(given.params)
        damping = levenberg_marquardt() if adaptation == "fixed" else ADAPTATIONS[adaptation].make()
        params, state = given.params, None
        optimizer = optimizer_of(
            given, damping, weight_decay=decays, learning_rate=1.0, momentum=0.0, scale=None
        )
        state = optimizer.init(params)
        for number in range(3):
            reference, theta = at(given, params), flat(params)
            params, state, info = optimizer.update(params, state, given.X, given.y)
            if adaptation == "held_out" and number % 2 == 0:
                continue  # part of the batch is held out
            step = exact(
                reference.gradient,
                reference.ggn,
                theta,
                0 * theta,
                Pulls(float(info.damping), 0.0, w),
            )
            expected = step if bool(info.accepted) else 0 * step
            assert error(flat(params) - theta, expected) < 1e-10


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_marquardts_loop(name, momentum):
    given = far(name)
    decays, w = by_leaf(given.params)
    optimizer = optimizer_of(
        given, levenberg_marquardt(1e-3), weight_decay=decays, momentum=momentum
    )
    params, state = given.params, optimizer.init(given.params)
    delta, previous, sizes = None, None, None
    for _ in range(4):
        pulls = Pulls(0.0, momentum, w)
        expected = marquardt(given, params, delta, pulls, previous, sizes=sizes)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert int(info.attempts) == expected.attempts
        assert bool(info.accepted) == expected.accepted
        assert error(params, expected.params) < 1e-8
        assert error(state.control, expected.following) < 1e-7
        delta, previous, sizes = expected.following, expected.vector, expected.sizes
        params = expected.params
        state = state._replace(control=torch.tensor(delta, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"learning_rate": "exact"}, {"momentum": "exact"}], ids=str)
def test_the_best_of_the_damped_model(options):
    """Of the first step all is best."""
    given = problem("tanh_mlp")
    decays, w = by_leaf(given.params)
    params, _, _ = updated(given, 0.3, weight_decay=decays, **options)
    reference, theta = at(given, given.params), flat(given.params)
    step = exact(reference.gradient, reference.ggn, theta, 0 * theta, Pulls(0.3, 0.0, w))
    assert error(flat(params) - theta, step) < 1e-8


def test_members_of_an_ensemble():
    given = problem("many_points")
    decays, _ = by_leaf(given.params)
    optimizer = optimizer_of(given, levenberg_marquardt(), weight_decay=decays, momentum=0.5)
    members = [tree_map(lambda x, t=t: t * x, given.params) for t in (1.0, -0.7)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *members)

    def twice(params):
        state = optimizer.init(params)
        for _ in range(2):
            params, state, _ = optimizer.update(params, state, given.X, given.y)
        return params

    together = torch.func.vmap(twice)(stacked)
    for number, member in enumerate(members):
        assert error(tree_map(lambda x, n=number: x[n], together), twice(member)) < 1e-9


def test_one_number_everywhere_is_the_number():
    given = problem("tanh_mlp")
    options = {"momentum": 0.8, "times": 3}
    one, state, info = updated(given, weight_decay=0.05, **options)
    tree = tree_map(lambda _: 0.05, given.params)
    other, same_state, same_info = updated(given, weight_decay=tree, **options)
    pairs = zip(
        tree_leaves((one, state, info)), tree_leaves((other, same_state, same_info)), strict=True
    )
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [{"damping": relative(0.3)}, {"damping": 0.2, "select": top_k(4)}, {"complement": 0.5}],
    ids=["rule", "select", "complement"],
)
def test_blocks_with_one_number_each_take_every_option(options):
    """The blocks of one problem do what problems of one block do."""
    given = problem("relu_mlp")
    names, damping = list(given.params), options.get("damping", 0.2)
    halves = [names[:2], names[2:]]
    decays = {name: 0.3 if name in halves[0] else 0.0 for name in reversed(names)}
    rest = {"complement": options.get("complement")}
    groups = [Group(half, select=options.get("select")) for half in halves]
    both, _, _ = updated(given, damping, weight_decay=decays, groups=groups, **rest)
    for half, decay in zip(halves, (0.3, 0.0), strict=True):
        alone, _, _ = updated(
            given, damping, weight_decay=decay, groups=[groups[halves.index(half)]], **rest
        )
        assert error([both[name] for name in half], [alone[name] for name in half]) < 1e-12


# --- modules --------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch():
    X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    return X, X[:, :2].sin()


def kinds(module):
    """The weights and the biases, as for torch's optimizers."""
    named = dict(module.named_parameters())
    return [[p for name, p in named.items() if kind in name] for kind in ("weight", "bias")]


def test_parameter_groups_have_their_own_as_in_torch():
    """−(G_bb + (δ + w_b) I)⁻¹ (g_b + w_b θ_b): groups are blocks."""
    module, (X, y) = net(), batch()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    weights, biases = kinds(module)
    optimizer = DirectionalNewton(
        module,
        nn.MSELoss(),
        0.1,
        params=[{"params": weights, "weight_decay": 0.3}, {"params": biases}],
        weight_decay=0.02,
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.02]
    loss = optimizer.step(X, y)
    reference = dense(lambda p, x: functional_call(module, p, (x,)), before, X, y, nn.MSELoss())
    _, w = by_leaf(before, (0.3, 0.02))
    theta, step = flat(before), flat(dict(module.named_parameters())) - flat(before)
    for block in (w == 0.3, w != 0.3):
        G = reference.ggn[block][:, block]
        expected = exact(
            reference.gradient[block], G, theta[block], 0 * theta[block], Pulls(0.1, 0.0, w[block])
        )
        assert error(step[block], expected) < 1e-10
    penalty = float((w * theta.square()).sum() / 2)
    assert error(loss, reference.loss.mean() + penalty) < 1e-12


def test_by_name_is_one_matrix():
    module, (X, y) = net(), batch()
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    decays = {name: 0.3 if "weight" in name else 0.0 for name in params}
    DirectionalNewton(module, nn.MSELoss(), 0.1, weight_decay=decays).step(X, y)
    optimizer = directional_newton(
        lambda p, x: functional_call(module, p, (x,)), nn.MSELoss(), 0.1, weight_decay=decays
    )
    expected, *_ = optimizer.update(params, optimizer.init(params), X, y)
    assert error(dict(module.named_parameters()), expected) < 1e-12


def test_a_group_is_changed_saved_and_loaded():
    module, (X, y) = net(), batch()
    weights, biases = kinds(module)
    groups = [{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]
    optimizer = DirectionalNewton(module, nn.MSELoss(), params=groups)
    optimizer.step(X, y)
    optimizer.param_groups[1]["weight_decay"] = 0.7
    twin = net()
    twin.load_state_dict(module.state_dict())
    other = DirectionalNewton(twin, nn.MSELoss(), params=[{"params": kind} for kind in kinds(twin)])
    other.load_state_dict(optimizer.state_dict())
    assert [group["weight_decay"] for group in other.param_groups] == [0.3, 0.7]
    assert torch.equal(other.step(X, y), optimizer.step(X, y))
    # What was saved before groups had one.
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["weight_decay"]
    other.load_state_dict(old)
    other.step(X, y)


# --- what is refused ------------------------------------------------------------------------


def unit(tree):
    return tree_map(lambda _: 1.0, tree)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"damping": relative(0.1)}, "a damping rule"),
        ({"damping": levenberg_marquardt(rule=constant(0.1))}, "a damping rule"),
        ({"select": top_k(2)}, "select"),
        ({"complement": 0.5}, "a number as complement"),
        ({"subsampling_curvature": [0, 1]}, "subsampling_curvature"),
    ],
    ids=["relative", "a rule that adapts", "select", "complement", "subsampling_curvature"],
)
def test_what_differs_inside_a_block_needs_one_damping(options, named):
    given = problem("tanh_mlp")
    decays, _ = by_leaf(given.params)
    with pytest.raises(ValueError, match=f"differs inside a block .* got {named}"):
        updated(given, weight_decay=decays, **options)


def test_without_any_damping_the_leaves_without_decay_have_none():
    given = problem("tanh_mlp")
    decays, _ = by_leaf(given.params)
    with pytest.raises(ValueError, match="without weight_decay need a damping above 0"):
        updated(given, 0.0, weight_decay=decays)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda tree: [*tree.values()], ValueError, "have the structure of params"),
        (lambda tree: tree_map(lambda w: [w], tree), ValueError, "have the structure of params"),
        (lambda tree: dict(list(tree.items())[1:]), ValueError, "have the structure of params"),
        (
            lambda tree: {**tree, next(iter(tree)): -1.0},
            ValueError,
            r"weight_decay\[.* ≥ 0; got -1",
        ),
        (lambda tree: {**tree, next(iter(tree)): "a"}, TypeError, r"weight_decay\[.* ≥ 0; got 'a'"),
        (
            lambda tree: {**tree, next(iter(tree)): torch.tensor(0.1)},
            TypeError,
            r"weight_decay\[.* plain number",
        ),
    ],
)
def test_a_tree_is_like_the_parameters(change, kind, match):
    given = problem("tanh_mlp")
    with pytest.raises(kind, match=match):
        updated(given, weight_decay=change(unit(given.params)))


def test_a_name_without_a_number():
    module = net()
    with pytest.raises(ValueError, match=r"for every trained parameter; got none for 0\.bias"):
        DirectionalNewton(module, nn.MSELoss(), weight_decay={"0.weight": 0.1})
