"""The optimizer in place is the functional one, through everything that happens to a module."""

import copy
import io
import logging
import pickle
import re
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim import lr_scheduler

import ddnewton.optim.modules
from ddnewton import (
    Group,
    State,
    above,
    directional_newton,
    fixed,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    prepare,
    top_k,
    trust_region,
)
from ddnewton.damping import relative, signal_to_noise
from ddnewton.optim import DirectionalNewton
from models import Block, LastState, cast, problem
from reference import dense, error, flat

FLOAT32, FLOAT64 = BOTH = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
CROSS_ENTROPY = nn.CrossEntropyLoss()


def net(dtype=FLOAT64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    ).to(dtype)


@cache
def layers(dtype):
    """What `prepare` finds in this net, whatever its parameters are."""
    module, X = net(dtype), batch(dtype=dtype)[0]
    return prepare(lambda params, X: functional_call(module, params, (X,)), parameters(module), X)


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """Look only once for the layers of the net that most tests share: it takes a while."""

    def found(model_fn, params, X):
        names = [name for name, _ in net().named_parameters()]
        shared = list(params) == names and params["0.weight"].shape == (5, X.shape[1])
        return layers(X.dtype) if shared else prepare(model_fn, params, X)

    monkeypatch.setattr(ddnewton.optim.modules, "prepare", found)


def batch(count=12, dtype=FLOAT64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, 3, generator=generator).to(dtype)
    return X, (X.double() @ torch.tensor([[1.0, 0, -1]] * 3).double().triu()).argmax(1)


def parameters(module) -> dict:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def everything(module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def identical(one, other) -> bool:
    """Dicts of the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same(one, other) -> bool:
    """Records of tensors, bit for bit; nan is nan."""
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


class Twin:
    """The functional optimizer, on a copy of the parameters of a module."""

    def __init__(self, module, criterion=CROSS_ENTROPY, damping=None, *, layers=None, **options):
        module = copy.deepcopy(module)
        self.params = parameters(module)

        def model_fn(params, X):
            return functional_call(module, params, (X,))

        self.optimizer = directional_newton(layers or model_fn, criterion, damping, **options)
        self.state = self.optimizer.init(self.params)

    def step(self, X, y):
        self.params, self.state, info = self.optimizer.update(self.params, self.state, X, y)
        return info


DAMPINGS = {
    "none": lambda: None,
    "levenberg_marquardt": partial(levenberg_marquardt, 1e-2),
    "trust_region": trust_region,
    "held_out": partial(held_out, 0.5, every=2),
    "number": lambda: 0.1,
    "fixed": lambda: fixed(relative(0.2)),
    "rule": lambda: relative(0.3),
    "tensor": lambda: torch.tensor(0.05),
    "adapted on a rule": lambda: levenberg_marquardt(rule=signal_to_noise(0.1)),
}
OPTIONS = {
    "momentum": {"momentum": 0.7},
    "exact momentum": {"momentum": "exact"},
    "weight decay": {"weight_decay": 0.05},
    "momentum and weight decay": {"momentum": 0.5, "weight_decay": 0.01},
    "trust radius": {"trust_radius": 0.05},
    "select": {"select": top_k(4)},
    "complement": {"select": top_k(2), "complement": "damping"},
    "complement number": {"select": top_k(2), "complement": 0.5},
    "chunks": {"chunk_size": 7},
    "dense": {"gram": "dense"},
    "structured": {"gram": "structured"},
}
KINDS = [(name, "plain") for name in DAMPINGS] + [("held_out", option) for option in OPTIONS]
KINDS += [("levenberg_marquardt", option) for option in ("momentum", "trust radius")]
IN_BOTH = [(*kind, FLOAT64) for kind in KINDS] + [(name, "plain", FLOAT32) for name in DAMPINGS]


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


def split(module, rules):
    """The last layer, and the others: not in the module's order."""
    layers = [list(module[4].parameters()), [*module[0].parameters(), *module[2].parameters()]]
    return [{"params": params} | rule for params, rule in zip(layers, rules, strict=True)]


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
    state = State(
        updates=torch.tensor(kept["step"]),
        control=torch.tensor(kept["control"], dtype=FLOAT64),
        damping=torch.tensor(kept["damping"], dtype=FLOAT64),
        previous=previous,
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


# --- what is not trained ----------------------------------------------------------------------


def test_frozen_parameters_stay_also_where_a_group_has_them():
    module, alone = net(), net()
    for each in (module, alone):
        each[0].requires_grad_(False)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out(), params=module.parameters())
    other = DirectionalNewton(alone, CROSS_ENTROPY, held_out())
    for t in range(3):
        optimizer.step(*batch(seed=t))
        other.step(*batch(seed=t))
    assert identical(everything(module), everything(alone))
    assert torch.equal(module[0].weight, net()[0].weight)
    assert not module[0].weight.requires_grad


def test_freezing_and_thawing_between_steps():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, momentum=0.5)
    optimizer.step(*batch())
    module[0].requires_grad_(False)
    before = everything(module)
    twin = Twin(module, damping=levenberg_marquardt(optimizer.state[module[0].weight]["control"]))
    assert set(twin.params) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    optimizer.step(*batch(seed=1))
    after = everything(module)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    assert "previous" not in optimizer.state[module[0].weight]
    module[0].requires_grad_(True)
    optimizer.step(*batch(seed=2))
    assert not torch.equal(module[0].weight, before["0.weight"])


