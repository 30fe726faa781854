"""The optimizer in place is the functional one, with every damping, option and group."""

from itertools import pairwise

import pytest
import torch
from torch.func import functional_call

from ddnewton import Group, State, above, directional_newton, held_out, monte_carlo, top_k
from ddnewton.damping import relative
from ddnewton.optim import DirectionalNewton
from tests.methods import DTYPES, FLOAT32, FLOAT64
from tests.models import problem
from tests.optim.twins import (
    CROSS_ENTROPY,
    DAMPINGS,
    IN_BOTH,
    OPTIONS,
    Twin,
    batch,
    everything,
    identical,
    layers,
    net,
    parameters,
    same,
    split,
)
from tests.reference import dense, error, flat

pytestmark = pytest.mark.usefixtures("layers_found_once")


# --- the functional optimizer ----------------------------------------------------------------


@pytest.mark.parametrize(("damping", "option", "dtype"), IN_BOTH)
def test_steps_are_those_of_the_functional_optimizer(damping, option, dtype):
    options = OPTIONS.get(option, {})
    module = net(dtype)
    found = None if options.get("gram") == "dense" else layers(dtype)
    twin = Twin(module, damping=DAMPINGS[damping](), layers=found, **options)
    independent = Twin(module, damping=DAMPINGS[damping](), **(options | {"gram": "dense"}))
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, DAMPINGS[damping](), **options)
    assert optimizer.info is None
    before = flat(parameters(module))
    for t in range(2):
        X, y = batch(dtype=dtype, seed=t)
        loss = optimizer.step(X, y)
        info = twin.step(X, y)
        independent.step(X, y)
        assert same(optimizer.info, info)
        assert torch.equal(loss, info.loss)
        assert not loss.requires_grad
        assert identical(parameters(module), twin.params)
    assert error(flat(parameters(module)) - before, flat(independent.params) - before) < (
        1e-2 if dtype == FLOAT32 else 1e-6
    )


@DTYPES
@pytest.mark.parametrize("damping", ["levenberg_marquardt", "held_out", "number"])
def test_monte_carlo_draws_what_the_functional_optimizer_draws(damping, dtype):
    module = net(dtype)
    one, other = (monte_carlo(CROSS_ENTROPY, 2, torch.Generator().manual_seed(5)) for _ in range(2))
    twin = Twin(module, one, DAMPINGS[damping](), layers=layers(dtype))
    optimizer = DirectionalNewton(module, other, DAMPINGS[damping]())
    for t in range(4):
        twin.step(*batch(dtype=dtype, seed=t))
        optimizer.step(*batch(dtype=dtype, seed=t))
        assert identical(parameters(module), twin.params)
        assert torch.equal(one.generator.get_state(), other.generator.get_state())


@pytest.mark.parametrize("lr", [0.5, 0.0, torch.tensor(0.25)])
@pytest.mark.parametrize("damping", ["number", "held_out"])
def test_lr_is_the_learning_rate_and_replaces_what_goes_with_the_damping(damping, lr):
    module = net()
    twin = Twin(module, damping=DAMPINGS[damping](), learning_rate=lambda t: float(lr))
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, DAMPINGS[damping](), lr=lr)
    for t in range(3):
        info = twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
        assert error(parameters(module), twin.params) < 1e-9
        assert optimizer.info.learning_rate == info.learning_rate == float(lr)


def test_without_an_lr_groups_multiply_what_goes_with_the_damping():
    module = net()
    twin = Twin(module, damping=held_out(), learning_rate=lambda t: held_out().learning_rate(t) / 4)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    assert optimizer.param_groups[0]["lr"] == 1
    optimizer.param_groups[0]["lr"] = 0.25
    for t in range(3):
        twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
    assert error(parameters(module), twin.params) < 1e-9


@pytest.mark.parametrize(
    "name", ["convolution", "attention", "encoder_layer", "eval_batch_norm", "lstm", "one_output"]
)
def test_all_kinds_of_modules(name):
    """Dicts as inputs, tied weights, integer inputs, buffers; and LSTM, which vmap refuses."""
    given = problem(name)
    module = given.model_fn.__closure__[0].cell_contents
    twin = directional_newton(*given[::4])
    params, state = given.params, twin.init(given.params)
    optimizer = DirectionalNewton(module, given.criterion)
    for _ in range(3):
        params, state, info = twin.update(params, state, given.X, given.y)
        assert error(optimizer.step(given.X, given.y), info.loss) < 1e-8
        assert error(parameters(module), params) < 1e-6
        assert error(module(given.X), given.model_fn(parameters(module), given.X)) < 1e-12


# --- groups ----------------------------------------------------------------------------------


GROUPS = {
    "blocks": [{}, {}],
    "dampings": [{"damping": 0.1}, {"damping": relative(0.5)}],
    "one damping": [{}, {"damping": torch.tensor(0.3)}],
    "selects": [{"select": top_k(2)}, {"select": above(1e-3)}],
    "both": [{"select": top_k(3), "damping": 0.2}, {}],
}


BLOCKS = [
    *((case, "levenberg_marquardt", FLOAT64) for case in GROUPS),
    *(("both", damping, FLOAT64) for damping in ("trust_region", "held_out", "rule")),
    *(("dampings", damping, FLOAT32) for damping in ("levenberg_marquardt", "held_out")),
]


