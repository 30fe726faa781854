"""Updates with gram="free" are those by matrices, as long as both solve to the end."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ddnewton import (
    Group,
    directional_newton,
    fit,
    fixed,
    held_out,
    levenberg_marquardt,
    spring,
    top_k,
    trust_region,
)
from ddnewton.damping import constant, signal_to_noise
from ddnewton.optim import DirectionalNewton
from tests.models import problem
from tests.optim.twins import batch, everything, net
from tests.reference import error, flat

TOLERANCE = 1e-14

DAMPINGS = {
    "number": lambda: 0.1,
    "fixed": lambda: fixed(constant(0.1)),
    "rule": signal_to_noise,
    "levenberg_marquardt": levenberg_marquardt,
    "spring": spring,
    "held_out": lambda: held_out(every=2),
}
OPTIONS = {
    "momentum": {"momentum": 0.7},
    "exact momentum": {"momentum": "exact"},
    "exact rate": {"learning_rate": "exact"},
    "weight decay": {"weight_decay": 0.05},
    "momentum and weight decay": {"momentum": 0.5, "weight_decay": 0.01},
    "trust radius": {"trust_radius": 0.05},
    "select": {"select": top_k(4)},
    "select and complement": {"select": top_k(2), "complement": "damping"},
    "complement": {"select": top_k(2), "complement": 0.5},
    "chunks": {"chunk_size": 7},
    "groups": {"groups": [Group(["0.weight", "0.bias"]), Group("2")]},
    "samples": {"subsampling_grad": range(8), "subsampling_ggn": range(8)},
}
KINDS = [(damping, "plain") for damping in DAMPINGS]
KINDS += [("levenberg_marquardt", option) for option in OPTIONS]
KINDS += [("number", option) for option in OPTIONS]


def trained(given, damping, gram, updates=3, **options):
    """Parameters and records after some updates; what they begin with is that of matrices."""
    model_fn, params, X, y, criterion = given
    optimizer = directional_newton(
        *(model_fn, criterion, damping), scale=None, gram=gram, tol=TOLERANCE, **options
    )
    state, infos = optimizer.init(params), []
    for _ in range(updates):
        params, state, info = optimizer.update(params, state, X, y)
        infos.append(info)
    return params, state, infos


@pytest.mark.parametrize(
    ("name", "damping", "option"),
    [
        (name, damping, option)
        for name in ("relu_mlp", "tied_autoencoder", "more_columns_than_parameters")
        for damping, option in KINDS
        if name == "relu_mlp" or option not in {"groups", "samples"}  # which are of this problem
    ],
)
def test_updates_are_those_of_matrices(name, damping, option):
    options = OPTIONS.get(option, {})
    if option == "samples":
        options = {key: list(samples)[:3] for key, samples in options.items()}
    free, exact = (
        trained(problem(name), DAMPINGS[damping](), gram, 2, **options)
        for gram in ("free", "dense")
    )
    # The damping of a radius is found to some digits only.
    tolerance = 1e-2 if option == "trust radius" else 1e-4
    for info, other in zip(free[2], exact[2], strict=True):
        if int(other.attempts) > 1:
            break  # an arc may have been taken
        for field in ("loss", "loss_after", "damping", "gradient_norm", "predicted_decrease"):
            assert error(getattr(info, field), getattr(other, field)) < tolerance, field
        assert bool(info.accepted) == bool(other.accepted)
    else:
        assert error(free[0], exact[0]) < tolerance


@pytest.mark.parametrize("damping", [levenberg_marquardt, trust_region, spring, lambda: 0.1])
def test_training_lowers_the_loss(damping):
    _, _, infos = trained(problem("tied_autoencoder"), damping(), "free", 8)
    losses = [float(info.loss) for info in infos]
    assert losses[-1] < losses[0] / 1.2
    assert all(info.rank.isnan() for info in infos)


def test_states_are_pickled_and_updates_repeat():
    given = problem("tanh_mlp")
    optimizer = directional_newton(given.model_fn, given.criterion, momentum=0.5, gram="free")
    params, state, _ = optimizer.update(given.params, optimizer.init(given.params), *given[2:4])
    first = optimizer.update(params, state, *given[2:4])
    again = optimizer.update(params, pickle.loads(pickle.dumps(state)), *given[2:4])
    assert torch.equal(flat(first[0]), flat(again[0]))


def test_what_an_update_by_products_refuses():
    given = problem("relu_mlp")
    decays = {name: 0.01 * i for i, name in enumerate(given.params)}
    optimizer = directional_newton(
        given.model_fn, given.criterion, weight_decay=decays, gram="free"
    )
    with pytest.raises(ValueError, match="update: weight_decay must be one number"):
        optimizer.update(given.params, optimizer.init(given.params), *given[2:4])


@pytest.mark.parametrize(
    "damping", [None, 0.1, fixed(constant(0.1))], ids=["none", "number", "rule"]
)
def test_modules_in_training(damping):
    module, (X, y) = net(), batch()
    before = everything(module)
    optimizer = DirectionalNewton(module, nn.CrossEntropyLoss(), damping, gram="free")
    losses = [float(optimizer.step(X, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert any(not torch.equal(before[name], p) for name, p in everything(module).items())
    assert all(p.grad is None for p in module.parameters())
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    twin = net()
    twin.load_state_dict(module.state_dict())
    other = DirectionalNewton(twin, nn.CrossEntropyLoss(), damping, gram="free")
    other.load_state_dict(saved)
    assert float(other.step(X, y)) == float(optimizer.step(X, y))
    assert all(
        torch.equal(a, b) for a, b in zip(twin.parameters(), module.parameters(), strict=True)
    )


@pytest.mark.parametrize("bounds", [None, (-0.4, 0.6)], ids=["free", "bounded"])
def test_fits(bounds):
    given = problem("many_points")
    given = given._replace(params={name: p.clamp(-0.3, 0.5) for name, p in given.params.items()})
    results = [
        fit(*given, bounds=bounds, max_updates=30, gram=gram, scale=None)
        for gram in ("free", "dense")
    ]
    losses = [float(result.loss) for result in results]
    assert losses[0] <= 1.02 * losses[1] + 1e-12
    if bounds:
        for leaf in tree_leaves(results[0].params):
            assert ((leaf >= -0.4) & (leaf <= 0.6)).all()