def test_a_whole_group_may_be_frozen():
    module = net()
    module[0].requires_grad_(False)
    module[2].requires_grad_(False)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{}, {}]))
    first, last = optimizer.step(*batch()), optimizer.step(*batch())
    assert last < first
    assert torch.equal(module[0].weight, net()[0].weight)


def normed(dtype=FLOAT64) -> nn.Sequential:
    torch.manual_seed(2)
    norm = nn.BatchNorm1d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 3)).to(dtype).eval()


@DTYPES
def test_buffers_and_parameters_in_no_group_are_untouched(dtype):
    module = normed(dtype)
    before = everything(module)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=module[3].parameters())
    losses = [optimizer.step(*batch(dtype=dtype)) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, value in everything(module).items():
        assert torch.equal(value, before[name]) == (not name.startswith("3."))


def test_parameters_keep_identity_flags_and_gradients():
    module = net()
    module[2].bias.grad = torch.full_like(module[2].bias, 7.0)
    before = {name: (id(p), p.data_ptr(), p.stride()) for name, p in module.named_parameters()}
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    for t in range(2):
        optimizer.step(*batch(seed=t))
    after = {name: (id(p), p.data_ptr(), p.stride()) for name, p in module.named_parameters()}
    assert after == before
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    assert (module[2].bias.grad == 7).all()
    assert all(p.grad is None for p in module.parameters() if p is not module[2].bias)
    optimizer.zero_grad()
    assert module[2].bias.grad is None


def test_the_random_state_is_untouched():
    optimizer = DirectionalNewton(net(), CROSS_ENTROPY)
    before = torch.get_rng_state()
    optimizer.step(*batch())
    assert torch.equal(torch.get_rng_state(), before)


# --- nothing is stale -------------------------------------------------------------------------


class Told(nn.Module):
    """A net with everything that a module can hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.frozen = nn.Linear(3, 4)
        self.act = nn.Tanh()
        self.head = nn.Linear(4, 3)
        self.register_buffer("shift", torch.randn(4))
        self.register_buffer("hidden", torch.randn(4), persistent=False)
        self.mask = torch.ones(4, dtype=FLOAT64)
        self.temperature = 1.0
        self.scales = [1.0, 2.0]
        self.way = F.silu
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, X):
        inside = self.act(self.frozen(X)) * self.mask.to(X) + self.shift * self.hidden
        return self.head(self.way(inside)) * self.temperature * self.scales[0]


def _loaded(module):
    module.load_state_dict({n: 2 * value for n, value in module.state_dict().items()})


def _replaced_buffer(module):
    module.shift = module.shift + 1


def _replaced_parameter(module):
    module.frozen.weight = nn.Parameter(3 * module.frozen.weight.detach(), requires_grad=False)


def _data(module):
    module.frozen.weight.data = 3 * module.frozen.weight.data


def _written_data(module):
    module.frozen.weight.data.mul_(3)


def _written(module):
    with torch.no_grad():
        module.frozen.weight.mul_(3)


def _inference(module):
    with torch.inference_mode():
        module.frozen.weight.mul_(3)
        module.shift.add_(1)


def _swapped(module):
    module.act = nn.Sigmoid()


def _inside(module):
    module.act = nn.LeakyReLU(0.5)


def _hooked(module):
    module.frozen.register_forward_hook(lambda module, inputs, output: 2 * output)


def _parametrized(module):
    nn.utils.parametrize.register_parametrization(module.frozen, "weight", nn.Softplus())


CHANGES = {
    "load_state_dict": _loaded,
    "a buffer written in place": lambda m: m.shift.mul_(3),
    "a buffer that is not persistent": lambda m: m.hidden.fill_(2),
    "a buffer in place of another": _replaced_buffer,
    "a frozen parameter written in place": _written,
    "a frozen parameter written through .data": _written_data,
    "a frozen parameter with other .data": _data,
    "a frozen parameter in place of another": _replaced_parameter,
    "written in inference mode": _inference,
    "a part in place of another": _swapped,
    "a part of another kind": _inside,
    "a number": lambda m: setattr(m, "temperature", 0.3),
    "a number in a list": lambda m: m.scales.__setitem__(0, 5.0),
    "a function": lambda m: setattr(m, "way", F.relu),
    "a tensor that is no buffer": lambda m: m.mask.__setitem__(0, 0.0),
    "another tensor that is no buffer": lambda m: setattr(m, "mask", 2 * m.mask),
    "a hook": _hooked,
    "a parametrization": _parametrized,
}
IN_FLOAT64 = [("load_state_dict", FLOAT64), ("a frozen parameter written through .data", FLOAT64)]


@pytest.mark.parametrize(("change", "dtype"), [(c, FLOAT32) for c in CHANGES] + IN_FLOAT64)
def test_changes_of_a_module_are_seen(change, dtype):
    module = Told().to(dtype)
    X, y = batch(dtype=dtype)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    optimizer.step(X, y)
    CHANGES[change](module)
    expected = CROSS_ENTROPY(module(X), y)
    loss = optimizer.step(X, y)
    tolerance = 1e-5 if dtype == FLOAT32 else 1e-12
    assert abs(optimizer.info.loss_after - expected) > tolerance
    assert error(loss, expected) < tolerance
    assert error(optimizer.info.loss_after, CROSS_ENTROPY(module(X), y)) < tolerance


def test_an_unchanged_module_is_prepared_once(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return prepare(*arguments)

    monkeypatch.setattr(ddnewton.optim.modules, "prepare", counted)
    modules = {
        "net": (net().eval(), *batch()),
        "batch norm": (normed(), *batch()),
        "frozen": (Told().eval(), *batch()),
        "attention": (module_of("attention"), *problem("attention")[2:4]),
        "lstm": (module_of("lstm"), *problem("lstm")[2:4]),
    }
    for name, (module, X, y) in modules.items():
        calls.clear()
        optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out(0.4), momentum=0.5)
        for t in range(4):
            optimizer.step(X, y)
            optimizer.zero_grad()
            with torch.no_grad():
                module(X)
            assert len(calls) == 1, (name, t)
        optimizer.load_state_dict(optimizer.state_dict())
        module.train()
        module.eval()
        optimizer.step(X[:-2] if name == "net" else X, y[:-2] if name == "net" else y)
        assert len(calls) == 1, name


def module_of(name: str) -> nn.Module:
    return problem(name).model_fn.__closure__[0].cell_contents


class Counting(nn.Module):
    """It keeps something of every call; tracing must leave nothing that breaks the next step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()
        self.calls = 0
        self.last = None

    def forward(self, X):
        self.calls += 1
        self.last = self.layer(X)
        return self.last


def test_a_module_that_keeps_something_of_its_calls():
    module, plain = Counting(), nn.Sequential(Counting().layer)
    optimizer, other = (DirectionalNewton(m, CROSS_ENTROPY) for m in (module, plain))
    for t in range(3):
        assert torch.equal(optimizer.step(*batch(seed=t)), other.step(*batch(seed=t)))
        module(batch()[0])


# --- modes ------------------------------------------------------------------------------------


class Dropping(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.double()


MIXING = {
    "BatchNorm1d '1'": normed,
    "Dropout '1'": Dropping,
}


@pytest.mark.parametrize("gram", ["auto", "dense"])
@pytest.mark.parametrize("culprit", MIXING)
def test_train_mode_is_refused_by_name_and_nothing_changes(culprit, gram):
    module = MIXING[culprit]().eval()
    generator = torch.Generator().manual_seed(0)
    criterion = monte_carlo(CROSS_ENTROPY, 1, generator)
    optimizer = DirectionalNewton(module, criterion, held_out(), gram=gram)
    optimizer.step(*batch())
    before, state = everything(module), copy.deepcopy(optimizer.state_dict())
    info, random = optimizer.info, torch.get_rng_state()
    module.train()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"in {culprit}.*Call .eval\\(\\)"):
            optimizer.step(*batch(seed=1))
    assert identical(everything(module), before)
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(generator.get_state(), state["generator"])
    assert torch.equal(torch.get_rng_state(), random)
    assert optimizer.info is info
    module.eval()
    fresh = copy.deepcopy(module)
    again = monte_carlo(CROSS_ENTROPY, 1, torch.Generator())
    other = DirectionalNewton(fresh, again, held_out(), gram=gram)
    other.load_state_dict(state)
    optimizer.step(*batch(seed=1))
    other.step(*batch(seed=1))
    assert identical(everything(module), everything(fresh))


def test_train_mode_without_layers_that_mix_is_fine():
    module = net().train()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    first = optimizer.step(*batch())
    module.eval()
    assert optimizer.step(*batch()) < first


def test_statistics_of_batch_norm_may_be_updated_between_steps():
    module = normed()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    for t in range(3):
        X, y = batch(seed=t)
        module.train()
        with torch.no_grad():
            module(X + t)
        module.eval()
        expected = CROSS_ENTROPY(module(X), y)
        assert error(optimizer.step(X, y), expected) < 1e-12


# --- inputs -----------------------------------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


def test_batches_may_change_their_size_and_length():
    module = Pooled()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.1)
    for t, (count, length) in enumerate([(5, 3), (9, 3), (1, 3), (4, 6), (4, 1), (5, 3)]):
        torch.manual_seed(t)
        tokens, y = torch.randint(0, 9, (count, length)), torch.randint(0, 3, (count,))
        twin = Twin(module, damping=0.1)
        info = twin.step(tokens, y)
        assert error(optimizer.step(tokens, y), info.loss) < 1e-12
        assert error(parameters(module), twin.params) < 1e-9


