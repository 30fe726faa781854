"""Steps by products change nothing outside, whatever happens; and are the same ones twice."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ddnewton import newton_step, newton_step_and_info, top_k
from tests.methods import FLOAT32, FLOAT64, truth
from tests.models import problem
from tests.reference import error, flat, solve
from tests.whole.test_complex import damped_waves, fit, pairs, reference, solved

OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"complement": 0.2, "select": top_k(2), "chunk_size": 2}], ids=str
)


def module_and_batch():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 3)
    )
    module.eval()
    module[1].train()
    module[4].bias.requires_grad_(False)
    return module, torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])


def switches():
    """Global state that a step may use and must give back."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state().tolist(),
    )


@OPTIONS
@pytest.mark.parametrize("interrupted", [None, 0, 3, 6])
def test_nothing_outside_changes(options, interrupted):
    """Nor where the user interrupts in the middle of a call of the model."""
    module, X, y = module_and_batch()
    flags = [m.training for m in module.modules()]
    before, calls = {k: v.clone() for k, v in module.state_dict().items()}, []
    params, kept, X_before = dict(module.named_parameters()), switches(), X.detach().clone()

    def model_fn(p, x):
        calls.append(None)
        if len(calls) - 1 == interrupted:
            raise KeyboardInterrupt
        return functional_call(module, p, (x,))

    def step():
        return newton_step(
            model_fn, params, X, y, nn.CrossEntropyLoss(), 0.1, gram="free", **options
        )

    if interrupted is None:
        assert not any(leaf.requires_grad for leaf in tree_leaves(step()))
    else:
        with pytest.raises(KeyboardInterrupt):
            step()
    assert switches() == kept
    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in params.values())
    assert [p.requires_grad for p in params.values()] == [True] * 5 + [False]
    assert all(p is params[name] for name, p in module.named_parameters())
    assert torch.equal(X.detach(), X_before)
    assert X.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["relu_mlp", "lstm", "poisson", "encoder_layer"])
def test_in_any_mode(name, context):
    with context():
        kept = switches()
        result = newton_step(*problem(name), 0.1, gram="free", tol=1e-20)
        assert switches() == kept
    assert error(result, solve(truth(name), 0.1)) < 1e-9


def test_parameters_and_samples_made_in_inference_mode():
    with torch.inference_mode():
        given = problem("relu_mlp")
    result = newton_step(*given, 0.1, gram="free", tol=1e-20)
    assert error(result, solve(truth("relu_mlp"), 0.1)) < 1e-9


@OPTIONS
@pytest.mark.parametrize("name", ["convolution", "attention", "many_points"])
def test_the_same_call_twice_gives_the_same_bits(name, options):
    first, second = (
        newton_step_and_info(*problem(name, FLOAT32), 0.1, gram="free", **options) for _ in range(2)
    )
    assert torch.equal(flat(first[0]), flat(second[0]))
    assert int(first[1].products) == int(second[1].products)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_complex_parameters(dtype):
    params, X, y = fit(dtype)
    result = newton_step(damped_waves, params, X, y, nn.MSELoss(), 0.1, gram="free", tol=1e-20)
    assert all(result[name].dtype == p.dtype for name, p in params.items())
    params, X, y = fit(FLOAT64)
    exact = solved(reference(damped_waves, params, X, y, nn.MSELoss()), 0.1)
    assert error(pairs(result), exact) < (1e-5 if dtype == FLOAT32 else 1e-9)
    along = {"select": top_k(2), "complement": 0.5}
    steps = [
        pairs(newton_step(damped_waves, *fit(FLOAT64), nn.MSELoss(), 0.1, **along, **way))
        for way in ({}, {"gram": "free", "tol": 1e-8})
    ]
    assert error(*steps) < 1e-9


def test_complex_outputs():
    params, X, _ = fit()

    def waves(p, x):
        return (p["c"] * torch.exp(p["s"] * x)).sum(1, keepdim=True)

    y = torch.complex(X.cos(), X.sin())

    def criterion(f, y):
        return torch.view_as_real(f - y).square().mean()

    steps = [
        pairs(newton_step(waves, params, X, y, criterion, 0.1, **way))
        for way in ({}, {"gram": "free", "tol": 1e-20})
    ]
    assert error(*steps) < 1e-9
