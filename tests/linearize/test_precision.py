"""Evaluation in float64: it must be the same function, whatever the model does inside.

Every model is right against the dense float64 reference, from float32 parameters; the ones that
cannot be widened are right to their own rounding. Each of them once was wrong.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

from ddnewton import newton_step, newton_step_and_info
from ddnewton.linearize.widening import Widen, in_float64
from tests.models import Problem
from tests.reference import dense, error, solve

FLOAT32, FLOAT64 = torch.float32, torch.float64
X = torch.linspace(-1, 1, 18).sin().reshape(6, 3)
Y = torch.linspace(0.2, 1.4, 12).cos().reshape(6, 2)


def tensors(**shapes):
    """Parameters with entries of moderate size; a shape of zeros begins with a minus."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def written_by_columns(p, x):
    h = torch.zeros(len(x), 4, dtype=p["a"].dtype)
    h[:, 0] = x @ p["a"]
    h[:, 1] = x[:, 0]
    return h @ p["W"] + p["b"]


def summed_by_index(p, x):
    h = torch.zeros(len(x), 4, dtype=p["a"].dtype)
    h = h.index_add_(1, torch.tensor([0, 0, 2]), x * p["a"])
    return h @ p["W"] + p["b"]


def filled(p, x):
    scale = torch.ones(4, dtype=p["a"].dtype)
    scale[1:3].fill_(0.25)
    return ((x @ p["a"])[:, None] * scale) @ p["W"] + p["b"]


def with_a_constant(p, x):
    """A tensor of float32 takes part whatever the dtype of the parameters: 0.5 is exact in both."""
    return (x @ p["a"])[:, None] * torch.full((4,), 0.5).to(x.dtype) @ p["W"] + p["b"]


def laplacian(p, X):
    def u(x):
        return torch.tanh(x * p["a"]) @ p["W"][:3, 0]

    return vmap(lambda x: torch.stack([hessian(u)(x).trace(), jacrev(u)(x).sum()]))(X)


HEADS = {"trained": 1.0, "zero": 0.0}
INSIDES = [written_by_columns, summed_by_index, filled, with_a_constant, laplacian]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
@pytest.mark.parametrize("model_fn", INSIDES)
def test_what_a_model_does_inside_is_not_lost(model_fn, dtype, head):
    """With a head of zeros the values say nothing about what lies below it."""
    params = tensors(a=(3,), W=(4, 2), b=(2,))
    params["W"] = HEADS[head] * params["W"]
    arguments = (params, X, Y)
    params, x, y = ({k: v.to(dtype) for k, v in params.items()}, X.to(dtype), Y.to(dtype))
    for delta in (1.0, 1e-3):
        expected = solve(dense(model_fn, *arguments, nn.MSELoss()), delta)
        result = newton_step(model_fn, params, x, y, nn.MSELoss(), delta)
        assert error(result, expected) < {FLOAT32: 1e-6, FLOAT64: 1e-10}[dtype]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_what_a_criterion_does_inside_is_not_lost(dtype):
    def weighted(f, y):
        weights = torch.ones(2)
        weights[0] = 10.0
        return (weights * (f - y) ** 2).mean()

    def linear(p, x):
        return x @ p["W"][:3] + p["b"]

    params = tensors(W=(4, 2), b=(2,))
    expected = solve(dense(linear, params, X, Y, weighted), 0.1)
    given = ({k: v.to(dtype) for k, v in params.items()}, X.to(dtype), Y.to(dtype))
    assert error(newton_step(linear, *given, weighted, 0.1), expected) < 1e-6


@pytest.mark.parametrize("delta", [1e-2, 1e-4, 1e-6])
def test_float32_inside_float64_outputs(delta):
    """Columns that are right to float32 only must not count as right to float64."""

    def model_fn(p, x):
        return ((x @ p["A"]) @ p["W"][:3]).double()

    params = tensors(A=(3, 3), W=(4, 2))
    x = X.clone()
    x[:, 2] = x[:, 0] - x[:, 1]  # of deficient rank
    expected = solve(dense(model_fn, params, x, Y, nn.MSELoss()), delta)
    assert error(newton_step(model_fn, params, x, Y.double(), nn.MSELoss(), delta), expected) < 1e-5