@pytest.mark.parametrize(("case", "damping", "dtype"), BLOCKS)
def test_groups_are_blocks(case, damping, dtype):
    module, rules = net(dtype), GROUPS[case]
    names = ["4"], ["0", "2"]
    groups = [Group(name, **rule) for name, rule in zip(names, rules, strict=True)]
    twin = Twin(module, damping=DAMPINGS[damping](), groups=groups, layers=layers(dtype))
    optimizer = DirectionalNewton(
        module, CROSS_ENTROPY, DAMPINGS[damping](), params=split(module, rules)
    )
    for t in range(3):
        info = twin.step(*batch(dtype=dtype, seed=t))
        optimizer.step(*batch(dtype=dtype, seed=t))
        assert identical(parameters(module), twin.params)
        assert same(optimizer.info, info)


def test_one_group_may_have_rules_of_its_own():
    module = net()
    twin = Twin(module, damping=0.1, groups=[Group("", select=top_k(2), damping=0.3)])
    group = {"params": module.parameters(), "select": top_k(2), "damping": 0.3}
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.1, params=[group])
    for t in range(2):
        twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
    assert error(parameters(module), twin.params) < 1e-9


@DTYPES
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_lr_of_a_group_scales_its_block(decay, dtype):
    """−η_b (G_bb + (δ + w) I)⁻¹ (g_b + w θ_b), and the decrease that all of G predicts for it."""
    module, delta, rates = net(dtype), 0.2, (0.3, 0.8)
    params, (X, y) = parameters(module), batch(dtype=dtype)
    truth = dense(lambda p, X: functional_call(module, p, (X,)), params, X, y, CROSS_ENTROPY)
    slope = truth.gradient + decay * flat(params)
    curvature = truth.ggn + decay * torch.eye(len(slope), dtype=FLOAT64)
    heads = torch.cat([torch.full((p.numel(),), n.startswith("4")) for n, p in params.items()])
    expected = torch.zeros_like(slope)
    for block, rate in zip((heads, ~heads), rates, strict=True):
        matrix = curvature[block][:, block] + delta * torch.eye(int(block.sum()), dtype=FLOAT64)
        expected[block] = -rate * torch.linalg.solve(matrix, slope[block])
    groups = split(module, [{"lr": rate} for rate in rates])
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, delta, params=groups, weight_decay=decay)
    optimizer.step(X, y)
    tolerance = 1e-5 if dtype == FLOAT32 else 1e-10
    info, step = optimizer.info, flat(parameters(module)) - flat(params)
    assert error(step, expected) < tolerance
    promised = -(slope @ expected + expected @ curvature @ expected / 2)
    assert error(info.predicted_decrease, promised) < tolerance
    assert error(info.step_norm, expected.norm()) < tolerance
    penalty = decay / 2 * flat(parameters(module)).square().sum()
    after = CROSS_ENTROPY(module(X), y).double() + penalty
    assert error(info.loss_after, after) < tolerance
    assert error(info.ratio, (info.loss - after) / promised) < 1e3 * tolerance
    weights = heads.double() * rates[0] + (~heads).double() * rates[1]
    assert error(info.learning_rate, weights.mean()) < tolerance


def test_rates_of_groups_are_as_precise_as_one():
    """0.1 is no number of float32."""
    one, two = net(), net()
    DirectionalNewton(one, CROSS_ENTROPY, 0.1, params=split(one, [{}, {}]), lr=0.1).step(*batch())
    other = DirectionalNewton(
        two, CROSS_ENTROPY, 0.1, params=split(two, [{"lr": 0.1}, {"lr": 0.7}])
    )
    other.step(*batch())
    assert error(two[4].weight, one[4].weight) < 1e-14


def test_a_group_whose_lr_is_zero_stays():
    module = net()
    optimizer = DirectionalNewton(
        module, CROSS_ENTROPY, momentum=0.5, params=split(module, [{"lr": 0.0}, {}])
    )
    before = everything(module)
    losses = [optimizer.step(*batch()) for _ in range(5)]
    assert torch.equal(module[4].weight, before["4.weight"])
    assert not torch.equal(module[0].weight, before["0.weight"])
    assert all(after <= first for first, after in pairwise(losses))


@pytest.mark.parametrize("damping", ["levenberg_marquardt", "held_out"])
def test_layers_are_unfrozen_from_the_last_to_the_first(damping):
    """What adapts goes on as it was, and so does the momentum of those that moved before."""
    module = net()
    module[0].requires_grad_(False)
    module[2].requires_grad_(False)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, DAMPINGS[damping](), momentum=0.6)
    for t in range(3):
        optimizer.step(*batch(seed=t))
    frozen = everything(net())
    assert torch.equal(module[2].weight, frozen["2.weight"])
    kept = optimizer.state[module[4].weight]
    previous = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    previous |= {f"4.{n}": optimizer.state[p]["previous"] for n, p in module[4].named_parameters()}
    sizes = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    of_last = {f"4.{n}": optimizer.state[p] for n, p in module[4].named_parameters()}
    sizes |= {name: kept.get("sizes", sizes[name]) for name, kept in of_last.items()}
    state = State(
        updates=torch.tensor(kept["step"]),
        control=torch.tensor(kept["control"], dtype=FLOAT64),
        damping=torch.tensor(kept["damping"], dtype=FLOAT64),
        previous=previous,
        sizes=sizes if DAMPINGS[damping]().scale else (),
    )
    module.requires_grad_(True)
    groups = [Group("4"), Group("2"), Group("0", damping=0.5)]
    twin = Twin(module, damping=DAMPINGS[damping](), momentum=0.6, groups=groups)
    twin.state = state
    optimizer.add_param_group({"params": list(module[2].parameters())})
    optimizer.add_param_group({"params": module[0].parameters(), "damping": 0.5})
    for t in range(3, 6):
        twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
        assert error(parameters(module), twin.params) < 1e-8
    assert optimizer.state[module[4].weight]["step"] == 6