def test_batches_may_change_their_dtype():
    module = Pooled()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    tokens, y = torch.randint(0, 9, (6, 4)), torch.arange(6) % 3
    first = optimizer.step(tokens, y)
    assert optimizer.step(tokens.int(), y) < first


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(3, 3), nn.Linear(2, 3, bias=False)
        self.double()

    def forward(self, a, b, *, scale=1.0):
        return torch.tanh(self.left(a)) * self.right(b) * scale


WAYS = {
    "dict": (lambda m, X: m(**X), {"a": torch.ones(6, 3), "b": torch.ones(6, 2)}),
    "tuple": (lambda m, X: m(*X), (torch.ones(6, 3), torch.ones(6, 2))),
    "list": (lambda m, X: m(X[1], X[0]), [torch.ones(6, 2), torch.ones(6, 3)]),
    "scaled": (lambda m, X: m(X[..., :3], X[..., 3:], scale=2.0), torch.ones(6, 5)),
    "a part": (lambda m, X: m.left(X), torch.ones(6, 3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_forward_says_how_a_module_is_called(way):
    forward, X = WAYS[way]
    X = cast(torch.utils._pytree.tree_map(lambda x: x * torch.randn_like(x), X), FLOAT64)
    y = torch.arange(6) % 3
    module = Two()
    fresh = copy.deepcopy(module)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.3, forward=forward)

    def model_fn(params, X):
        with torch.nn.utils.stateless._reparametrize_module(fresh, params):
            return forward(fresh, X)

    params = parameters(module)
    twin = directional_newton(model_fn, CROSS_ENTROPY, 0.3, gram="dense")
    params, _, info = twin.update(params, twin.init(params), X, y)
    assert error(optimizer.step(X, y), info.loss) < 1e-12
    assert error(parameters(module), params) < 1e-9
    if way == "a part":
        assert torch.equal(module.right.weight, fresh.right.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.double()

    def forward(self, X):
        return self.last(torch.tanh(self.first(X)))


@pytest.mark.parametrize("split_up", [False, True])
def test_tied_weights_move_once_and_stay_tied(split_up):
    module = Tied()
    groups = None
    if split_up:
        groups = [
            {"params": [module.last.weight]},
            {"params": [module.first.bias, module.last.bias]},
        ]
    named = [Group("first.weight"), Group(["first.bias", "last.bias"])]
    twin = Twin(module, damping=0.1, groups=named if split_up else None)
    assert len(twin.params) == 3
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.1, params=groups)
    for t in range(3):
        twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
    assert module.last.weight is module.first.weight
    assert error(parameters(module), twin.params) < 1e-9


class Branching(nn.Module):
    """What it computes depends on its numbers, so that no trace holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 30)
        self.head = nn.Linear(30, 3)
        self.double()

    def forward(self, X):
        rows = [
            torch.tanh(self.layer(x)) if float(x.detach().sum()) > 0 else -self.layer(x) for x in X
        ]
        return self.head(torch.stack(rows))


@pytest.mark.parametrize("build", [Branching, LastState])
def test_a_module_that_cannot_be_traced(build, caplog):
    torch.manual_seed(0)
    module = build().double()
    X, y = batch() if build is Branching else (torch.randn(6, 4, 2).double(), torch.arange(6) % 2)
    twin = Twin(module, gram="dense")
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    with caplog.at_level(logging.INFO, "ddnewton"):
        for t in range(3):
            info = twin.step(X, y)
            assert error(optimizer.step(X, y), info.loss) < 1e-9, t
    assert error(parameters(module), twin.params) < 1e-6
    assert build is LastState or "layers of the module are not found" in caplog.text


# --- schedulers -------------------------------------------------------------------------------

SCHEDULERS = {
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.7),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda t: t / 3),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "LinearLR": partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=8, cycle_momentum=False),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.ConstantLR(optimizer, 0.2, total_iters=2),
            lr_scheduler.ExponentialLR(optimizer, 0.8),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize(
    ("name", "damping", "lr"),
    [(name, "number", 0.6) for name in SCHEDULERS]
    + [(name, "held_out", None) for name in ("ExponentialLR", "LambdaLR")],
)
def test_schedulers(name, damping, lr):
    """The rates are those that torch's own optimizer would have."""
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0 if lr is None else lr)
    schedule, rates = SCHEDULERS[name](other), []
    for _ in range(4):
        rates.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    assert len(set(rates)) > 2 or name == "SequentialLR"
    module = net()
    adaptation = DAMPINGS[damping]()
    base = adaptation.learning_rate if lr is None and damping == "held_out" else lambda t: 1.0
    twin = Twin(module, damping=adaptation, learning_rate=lambda t: base(t) * rates[int(t)])
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, adaptation, lr=lr)
    schedule = SCHEDULERS[name](optimizer)
    for t in range(4):
        twin.step(*batch(seed=t))
        optimizer.step(*batch(seed=t))
        schedule.step()
        assert error(parameters(module), twin.params) < 1e-8


