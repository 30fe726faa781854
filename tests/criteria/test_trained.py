"""A criterion that reads what is trained is refused, whatever way it reads it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from ddnewton import directional_newton, empirical_fisher, ggn_eigvalsh, newton_step
from ddnewton.criteria import mse
from ddnewton.optim import DirectionalNewton

NET = nn.Linear(3, 2)
X, Y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(0, 1, 8).reshape(4, 2)
PARAMS = {name: p.detach().clone() for name, p in NET.named_parameters()}
REFUSED = r"must read nothing that is trained: its result on detached outputs .*weight_decay"


def model_fn(p, x):
    return functional_call(NET, p, (x,))


def step(criterion, params=PARAMS, y=Y):
    return newton_step(model_fn, params, X, y, criterion, 0.1)


class Uncertain(nn.Module):
    """A loss with a scale of its own, to be trained."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()))

    def forward(self, outputs, y):
        return ((-self.s).exp() * (outputs - y).square()).mean() + self.s


class Penalised(nn.Module):
    """A loss that reads a module which it does not register."""

    def __init__(self, module):
        super().__init__()
        self.parts = [module]

    def forward(self, outputs, y):
        return F.mse_loss(outputs, y) + sum(p.square().sum() for p in self.parts[0].parameters())


def penalised(module, outputs, y):
    return F.mse_loss(outputs, y) + 0.1 * module.weight.square().sum()


CRITERIA = {
    "closure": lambda outputs, y: penalised(NET, outputs, y),
    "partial": partial(penalised, NET),
    "module that hides one": Penalised(NET),
    "parameters of its own": Uncertain(),
    "a product, not a sum": lambda o, y: F.mse_loss(o, y) * (1 + NET.weight.norm()),
    "weights that are trained": lambda o, y: (NET.bias.exp() * (o - y).square()).mean(),
    "of the leaves of params": lambda o, y: F.mse_loss(o, y) + PARAMS["weight"].square().sum(),
    "of several leaves at once": lambda o, y: (
        F.mse_loss(o, y) + torch.cat([p.reshape(-1) for p in PARAMS.values()]).norm()
    ),
    "of a list of them": lambda o, y: (
        F.mse_loss(o, y) + torch.stack(torch._foreach_norm(list(PARAMS.values()))).sum()
    ),
    "of their values": lambda o, y: F.mse_loss(o, y) * (1 + PARAMS["bias"][0].item() ** 2),
    "a transformed one": empirical_fisher(lambda o, y: penalised(NET, o, y)),
    "torch's own, weighted": nn.BCEWithLogitsLoss(
        weight=nn.Parameter(torch.ones(2)), reduction="sum"
    ),
    "torch's function, weighted": partial(F.mse_loss, weight=nn.Parameter(torch.ones(4, 2))),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_refused(criterion):
    with pytest.raises(ValueError, match=REFUSED):
        step(criterion)


def test_refused_as_soon_as_a_record_is_made():
    with pytest.raises(ValueError, match=REFUSED):
        mse(weight=nn.Parameter(torch.ones(4, 2)))
    with pytest.raises(ValueError, match=f"directional_newton|{REFUSED}"):
        empirical_fisher(Uncertain())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_refused_in_every_mode_of_autograd(context):
    with context(), pytest.raises(ValueError, match=REFUSED):
        step(CRITERIA["closure"])


def test_refused_under_vmap():
    stacked = {name: torch.stack([p, 2 * p]) for name, p in PARAMS.items()}
    with pytest.raises(ValueError, match=REFUSED):
        vmap(lambda p: step(CRITERIA["closure"], p))(stacked)


def test_refused_by_every_public_function():
    with pytest.raises(ValueError, match="ggn_eigvalsh: criterion must read nothing"):
        ggn_eigvalsh(model_fn, PARAMS, X, Y, CRITERIA["closure"])
    optimizer = directional_newton(model_fn, CRITERIA["closure"])
    with pytest.raises(ValueError, match="update: criterion must read nothing"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), X, Y)


@pytest.mark.parametrize("criterion", [CRITERIA["closure"], Uncertain(), Penalised(NET)])
def test_a_refused_step_of_the_optimizer_changes_nothing(criterion):
    before = {name: p.clone() for name, p in NET.named_parameters()}
    with pytest.raises(ValueError, match=REFUSED):
        DirectionalNewton(NET, criterion).step(X, Y)
    assert all(torch.equal(p, before[name]) for name, p in NET.named_parameters())


def test_what_is_constant_is_taken():
    expected = step(nn.MSELoss())["weight"]
    with_constant = {
        "detached": lambda o, y: F.mse_loss(o, y) + NET.weight.detach().norm(),
        "data": lambda o, y: F.mse_loss(o, y) + NET.weight.data.norm(),
        "shapes": lambda o, y: F.mse_loss(o, y) * PARAMS["weight"].numel() / 6,
        "detached leaf": lambda o, y: F.mse_loss(o, y) + PARAMS["weight"].detach().norm(),
    }
    for criterion in with_constant.values():
        assert torch.allclose(step(criterion)["weight"], expected)
    frozen = Uncertain().requires_grad_(False)
    assert torch.allclose(step(frozen)["weight"], expected)


def test_targets_and_parameters_may_require_gradients():
    expected = step(lambda o, y: (o - y).square().mean())
    params = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    alike = step(lambda o, y: (o - y).square().mean(), params, Y.clone().requires_grad_())
    assert torch.equal(alike["weight"], expected["weight"])


def test_a_criterion_that_writes_to_its_arguments_is_taken():
    step(lambda o, y: o.sub_(y).square_().mean())
