"""Updates in other units of the parameters: what damps, decays, pulls and limits in which units."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ddnewton import directional_newton, held_out, levenberg_marquardt, spring, top_k, trust_region
from ddnewton.damping import constant
from ddnewton.optim import DirectionalNewton
from tests.methods import FLOAT64
from tests.models import problem
from tests.optim.textbook import (
    Pulls,
    at,
    error,
    far,
    loss_of,
    optimizer_of,
    sizes_of,
    updated,
)
from tests.optim.textbook import spring as spring_step
from tests.reference import flat

SIDES = ("relu_mlp", "many_points", "tied_autoencoder")


def scale_of(params):
    """A tree of one number an entry, and the same as one vector."""
    generator = torch.Generator().manual_seed(1)
    scale = tree_map(
        lambda x: 0.3 + torch.rand(x.shape, generator=generator, dtype=FLOAT64), params
    )
    return scale, flat(scale)


@pytest.mark.parametrize("complement", [None, "damping"])
@pytest.mark.parametrize("decay", [0.0, 0.05, "by leaf"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("name", SIDES)
def test_momentum_and_weight_decay(name, momentum, decay, complement):
    """argmin gᵀs + ½ sᵀGs + ½ δ‖(s − μs') / scale‖² + ½ w‖θ + s‖²: decay has units of its own."""
    given = problem(name)
    scale, S = scale_of(given.params)
    w = torch.full_like(S, 0.05 if decay == 0.05 else 0.0)
    if decay == "by leaf":
        leaves, structure = tree_flatten(given.params)
        w[: leaves[0].numel()] = 0.2
        decay = tree_unflatten([0.2, *(0.0 for _ in leaves[1:])], structure)
    optimizer = optimizer_of(
        given,
        0.2,
        scale=scale,
        momentum=momentum,
        weight_decay=decay,
        learning_rate=0.5,
        complement=complement,
    )
    params, state, previous = given.params, optimizer.init(given.params), torch.zeros_like(S)
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        g, G, before = reference.gradient, reference.ggn, loss_of(given, params, w)
        vector = spring_step(g, G, theta, previous, Pulls(0.2, momentum, w), S)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        s = 0.5 * vector
        assert error(flat(params) - theta, s) < 1e-9
        assert error(info.step_norm, (s / S).norm()) < 1e-9
        assert error(info.loss, before) < 1e-12
        assert error(info.loss_after, loss_of(given, params, w)) < 1e-12
        predicted = -(g + w * theta) @ s - (s @ G @ s + (w * s) @ s) / 2
        assert error(info.predicted_decrease, predicted) < 1e-8
        assert error(flat(state.previous) if momentum else vector, vector) < 1e-9
        previous = vector


def test_the_exact_rate_is_that_of_the_damped_model():
    given = problem("tanh_mlp")
    scale, S = scale_of(given.params)
    params, *_ = updated(given, 0.3, scale=scale, select=top_k(2), learning_rate="exact")
    whole, *_ = updated(given, 0.3, scale=scale, select=top_k(2))
    reference, theta = at(given, given.params), flat(given.params)
    v, G = flat(whole) - theta, reference.ggn
    rate = -(reference.gradient @ v) / (v @ G @ v + 0.3 * (v / S) @ (v / S))
    assert error(flat(params) - theta, rate * v) < 1e-9


@pytest.mark.parametrize("name", SIDES)
def test_the_longest_step_is_measured_in_units_of_the_scale(name):
    """As in MINPACK and SciPy: ‖s / scale‖."""
    given = far(name, 2.0)
    scale, S = scale_of(given.params)
    params, _, info = updated(given, 0.0, scale=scale, trust_radius=0.05)
    length = float(((flat(params) - flat(given.params)) / S).norm())
    assert 0.9 * 0.05 * (1 - 1e-9) < length <= 0.05 * (1 + 1e-9)
    assert error(info.step_norm, length) < 1e-9


@pytest.mark.parametrize("damping", [levenberg_marquardt(), trust_region()], ids=["δ", "radius"])
def test_sizes_are_the_largest_so_far(damping):
    given = far("many_points", 3.0)
    optimizer = optimizer_of(given, damping)
    params, state, sizes = given.params, optimizer.init(given.params), None
    for _ in range(6):
        reference, theta = at(given, params), flat(params)
        sizes, scale = sizes_of(reference, sizes)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert error(flat(state.sizes), sizes) < 1e-9
        zero = torch.zeros_like(theta)
        pulls = Pulls(float(info.damping))
        step = spring_step(reference.gradient, reference.ggn, theta, zero, pulls, scale)
        # Steps of a radius may be arcs: their own test has these.
        if float(info.loss) > 1e-12 and not damping.by_length:
            assert error(flat(params) - theta, step) < 1e-6


def test_what_goes_with_a_damping():
    params = problem("many_points").params
    for damping, sized in ((None, 1), (levenberg_marquardt(), 1), (held_out(), 0), (0.1, 0)):
        given = problem("many_points")
        assert bool(optimizer_of(given, damping).init(params).sizes) == sized
        assert not optimizer_of(given, damping, scale=None).init(params).sizes
        assert optimizer_of(given, damping, scale="jac").init(params).sizes
    # Where weight decay meets directions there is none, rather than a refusal.
    for options in ({"select": top_k(2)}, {"complement": 0.5}, {"subsampling_curvature": [0, 1]}):
        assert not updated(given, weight_decay=0.1, **options)[1].sizes
        with pytest.raises(ValueError, match="with a scale of the parameters needs one damping"):
            updated(given, weight_decay=0.1, scale="jac", **options)
    rule = trust_region(rule=constant(0.1))
    assert not updated(given, rule, weight_decay=0.1)[1].sizes


def test_a_state_has_the_scale_of_its_optimizer():
    given = problem("many_points")
    state = optimizer_of(given, scale=None).init(given.params)
    with pytest.raises(ValueError, match="with the same scale; got other sizes"):
        optimizer_of(given).update(given.params, state, given.X, given.y)


def test_an_ensemble_keeps_the_sizes_of_every_member():
    given = problem("many_points")
    optimizer = optimizer_of(given)
    members = [far("many_points", times).params for times in (1.0, 3.0)]
    together = tree_map(lambda *leaves: torch.stack(leaves), *members)
    states = vmap(optimizer.init)(together)
    for _ in range(2):
        together, states, _ = vmap(lambda p, s: optimizer.update(p, s, given.X, given.y))(
            together, states
        )
    for number, member in enumerate(members):
        params, state = member, optimizer.init(member)
        for _ in range(2):
            params, state, _ = optimizer.update(params, state, given.X, given.y)
        assert error(tree_map(lambda x, n=number: x[n], states.sizes), state.sizes) < 1e-8
        assert error(tree_map(lambda x, n=number: x[n], together), params) < 1e-6


def test_a_module_stores_and_loads_them():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    X = torch.linspace(-1, 1, 60, dtype=FLOAT64).reshape(30, 2)
    y = X.prod(1, keepdim=True)
    module, twin = net(), net()
    optimizer, other = (DirectionalNewton(one, nn.MSELoss()) for one in (module, twin))
    for _ in range(3):
        optimizer.step(X, y)
    twin.load_state_dict(module.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        assert torch.equal(other.step(X, y), optimizer.step(X, y))
    # A dict of numbers by the names of parameters.
    scale = {name: 1.0 + number for number, name in enumerate(dict(module.named_parameters()))}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    DirectionalNewton(module, nn.MSELoss(), 0.1, scale=scale).step(X, y)
    expected, *_ = _updated_once(module, before, X, y, scale)
    assert error(dict(module.named_parameters()), expected) < 1e-12


def _updated_once(module, params, X, y, scale):
    optimizer = directional_newton(
        lambda p, x: functional_call(module, p, (x,)), nn.MSELoss(), 0.1, scale=scale
    )
    return optimizer.update(params, optimizer.init(params), X, y)


def test_more_parameters_than_points_keep_their_units():
    """A differential equation at few points: by the sizes of columns its residual vanishes at the
    points and the error between them explodes."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    params = {name: p.detach().double() for name, p in net.double().named_parameters()}
    x = torch.linspace(0.02, 0.98, 40, dtype=FLOAT64)[:, None]
    exact = lambda x: torch.sin(torch.pi * x) + 0.5 * torch.sin(2 * torch.pi * x)  # noqa: E731

    def u(p, x):
        return (x * (1 - x) * functional_call(net, p, (x[None],))[0]).squeeze()

    def residual(p, X):
        second = torch.func.grad(torch.func.grad(lambda t: u(p, t[None])))
        return vmap(second)(X[:, 0])[:, None]

    source = -(torch.pi**2) * (torch.sin(torch.pi * x) + 2 * torch.sin(2 * torch.pi * x))
    between = torch.linspace(0, 1, 301, dtype=FLOAT64)[:, None]

    def error_after(**options):
        damping = levenberg_marquardt()
        optimizer = directional_newton(residual, nn.MSELoss(), damping, **options)
        trained, state = params, optimizer.init(params)
        for _ in range(40):
            trained, state, _ = optimizer.update(trained, state, x, source)
        found = vmap(lambda t: u(trained, t))(between)[:, None]
        return error(found, exact(between))

    unscaled = error_after(scale=None)
    assert unscaled < 1e-3
    assert error_after() == error_after(scale="jac") == unscaled
    # What would happen in units of the columns at the start, passed as a scale.
    columns = torch.func.jacrev(lambda p: residual(p, x)[:, 0])(params)
    sizes = tree_map(lambda J: 1 / (2 * J.square().mean(0)).sqrt().clamp(min=1e-12), columns)
    assert error_after(scale=sizes) > 100 * unscaled


def test_points_drawn_anew_are_learned_by_all_batches_together():
    """SPRING's step of every batch, with a damping that follows it, and what it ends in."""
    given = far("tanh_mlp", 1.0)
    optimizer = optimizer_of(given, spring())
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for updates in range(4):
        reference, theta = at(given, params), flat(params)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        rate = 0.5 / (1 + updates / 50) ** 0.5
        momentum = 0.95 if int(info.attempts) == 1 else 0.0
        pulls = Pulls(float(info.damping), momentum)
        vector = spring_step(reference.gradient, reference.ggn, theta, previous, pulls)
        assert error(flat(params) - theta, rate * vector) < 1e-7
        missing = float(info.predicted_decrease) * (1 - float(info.ratio))
        near = missing <= float(info.predicted_decrease.abs()) / 4
        assert error(state.control, float(info.damping) / (1.2 if near else 1.0)) < 1e-9
        previous = vector
    # A curve, a few points of it at a time.
    curve = lambda p, x: p["height"] * torch.exp(-p["rate"] * x)  # noqa: E731
    params = {name: torch.ones(1, dtype=FLOAT64) for name in ("height", "rate")}
    optimizer = directional_newton(curve, nn.MSELoss(), spring())
    state, generator = optimizer.init(params), torch.Generator().manual_seed(0)
    for _ in range(150):
        x = 3 * torch.rand(4, 1, generator=generator, dtype=FLOAT64)
        params, state, info = optimizer.update(params, state, x, 3 * torch.exp(-0.5 * x))
    assert error(params, {"height": torch.tensor([3.0]), "rate": torch.tensor([0.5])}) < 1e-3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: trust_region(grow=1.0), "grow must be above 1; got 1.0"),
        (lambda: trust_region(shrink=1.0), "shrink must be below 1; got 1.0"),
        (lambda: trust_region(shrink=-0.1), "shrink must be"),
        (lambda: levenberg_marquardt(down=0.5), "down must be above 1; got 0.5"),
        (lambda: levenberg_marquardt(up=1.0), "up must be above 1; got 1.0"),
        (lambda: spring(up=0.9), "up must be above 1; got 0.9"),
    ],
)
def test_factors_that_end_no_search(make, match):
    with pytest.raises(ValueError, match=match):
        make()