def test_reduce_on_plateau():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, 0.1, lr=0.8)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    schedule.step(optimizer.step(*batch()))
    assert optimizer.param_groups[0]["lr"] == 0.8
    schedule.step(optimizer.info.loss + 1)
    assert optimizer.param_groups[0]["lr"] == 0.4
    optimizer.step(*batch())
    assert optimizer.info.learning_rate == 0.4


def test_one_cycle_wants_to_be_told_that_momentum_stays():
    """As of every optimizer of torch without momentum in its groups."""
    optimizer = DirectionalNewton(net(), CROSS_ENTROPY, 0.1)
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=8)


def test_schedulers_scale_the_lr_of_every_group():
    module = net()
    optimizer = DirectionalNewton(
        module, CROSS_ENTROPY, 0.1, params=split(module, [{"lr": 0.5}, {"lr": 0.1}])
    )
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(*batch())
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]
    heads, others = module[4], net()
    before, whole = everything(module), net()
    whole.load_state_dict(before)
    others = split(whole, [{}, {}])
    DirectionalNewton(whole, CROSS_ENTROPY, 0.1, params=others).step(*batch())
    optimizer.step(*batch())
    expected = 0.25 * (whole[4].weight - before["4.weight"])
    assert error(heads.weight - before["4.weight"], expected) < 1e-9