def test_a_cast_down_inside_the_model():
    """By hand or not, mixed precision leaves the step of the model it approximates."""

    def model_fn(p, x):
        return (x.bfloat16() @ p["W"][:3].bfloat16()).float() + p["b"]

    params = tensors(W=(4, 2), b=(2,))
    expected = solve(dense(lambda p, x: x @ p["W"][:3] + p["b"], params, X, Y, nn.MSELoss()), 0.1)
    assert error(newton_step(model_fn, params, X, Y, nn.MSELoss(), 0.1), expected) < 1e-6


def test_a_model_that_writes_into_a_narrow_tensor_from_outside():
    """Widening loses what is written, which shows in the values: the model stays narrow."""
    scratch = torch.zeros(2)

    def model_fn(p, x):
        scratch.copy_(p["b"].detach())
        return x @ p["W"][:3] + p["b"] + scratch

    params = tensors(W=(4, 2), b=(2,))
    result = newton_step(model_fn, params, X, Y, nn.MSELoss(), 0.1)
    same = dense(lambda p, x: x @ p["W"][:3] + p["b"] + p["b"].detach(), params, X, Y, nn.MSELoss())
    assert error(result, solve(same, 0.1)) < 1e-5


def test_a_kernel_without_float64_stays_narrow_and_the_log_says_so(caplog):
    def model_fn(p, x):
        if x.dtype == FLOAT64:
            raise RuntimeError("no kernel for Double")
        return x @ p["W"][:3]

    params = tensors(W=(4, 2))
    with caplog.at_level(logging.INFO, "ddnewton"):
        result = newton_step(model_fn, params, X, Y, nn.MSELoss(), 0.1)
    assert "not evaluated in float64: no kernel for Double" in caplog.text
    expected = solve(dense(lambda p, x: x @ p["W"][:3], params, X, Y, nn.MSELoss()), 0.1)
    assert error(result, expected) < 1e-5


def test_another_function_in_float64_is_noticed():
    """A derivative that only the narrow model has: the values are the same, the pullback not."""

    def model_fn(p, x):
        weight = p["W"][:3]
        return x @ (weight if x.dtype == FLOAT32 else weight.detach()) + 0 * p["b"]

    params = tensors(W=(4, 2), b=(2,))
    expected = solve(dense(lambda p, x: x @ p["W"][:3], params, X, Y, nn.MSELoss()), 0.1)
    result = newton_step(model_fn, params, X, Y, nn.MSELoss(), 0.1)
    assert error({"W": result["W"]}, expected[:8]) < 1e-5


def test_a_function_that_depends_on_its_dtype_stays_narrow():
    """RMSNorm's default eps is the dtype's: on tiny inputs float64 is another function."""
    norm = nn.RMSNorm(3)

    def model_fn(p, x):
        return norm(0.01 * x * p["a"]) @ p["W"][:3]

    def with_float32_eps(p, x):
        h = 0.01 * x * p["a"]
        scale = (h.square().mean(-1, keepdim=True) + torch.finfo(FLOAT32).eps).rsqrt()
        return (h * scale) @ p["W"][:3]

    params = tensors(a=(3,), W=(4, 2))
    expected = solve(dense(with_float32_eps, params, X, Y, nn.MSELoss()), 0.1)
    assert error(newton_step(model_fn, params, X, Y, nn.MSELoss(), 0.1), expected) < 1e-5


@pytest.mark.parametrize("cast", [torch.Tensor.half, torch.Tensor.bfloat16])
def test_writing_to_a_copy_cast_down_leaves_the_original(cast):
    def model_fn(p, x):
        h = x @ p["W"][:3]
        low = cast(h)
        low += 0.01
        return h + 0 * low.float() + p["b"]

    params = tensors(W=(4, 2), b=(2,))
    expected = solve(dense(lambda p, x: x @ p["W"][:3] + p["b"], params, X, Y, nn.MSELoss()), 1e-3)
    assert error(newton_step(model_fn, params, X, Y, nn.MSELoss(), 1e-3), expected) < 1e-6


