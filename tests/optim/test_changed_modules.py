"""What changes in a module between two steps is seen, and the rest is prepared once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddnewton.optim.modules
from ddnewton import held_out, prepare
from ddnewton.optim import DirectionalNewton
from tests.methods import FLOAT32, FLOAT64
from tests.models import problem
from tests.optim.twins import CROSS_ENTROPY, batch, module_of, net, normed
from tests.reference import error

pytestmark = pytest.mark.usefixtures("layers_found_once")


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