# --- saving and loading -----------------------------------------------------------------------


def saved(tree):
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CRITERIA = {
    "exact": lambda seed: CROSS_ENTROPY,
    "monte_carlo": lambda seed: monte_carlo(CROSS_ENTROPY, 1, torch.Generator().manual_seed(seed)),
}
RESUMED = [
    *(("exact", damping, "plain", False, FLOAT32) for damping in DAMPINGS),
    *(("exact", "held_out", option, False, FLOAT64) for option in list(OPTIONS)[:4]),
    *(
        ("monte_carlo", damping, "momentum and weight decay", True, dtype)
        for damping in ("levenberg_marquardt", "trust_region", "held_out")
        for dtype in BOTH
    ),
]


@pytest.mark.parametrize(("criterion", "damping", "option", "groups", "dtype"), RESUMED)
def test_what_was_saved_goes_on_bit_for_bit(criterion, damping, option, groups, dtype):
    def optimizer_of(module, seed):
        rules = [{"lr": 0.5, "select": top_k(5)}, {"damping": 0.01}]
        return DirectionalNewton(
            module,
            CRITERIA[criterion](seed),
            DAMPINGS[damping](),
            params=split(module, rules) if groups else None,
            **OPTIONS.get(option, {}),
        )

    module = net(dtype)
    optimizer = optimizer_of(module, 1)
    for t in range(2):
        optimizer.step(*batch(dtype=dtype, seed=t))
    file = saved({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    module_2 = net(dtype)
    with torch.no_grad():
        module_2[0].weight.zero_()
    optimizer_2 = optimizer_of(module_2, 2)
    optimizer_2.step(*batch(dtype=dtype, seed=9))  # what it did before does not count
    module_2.load_state_dict(file["module"])
    optimizer_2.load_state_dict(file["optimizer"])
    for t in range(2, 4):
        loss = optimizer.step(*batch(dtype=dtype, seed=t))
        assert torch.equal(optimizer_2.step(*batch(dtype=dtype, seed=t)), loss)
        assert same(optimizer_2.info, optimizer.info)
        assert identical(everything(module_2), everything(module))


def test_schedules_go_on_as_well():
    module, twin = net(), net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out(), lr=0.5)
    schedule = SCHEDULERS["OneCycleLR"](optimizer)
    for t in range(3):
        optimizer.step(*batch(seed=t))
        schedule.step()
    file = saved([module.state_dict(), optimizer.state_dict(), schedule.state_dict()])
    other = DirectionalNewton(twin, CROSS_ENTROPY, held_out())
    schedule_2 = SCHEDULERS["OneCycleLR"](other)
    for each, state in zip((twin, other, schedule_2), file, strict=True):
        each.load_state_dict(state)
    # Without an lr of its own the second is multiplied by what goes with the damping.
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    other = DirectionalNewton(twin, CROSS_ENTROPY, held_out(), lr=1.0)
    schedule_2 = SCHEDULERS["OneCycleLR"](other)
    other.load_state_dict(file[1])
    schedule_2.load_state_dict(file[2])
    for t in range(3, 6):
        for each, times in ((optimizer, schedule), (other, schedule_2)):
            each.step(*batch(seed=t))
            times.step()
        assert identical(everything(twin), everything(module))


def test_the_state_of_a_fresh_optimizer_is_that_of_a_start():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    fresh, start = saved(optimizer.state_dict()), everything(module)
    assert fresh["state"] == {}
    first = [optimizer.step(*batch(seed=t)) for t in range(3)]
    optimizer.load_state_dict(fresh)
    module.load_state_dict(start)
    assert [optimizer.step(*batch(seed=t)) for t in range(3)] == first


def test_going_back_is_exact():
    """A state that was kept in memory is not written to by later steps."""
    module = net()
    criterion = CRITERIA["monte_carlo"](0)
    optimizer = DirectionalNewton(module, criterion, held_out())
    optimizer.step(*batch())
    state, kept = optimizer.state_dict(), everything(module)
    losses = [optimizer.step(*batch(seed=t)) for t in (1, 2)]
    optimizer.load_state_dict(state)
    module.load_state_dict(kept)
    assert [optimizer.step(*batch(seed=t)) for t in (1, 2)] == losses


def test_a_state_of_other_groups_is_refused():
    module = net()
    one = DirectionalNewton(module, CROSS_ENTROPY)
    two = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{}, {}]))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        two.load_state_dict(one.state_dict())