def test_a_criterion_that_takes_float32_only():
    def strict(f, y):
        assert f.dtype == FLOAT32
        return (f - y).square().mean()

    params = tensors(W=(4, 2))
    given = (lambda p, x: x @ p["W"][:3], params, X, Y)
    expected = solve(dense(*given, nn.MSELoss()), 0.1)
    assert error(newton_step(*given, strict, 0.1), expected) < 1e-5


def test_the_loop_takes_over_where_vmap_gives_another_shape():
    def model_fn(p, x):
        matrix = 3 * torch.eye(2, dtype=x.dtype) + p["W"][:2].tanh()
        return torch.linalg.solve(matrix, (x @ p["W"][:3] + p["b"])[..., None])[..., 0]

    given = (model_fn, tensors(W=(4, 2), b=(2,)), X, Y, nn.MSELoss())
    assert error(newton_step(*given, 0.1), solve(dense(*given), 0.1)) < 1e-6


def test_autocast_leaves_the_step_of_the_model_it_approximates():
    def model_fn(p, x):
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ p["W"][:3]).float() + p["b"]

    params = tensors(W=(4, 2), b=(2,))
    expected = solve(dense(lambda p, x: x @ p["W"][:3] + p["b"], params, X, Y, nn.MSELoss()), 0.1)
    assert error(newton_step(model_fn, params, X, Y, nn.MSELoss(), 0.1), expected) < 1e-6


def test_every_operation_computes_in_float64():
    buffer = torch.tensor([0.5, 1.5])

    def function(x):
        y = torch.cat([x, buffer]) * torch.ones(2).repeat(2)
        return y.float().to(torch.bfloat16).half().type(FLOAT32).sum() + torch.tensor(1.0)

    assert in_float64(function)(torch.tensor([1 / 3, 1.0], dtype=FLOAT32)).dtype == FLOAT64
    third = torch.tensor([1 / 3, 0.0], dtype=FLOAT64)
    assert in_float64(function)(third).item() == pytest.approx(1 / 3 + 3, abs=1e-15)


def test_the_mode_leaves_integers_shapes_and_devices_alone():
    with Widen():
        x = torch.zeros(2, 3)
        assert x.shape == (2, 3)
        assert torch.arange(3).dtype == torch.int64
        assert (x > 0).dtype == torch.bool
        assert x.to("cpu").dtype == x.dtype == FLOAT64