def test_a_state_with_other_momentum_goes_on_without():
    module = net()
    one = DirectionalNewton(module, CROSS_ENTROPY, 0.1)
    one.step(*batch())
    two = DirectionalNewton(module, CROSS_ENTROPY, 0.1, momentum=0.9)
    two.load_state_dict(one.state_dict())
    two.step(*batch())
    assert two.state[module[0].weight]["step"] == 2
    one.load_state_dict(two.state_dict())
    one.step(*batch())
    assert one.state[module[0].weight]["step"] == 3


def test_copies_go_on_by_themselves():
    module = net()
    module[0].requires_grad_(False)
    criterion = CRITERIA["monte_carlo"](0)
    optimizer = DirectionalNewton(module, criterion, held_out())
    optimizer.step(*batch())
    module_2, optimizer_2 = copy.deepcopy((module, optimizer))
    alone = copy.deepcopy(optimizer)
    before = everything(module)
    loss = optimizer_2.step(*batch(seed=1))
    assert identical(everything(module), before)
    assert torch.equal(alone.step(*batch(seed=1)), loss)
    assert torch.equal(optimizer.step(*batch(seed=1)), loss)
    assert identical(everything(module_2), everything(module))
    with torch.no_grad():
        module_2[0].weight.mul_(2)  # the copy's own
    X, y = batch()
    assert error(optimizer_2.step(X, y), CROSS_ENTROPY(module(X), y)) > 1e-3


def test_torch_itself_does_not_copy_an_optimizer_of_closures():
    """A copy of L-BFGS fails when it is used. Ours works, and pickles where its functions do."""
    module = net()
    lbfgs = torch.optim.LBFGS(module.parameters())
    with pytest.raises(AttributeError, match="_params"):
        copy.deepcopy(lbfgs).step(lambda: CROSS_ENTROPY(module(batch()[0]), batch()[1]))
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        pickle.dumps(optimizer)


# --- calls ------------------------------------------------------------------------------------


def calls(optimizer, X, y):
    """Every way to hand over a batch."""
    return {
        "step(X, y)": lambda: optimizer.step(X, y),
        "step(X=, y=)": lambda: optimizer.step(X=X, y=y),
        "step(X, y=)": lambda: optimizer.step(X, y=y),
        "step(closure)": lambda: optimizer.step(lambda: (X, y)),
        "step(closure=)": lambda: optimizer.step(closure=lambda: (X, y)),
        "a list": lambda: optimizer.step(closure=lambda: [X, y]),
        "all three": lambda: optimizer.step(X=X, y=y, closure=lambda: None),
    }


@pytest.mark.parametrize("way", calls(None, None, None))
def test_ways_to_hand_over_a_batch(way):
    module, expected = net(), net()
    X, y = batch()
    loss = DirectionalNewton(expected, CROSS_ENTROPY).step(X, y)
    assert torch.equal(calls(DirectionalNewton(module, CROSS_ENTROPY), X, y)[way](), loss)
    assert identical(everything(module), everything(expected))


def test_a_closure_beside_a_batch_is_called_once_before_the_step():
    module, seen = net(), []
    before = module[0].weight.detach().clone()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    closure = lambda: seen.append(torch.equal(module[0].weight, before))  # noqa: E731
    optimizer.step(X=batch()[0], y=batch()[1], closure=closure)
    assert seen == [True]


@DTYPES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_autograd_around_a_step(mode, dtype):
    def build():
        module = normed(dtype)
        module[0].requires_grad_(False)
        return module

    module, expected = build(), build()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    other = DirectionalNewton(expected, CROSS_ENTROPY, held_out())
    for t in range(3):
        X, y = batch(dtype=dtype, seed=t)
        with mode() if t != 1 else torch.enable_grad():
            optimizer.step(X.clone(), y.clone())
        other.step(X, y)
        assert error(parameters(module), parameters(expected)) < 1e-6
    assert not any(p.is_inference() for p in module.parameters())
    CROSS_ENTROPY(module(batch(dtype=dtype)[0]), batch()[1]).backward()
    saved(optimizer.state_dict())
    copy.deepcopy(optimizer)


def test_batches_made_in_inference_mode():
    module, expected = net(), net()
    with torch.inference_mode():
        X, y = batch()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    assert torch.equal(
        optimizer.step(X, y), DirectionalNewton(expected, CROSS_ENTROPY).step(*batch())
    )


def test_beside_an_optimizer_of_gradients():
    """One trains the body by gradients, the other the head."""
    module = net()
    head = DirectionalNewton(module, CROSS_ENTROPY, params=module[4].parameters())
    body = torch.optim.SGD(module[0].parameters(), lr=0.1)
    for t in range(3):
        X, y = batch(seed=t)
        body.zero_grad()
        loss = CROSS_ENTROPY(module(X), y)
        loss.backward()
        body.step()
        now = CROSS_ENTROPY(module(X), y)
        gradient = module[4].weight.grad.clone()
        assert error(head.step(X, y), now) < 1e-12
        assert torch.equal(module[4].weight.grad, gradient)


def test_hooks_are_called():
    module, seen = net(), []
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    optimizer.register_step_pre_hook(lambda *given: seen.append(("pre", *given)))
    handle = optimizer.register_step_post_hook(lambda *given: seen.append(("post", *given)))
    X, y = batch()
    optimizer.step(X, y=y)
    assert [(when, who) for when, who, *_ in seen] == [("pre", optimizer), ("post", optimizer)]
    assert seen[0][2][1] is X
    assert seen[0][3]["y"] is y
    handle.remove()
    optimizer.step(X, y)
    assert [when for when, *_ in seen] == ["pre", "post", "pre"]


def test_repr_shows_the_groups():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{"lr": 0.5}, {}]))
    assert re.fullmatch(
        r"DirectionalNewton \(\s*Parameter Group 0\s+lr: 0.5\s+Parameter Group 1\s+lr: 1.0\s*\)",
        repr(optimizer),
    )


def test_named_parameters_are_parameters():
    module, expected = net(), net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=module.named_parameters())
    assert torch.equal(
        optimizer.step(*batch()), DirectionalNewton(expected, CROSS_ENTROPY).step(*batch())
    )
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(parameters(module))


# --- refusals ---------------------------------------------------------------------------------


class NoLoss:
    """What a closure of gradients returns."""

    def __call__(self):
        return torch.tensor(1.0, requires_grad=True)


STEPS = {
    "no batch": (lambda o: o.step(), TypeError, "a step needs a batch; got none"),
    "no targets": (lambda o: o.step(batch()[0]), TypeError, "got X without y"),
    "no inputs": (lambda o: o.step(y=batch()[1]), TypeError, "a step needs a batch; got none"),
    "a loss": (lambda o: o.step(NoLoss()), TypeError, r"return the batch, \(X, y\); got Tensor"),
    "a loss, named": (
        lambda o: o.step(closure=NoLoss()),
        TypeError,
        r"return the batch, \(X, y\); got Tensor.*There is no backward",
    ),
    "nothing": (lambda o: o.step(lambda: None), TypeError, "got NoneType"),
    "three things": (lambda o: o.step(lambda: (1, 2, 3)), TypeError, "got tuple"),
    "half a batch": (lambda o: o.step(lambda: (batch()[0], None)), TypeError, "X without y"),
    "strings": (lambda o: o.step(["a"], batch()[1]), TypeError, "must be tensors.*got X.*str"),
    "empty": (lambda o: o.step(*batch(0)), ValueError, "at least one sample"),
    "unequal": (
        lambda o: o.step(batch()[0], batch(5)[1]),
        ValueError,
        "same number of samples; got X: 12, y: 5",
    ),
    "other classes": (lambda o: o.step(batch()[0], batch()[1] + 3), ValueError, "class indices"),
    "other width": (lambda o: o.step(batch()[0][:, :2], batch()[1]), RuntimeError, "shape"),
    "not finite": (
        lambda o: o.step(batch()[0] / 0, batch()[1]),
        ValueError,
        "must be finite; got nan or inf",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_that_is_refused_changes_nothing(case):
    call, kind, message = STEPS[case]
    module = net()
    optimizer = DirectionalNewton(module, CRITERIA["monte_carlo"](0), held_out())
    optimizer.step(*batch())
    before, state = everything(module), copy.deepcopy(optimizer.state_dict())
    info = optimizer.info
    with pytest.raises(kind, match=message):
        call(optimizer)
    assert identical(everything(module), before)
    assert str(optimizer.state_dict()) == str(state)
    assert torch.equal(optimizer.state_dict()["generator"], state["generator"])
    assert optimizer.info is info


def test_an_error_in_a_closure_passes_through():
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)

    def closure():
        raise StopIteration("no more batches")

    before = everything(module)
    with pytest.raises(StopIteration, match="no more batches"):
        optimizer.step(closure)
    assert identical(everything(module), before)
    assert optimizer.state_dict()["state"] == {}


def test_parameters_in_place_of_others_are_refused():
    """An optimizer of gradients would move what the module no longer has."""
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    optimizer.step(*batch())
    module.load_state_dict(everything(module), assign=True)
    with pytest.raises(ValueError, match="must still be those of the module"):
        optimizer.step(*batch())
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=split(module, [{}, {}]))
    module[2].bias = nn.Parameter(torch.zeros(4, dtype=FLOAT64))
    with pytest.raises(ValueError, match="must still be those of the module"):
        optimizer.step(*batch())