@pytest.mark.parametrize("delta", [1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", [nn.MSELoss(), F.huber_loss], ids=["mse", "callable"])
def test_half_precision_parameters(criterion, dtype, delta):
    """The step is rounded once, at the end; δ is not rounded at all."""

    def model_fn(p, x):
        return torch.tanh(x @ p["a"])[:, None] * p["b"]

    params = {k: v.to(dtype) for k, v in tensors(a=(3,), b=(2,)).items()}
    x, y = X.to(dtype), Y.to(dtype)
    expected = solve(dense(model_fn, params, x, y, criterion), delta)
    result, info = newton_step_and_info(model_fn, params, x, y, criterion, delta)
    assert error(result, expected) < 4 * torch.finfo(dtype).eps
    assert info.evals.dtype == FLOAT32
    assert all(leaf.dtype == dtype for leaf in result.values())


# --- derivatives that vanish, and vmap's mistakes --------------------------------------------


def test_a_bias_without_effect_is_no_mixing_of_samples():
    """A key's bias shifts all scores of a query alike; the softmax takes the shift away."""

    def attention(p, x):
        scores = (x @ p["q"]) @ (x @ p["k"] + p["c"]).mT
        return scores.softmax(-1).matmul(x).mean(1)

    params = tensors(q=(3, 4), k=(3, 4), c=(4,))
    x = torch.linspace(-2, 2, 60).sin().reshape(5, 4, 3)
    y = x.mean(1).cos()
    for dtype, bound in ((FLOAT32, 1e-6), (FLOAT64, 1e-9)):
        given = {k: v.to(dtype) for k, v in params.items()}
        result = newton_step(attention, given, x.to(dtype), y.to(dtype), nn.MSELoss(), 0.1)
        assert error(result, solve(dense(attention, params, x, y, nn.MSELoss()), 0.1)) < bound
        assert result["c"].abs().max() < 1e-7


def test_a_parameter_without_any_effect_is_no_mixing_of_samples():
    given = (lambda p, x: (x + p).log_softmax(-1), torch.tensor(0.3), X, X.cos(), nn.MSELoss())
    assert newton_step(*given, 0.1).abs() < 1e-6


def test_a_bias_before_a_normalisation_is_no_mixing_of_samples():
    module = nn.Sequential(nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3), nn.Tanh(), nn.Flatten())
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.linspace(-2, 2, 40).sin().reshape(4, 2, 5)
    given = Problem(
        lambda p, x: functional_call(module, p, (x,)), params, x, torch.zeros(4, 9), nn.MSELoss()
    )
    expected = solve(dense(*given), 0.1)
    assert error(newton_step(*given, 0.1), expected) < 1e-6


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("samples", [2, 5])
def test_vmap_is_not_trusted_where_it_is_wrong(samples, chunk_size):
    """In torch 2.13 ``vmap`` differentiates PReLU wrongly for some numbers of samples."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    params = {name: p.detach() for name, p in module.named_parameters()}
    given = Problem(
        lambda p, x: functional_call(module, p, (x,)),
        params,
        X[:samples],
        Y[:samples],
        nn.MSELoss(),
    )
    result = newton_step(*given, 0.1, chunk_size=chunk_size)
    assert error(result, solve(dense(*given), 0.1)) < 1e-6


# --- rules and callables that are easily mistreated ------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_rules_may_write_to_what_they_are_given(dtype):
    def linear(p, x):
        return x @ p["W"][:3] + p["b"]

    params = {k: v.to(dtype) for k, v in tensors(W=(4, 2), b=(2,)).items()}
    given = Problem(linear, params, X.to(dtype), Y.to(dtype), nn.MSELoss())

    def rough(evals, evecs, gammas, lambdas):
        for tensor in (evals, evecs, gammas, lambdas):
            tensor.zero_()
        return evals + 0.1

    def choose(evals):
        return evals.div_(evals[-1].clone()) > 1e-9

    expected, plain = newton_step_and_info(*given, 0.1)
    result, info = newton_step_and_info(*given, rough, select=choose)
    assert error(result, torch.cat([v.flatten() for v in expected.values()])) < 1e-6
    assert torch.equal(info.evals, plain.evals)


@pytest.mark.parametrize("logit", [5.0, 20.0, 50.0])
@pytest.mark.parametrize("label", [0, 1], ids=["right", "wrong"])
def test_confident_nets_with_a_callable_are_convex(logit, label):
    """An own loss has its own rounding, but its Hessian of -1e-18 is not concave."""

    def own(f, y):
        return F.cross_entropy(f, y)

    W = torch.tensor([[logit, -logit]], dtype=FLOAT64)
    given = (lambda p, x: x @ p, W, torch.ones(1, 1, dtype=FLOAT64), torch.tensor([label]))
    closed = newton_step(*given, nn.CrossEntropyLoss(), 1.0, complement=1.0)
    assert torch.allclose(newton_step(*given, own, 1.0, complement=1.0), closed, 1e-9, 1e-15)


def test_a_criterion_is_probed_where_it_is_defined():
    def probabilities(p, x):
        return (x @ p["W"][:3]).sigmoid()

    params = tensors(W=(4, 2))
    y = (Y > 0.5).float()
    expected = solve(dense(probabilities, params, X, y, nn.BCELoss()), 0.1)
    assert error(newton_step(probabilities, params, X, y, nn.BCELoss(), 0.1), expected) < 1e-6


def test_a_criterion_with_far_targets():
    """The loss is straight there: 1 - tanh² is rounding, and no concave loss."""

    def linear(p, x):
        return x @ p["W"][:3]

    def log_cosh(f, y):
        return torch.cosh(f - y).log().mean()

    params = {"W": tensors(W=(4, 2))["W"].double()}
    given = (linear, params, X.double(), Y.double() + 300, log_cosh)
    assert error(newton_step(*given, 0.1, complement=0.1), solve(dense(*given), 0.1)) < 1e-9