ARGUMENTS = {
    "a function": (
        lambda m: ((lambda params, X: X), CROSS_ENTROPY),
        {},
        TypeError,
        "module must be an nn.Module; got function",
    ),
    "a class": (lambda m: (nn.Linear, CROSS_ENTROPY), {}, TypeError, "nn.Module; got type"),
    "parameters": (
        lambda m: (m.parameters(), CROSS_ENTROPY),
        {},
        TypeError,
        "nn.Module; got generator",
    ),
    "lr < 0": (None, {"lr": -0.1}, ValueError, "lr must be a number ≥ 0; got -0.1"),
    "lr nan": (None, {"lr": float("nan")}, ValueError, "lr must be a number ≥ 0; got nan"),
    "lr string": (None, {"lr": "exact"}, TypeError, "lr must be a number ≥ 0; got 'exact'"),
    "damping < 0": (None, {"damping": -1.0}, ValueError, "damping must be a number ≥ 0"),
    "momentum 1": (None, {"momentum": 1.0}, ValueError, "momentum must be below 1"),
    "momentum string": (None, {"momentum": "none"}, ValueError, "momentum must be"),
    "weight decay": (None, {"weight_decay": -1.0}, ValueError, "weight_decay must be"),
    "trust radius": (None, {"trust_radius": 0.0}, ValueError, "trust_radius must be"),
    "select": (None, {"select": 3}, TypeError, "select must be a function or None"),
    "complement": (None, {"complement": "none"}, ValueError, "complement must be"),
    "gram": (None, {"gram": "sparse"}, ValueError, "gram must be one of"),
    "chunk_size": (None, {"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    "no params": (None, {"params": []}, ValueError, "empty parameter list"),
    "a tensor": (None, {"params": torch.ones(1)}, TypeError, "iterable of Tensors"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_break_a_rule(case):
    arguments, options, kind, message = ARGUMENTS[case]
    module = net()
    given = (module, CROSS_ENTROPY) if arguments is None else arguments(module)
    with pytest.raises(kind, match=message):
        DirectionalNewton(*given, **options)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        DirectionalNewton(net().requires_grad_(False), CROSS_ENTROPY)
    with pytest.raises(ValueError, match="empty parameter list"):
        DirectionalNewton(nn.Tanh(), CROSS_ENTROPY)
    module = net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="params must hold at least one tensor"):
        optimizer.step(*batch())


GROUP = {
    "foreign": (
        lambda m: {"params": net()[0].parameters()},
        ValueError,
        "parameters of the module",
    ),
    "half foreign": (
        lambda m: {"params": [m[0].weight, nn.Parameter(torch.ones(1))]},
        ValueError,
        "params must be parameters of the module",
    ),
    "a buffer": (lambda m: {"params": [torch.ones(3)]}, ValueError, "parameters of the module"),
    "twice": (lambda m: {"params": m[4].parameters()}, ValueError, "more than one parameter group"),
    "unknown key": (
        lambda m: {"params": m[0].parameters(), "weight_decay": 0.1, "betas": 1},
        ValueError,
        "a group has params, lr, damping and select of its own; got betas, weight_decay",
    ),
    "lr": (
        lambda m: {"params": m[0].parameters(), "lr": -1.0},
        ValueError,
        "lr of a group must be a number ≥ 0; got -1.0",
    ),
    "lr string": (lambda m: {"params": m[0].parameters(), "lr": "a"}, TypeError, "lr of a group"),
    "damping": (
        lambda m: {"params": m[0].parameters(), "damping": -1.0},
        ValueError,
        "damping must be a number ≥ 0",
    ),
    "adaptation": (
        lambda m: {"params": m[0].parameters(), "damping": held_out()},
        TypeError,
        "damping must be a number",
    ),
    "select": (
        lambda m: {"params": m[0].parameters(), "select": 4},
        TypeError,
        "select must be a function",
    ),
    "a set": (lambda m: {"params": set(m[0].parameters())}, TypeError, "ordered collections"),
}


@pytest.mark.parametrize("case", GROUP)
def test_groups_that_break_a_rule_leave_the_optimizer_as_it_was(case):
    build, kind, message = GROUP[case]
    module, expected = net(), net()
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, params=module[4].parameters())
    other = DirectionalNewton(expected, CROSS_ENTROPY, params=expected[4].parameters())
    group = build(module)
    keys = set(group)
    with pytest.raises(kind, match=message):
        optimizer.add_param_group(group)
    assert set(group) == keys
    assert len(optimizer.param_groups) == 1
    for each, m in ((optimizer, module), (other, expected)):
        each.add_param_group({"params": m[2].parameters(), "damping": 0.2})
    assert torch.equal(optimizer.step(*batch()), other.step(*batch()))
    assert identical(everything(module), everything(expected))


# --- the plain loop ---------------------------------------------------------------------------


def test_a_loop_over_a_loader():
    torch.manual_seed(0)
    X, y = batch(96, FLOAT32)
    data = torch.utils.data.TensorDataset(X, y)
    loader = torch.utils.data.DataLoader(data, batch_size=40, shuffle=True)
    module = net(FLOAT32)
    optimizer = DirectionalNewton(module, CROSS_ENTROPY, held_out())
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(6):
        for inputs, targets in loader:
            optimizer.zero_grad()
            optimizer.step(inputs, targets)
            schedule.step()
        batches = iter(loader)
        optimizer.step(closure=lambda batches=batches: next(batches))
    assert (module(X).argmax(1) == y).double().mean() > 0.9


def test_a_batch_of_dicts_and_a_mask():
    """A transformer block on dicts of token ids and masks, its embedding tied to its output."""
    torch.manual_seed(0)
    module = Block()
    tokens = torch.randint(1, 7, (12, 5))
    tokens[::3, 3:] = 0
    X, y = {"tokens": tokens, "mask": tokens > 0}, tokens[:, 0]
    optimizer = DirectionalNewton(module, CROSS_ENTROPY)
    losses = [optimizer.step(X, y) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(after <= before for before, after in pairwise(losses))
