"""Criteria that divide by anything: held against torch's derivatives of the whole batch."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from ddnewton import (
    empirical_fisher,
    ggn_eigvalsh,
    monte_carlo,
    newton_step,
    newton_step_and_info,
)
from ddnewton.criteria import as_loss, expand_batch
from ddnewton.criteria.hessian_blocks import joint_expansion
from ddnewton.linearize.basis import written_out
from tests.reference import Dense, as_double, autograd_derivatives, dense, eigenpairs, error, solve

FLOAT32, FLOAT64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=["float32", "float64"])
N, C, T = 6, 3, 4


# --- what people bring, as data ---------------------------------------------------------------


def numbers(*shape):
    """Numbers of both signs in no order, the same in every test."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


TARGETS = numbers(N, C)
MASK = numbers(N, C) > -0.4
WEIGHTS = numbers(N, 1).double().exp()
METRIC = torch.eye(C) + 1
MISSING = torch.where(MASK, TARGETS, torch.nan)
LABELS = torch.arange(N).mul(7).remainder(C)
IGNORED = torch.where(torch.arange(N) % 3 == 1, -100, LABELS)
TOKENS = torch.arange(N * T).mul(5).remainder(C).reshape(N, T)
PADDED = torch.where(torch.arange(T) < torch.arange(N)[:, None].clamp(1, T), TOKENS, -100)


def squares(f, y):
    return (f - y).square()


def one_by_one(f, y):
    """Python all through: a loop, and branches on values of y."""
    total, count = torch.zeros((), dtype=f.dtype), 0
    for n in range(len(f)):
        if y[n].sum() > 0:
            total, count = total + squares(f[n], y[n]).sum(), count + 1
    return total / count


def branching(f, y):
    """A branch on the outputs themselves, which vmap refuses."""
    return squares(f, y)[MASK].mean() if f.mean().item() < 1e3 else f.sum()


def in_place(f, y):
    """It writes to its arguments."""
    f -= y
    f[~MASK] = 0
    return f.square().sum() / MASK.sum()


def by_class(f, y):
    """The mean over the samples of a class, then over the classes."""
    return sum(F.cross_entropy(f[y == c], y[y == c]) for c in range(C)) / C


class WeightedMean(nn.Module):
    """A module with weights of its own, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", WEIGHTS)

    def forward(self, f, y):
        return (self.weight * squares(f, y)).sum() / self.weight.sum()


class Case(NamedTuple):
    criterion: object
    y: object
    positions: int = 1


def flattened(f, y):
    """As in Hugging Face's language models: logits [N, T, V]."""
    return F.cross_entropy(f.reshape(-1, C), y.reshape(-1), ignore_index=-100)


def masked_bce(f, y):
    losses = F.binary_cross_entropy_with_logits(f, (y > 0).to(f.dtype), reduction="none")
    return (losses * MASK).sum() / MASK.sum()


def valid_tokens(f, y):
    losses = F.cross_entropy(f.mT, y, reduction="none")
    return losses.sum() / (y != -100).sum()


CASES = {
    "mask in a closure": Case(lambda f, y: (squares(f, y) * MASK).sum() / MASK.sum(), TARGETS),
    "mask in y": Case(
        lambda f, y: (squares(f, y[0]) * y[1]).sum() / y[1].sum(), (TARGETS, MASK)
    ),
    "boolean index": Case(lambda f, y: squares(f, y)[MASK].mean(), TARGETS),
    "missing labels": Case(lambda f, y: (f - y)[~y.isnan()].square().mean(), MISSING),
    "missing labels as zeros": Case(
        lambda f, y: squares(f.where(~y.isnan(), 0), y.nan_to_num()).sum() / y.isfinite().sum(),
        MISSING,
    ),
    "masked bce": Case(masked_bce, TARGETS),
    "weights in a closure": Case(
        lambda f, y: (WEIGHTS[:, 0] * squares(f, y).sum(1)).sum() / WEIGHTS.sum(), TARGETS
    ),
    "weights in y": Case(
        lambda f, y: (y["w"] * squares(f, y["t"])).sum() / y["w"].sum(),
        {"t": TARGETS, "w": WEIGHTS},
    ),
    "weights over N": Case(lambda f, y: (WEIGHTS * squares(f, y)).mean(), TARGETS),
    "weights nearly the same": Case(
        lambda f, y: ((1 + 1e-4 * WEIGHTS) * squares(f, y)).mean(), TARGETS
    ),
    "a module with weights": Case(WeightedMean(), TARGETS),
    "constants of the batch": Case(
        lambda f, y: y.std() / y.abs().max() * squares(f, y).sum() / len(y) ** 0.5, TARGETS
    ),
    "unexplained variance": Case(
        lambda f, y: squares(f, y).sum() / squares(y, y.mean(0)).sum(), TARGETS
    ),
    "by its own value": Case(
        lambda f, y: squares(f, y).sum() / f.detach().square().sum(), TARGETS
    ),
    "class weights": Case(
        lambda f, y: F.cross_entropy(f, y, torch.tensor([0.2, 1.0, 3.0]).to(f.dtype)), LABELS
    ),
    "ignored labels": Case(lambda f, y: 2 * F.cross_entropy(f, y), IGNORED),
    "mean over classes": Case(by_class, LABELS),
    "a metric": Case(
        lambda f, y: (
            torch.einsum("nc,cb,nb,nm->", f - y, METRIC.to(f), f - y, WEIGHTS.to(f)) / WEIGHTS.sum()
        ),
        TARGETS,
    ),
    "cumulated": Case(lambda f, y: squares(f.cumsum(1), y)[MASK].mean(), TARGETS),
    "one by one": Case(one_by_one, TARGETS),
    "branching": Case(branching, TARGETS),
    "in place": Case(in_place, TARGETS),
    "tokens flattened": Case(flattened, PADDED, T),
    "tokens shifted": Case(lambda f, y: flattened(f[:, :-1], y[:, 1:]), PADDED, T),
    "tokens valid": Case(valid_tokens, PADDED, T),
    "tokens smooth": Case(
        lambda f, y: valid_tokens(f, y) + squares(f[:, 1:], f[:, :-1]).sum() / (y >= 0).sum(),
        PADDED,
        T,
    ),
}  # fmt: skip


def cast(tree, dtype):
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def outputs_of(case, dtype=FLOAT64):
    shape = (N, C) if case.positions == 1 else (N, case.positions, C)
    return (1.5 * numbers(*shape)).to(dtype)


def problem_of(case, dtype=FLOAT64):
    """A small net with a shared layer, and the arguments of a step."""
    params = {"in": numbers(5, 2), "out": numbers(case.positions * C, 5)}
    shape = (-1, C) if case.positions == 1 else (-1, case.positions, C)

    def model_fn(p, x):
        return (torch.tanh(x @ p["in"].T) @ p["out"].T).reshape(shape)

    tree = cast((params, numbers(N, 2).flip(0), case.y), dtype)
    return model_fn, *tree, case.criterion


def derivatives(expansion):
    value, basis, z, h, R = expansion
    L = written_out(basis)
    slopes = torch.einsum("ncm,nm->nc", L, z) + R.sum(2)
    return value.mean(), slopes / len(L), torch.einsum("ncm,nm,nbm->ncb", L, h, L) / len(L)


def check_close(result, truth, tolerance=1e-13):
    for part, expected in zip(result, truth, strict=True):
        torch.testing.assert_close(part, expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_the_expansion_is_of_the_whole_batch(name, dtype):
    case = CASES[name]
    f, y = outputs_of(case, dtype), cast(case.y, dtype)
    result = derivatives(expand_batch(as_loss(case.criterion), f, f, y))
    wide, target = f.double(), as_double(y)
    blocks = autograd_derivatives(lambda u, t: case.criterion(u.clone(), t), wide, target)
    check_close(result, (case.criterion(wide.clone(), target), *blocks))


@pytest.mark.parametrize("name", CASES)
def test_every_value_is_the_batchs(name):
    case = CASES[name]
    f, y = outputs_of(case), cast(case.y, FLOAT64)
    expansion = expand_batch(as_loss(case.criterion), f, f, y)
    assert len(set(expansion.value.tolist())) == 1


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_dense_one(name, dtype):
    result = newton_step(*problem_of(CASES[name], dtype), 0.1, complement=0.1)
    model_fn, params, X, y, criterion = problem_of(CASES[name])
    truth = dense(model_fn, params, X, y, lambda f, y: criterion(f.clone(), y))
    assert error(result, solve(truth, 0.1)) < (1e-11 if dtype == FLOAT64 else 1e-5)


PLAIN = {
    "mean": lambda f, y: squares(f, y).mean(),
    "sum": lambda f, y: squares(f, y).sum(),
    "mean of sums": lambda f, y: torch.cosh(f - y).log().sum(1).mean(),
    "a mask, summed": lambda f, y: squares(f, y)[:, 1:].sum(),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_mean_or_sum_has_values_of_its_own(name):
    f, y = outputs_of(CASES["boolean index"]), TARGETS.double()
    loss = as_loss(PLAIN[name])
    assert loss.joint(f, y) is None
    expansion = expand_batch(loss, f, f, y)
    alone = torch.stack([PLAIN[name](f[n : n + 1], y[n : n + 1]) for n in range(N)])
    scale = 1 if name.startswith("mean") else N
    torch.testing.assert_close(expansion.value, scale * alone, rtol=1e-14, atol=0)


def test_weights_that_are_all_the_same_make_a_plain_mean():
    f, y = outputs_of(CASES["boolean index"]), TARGETS.double()
    loss = as_loss(lambda f, y: (2.5 * torch.ones(N, 1) * squares(f, y)).sum() / (2.5 * N))
    assert loss.joint(f, y) is None


def test_one_sample_is_a_plain_mean():
    f, y = torch.randn(1, C, dtype=FLOAT64), torch.randn(1, C, dtype=FLOAT64)
    result = derivatives(expand_batch(as_loss(lambda f, y: squares(f, y).sum().sqrt()), f, f, y))
    loss = lambda f, y: squares(f, y).sum().sqrt()  # noqa: E731 - as a user writes it
    check_close(result, (loss(f, y), *autograd_derivatives(loss, f, y)))


def test_residuals_that_are_all_the_same_hide_nothing():
    """At such outputs the gradient is that of a plain mean, and samples do interact."""
    f = torch.ones(N, C, dtype=FLOAT64)
    with pytest.raises(ValueError, match="samples interact"):
        expand_batch(as_loss(lambda f, y: (f - y).mean().square()), f, f, torch.zeros(N, C))


# --- the smallest blocks ----------------------------------------------------------------------

STRUCTURES = {
    "boolean index": 1,
    "masked bce": 1,
    "class weights": C,
    "tokens flattened": C,
    "tokens smooth": C * T,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_that_do_not_interact_share_no_column(name):
    case = CASES[name]
    f, y = outputs_of(case), cast(case.y, FLOAT64)
    basis = written_out(as_loss(case.criterion).expand(f, y).basis)
    assert ((basis != 0).sum(1) <= STRUCTURES[name]).all()


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_any_one_axis_may_be_that_of_the_classes(axis):
    f, w = torch.randn(3, 2, 4, 3, dtype=FLOAT64), torch.rand(3, dtype=FLOAT64)

    def criterion(f, y):
        return (w * f.logsumexp(axis).sum((1, 2))).sum() / w.sum()

    expansion = joint_expansion(lambda f: criterion(f, None), f)
    check_close(
        derivatives(expansion), (criterion(f, None), *autograd_derivatives(criterion, f, None))
    )
    assert ((expansion.basis != 0).sum(1) <= f.shape[axis]).all()


# --- random losses ----------------------------------------------------------------------------

CONVEX = {
    "square": lambda f, t: (f - t).square(),
    "quartic": lambda f, t: (f - t) ** 4,
    "log-cosh": lambda f, t: torch.cosh(f - t).log(),
    "logistic": lambda f, t: F.softplus(f) - t.sigmoid() * f,
    "exponential": lambda f, t: f.exp() - t * f,
    "pseudo-Huber": lambda f, t: (1 + (f - t).square()).sqrt(),
    "softmax": lambda f, t: (f.logsumexp(-1, keepdim=True) - t.softmax(-1) * f) / f.shape[-1],
    "neighbours": lambda f, t: (f - f.roll(1, -1)).square() - t * f,
    "whole sample": lambda f, t: (f * t).sum(tuple(range(1, f.ndim)), keepdim=True).exp() + 0 * f,
}  # fmt: skip
WITHIN_SAMPLES = {"softmax", "neighbours", "whole sample"}
DIVISORS = {
    "count": lambda t, w: (w > 0).sum(),
    "weights": lambda t, w: w.sum(),
    "root": lambda t, w: w.square().sum().sqrt(),
    "spread": lambda t, w: t.std() * w.amax(),
    "a number": lambda t, w: 17.0,
    "N": lambda t, w: len(w),
    "1": lambda t, w: 1.0,
}
SIZES = st.integers(1, 4)


@st.composite
def random_losses(draw):
    """A criterion, outputs and targets, with the weights in a closure or in y."""
    shape = draw(st.integers(2, 5)), *draw(st.lists(SIZES, max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    f, t = torch.randn(2, *shape, generator=generator, dtype=FLOAT64)
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    w = (spread * torch.randn(shape, generator=generator, dtype=FLOAT64)).exp()
    if draw(st.booleans()):  # a part of the outputs has no label
        w = w * (torch.rand(shape, generator=generator) > 0.4)
        w.view(-1)[0] = 1.0
    names = st.sampled_from(sorted(CONVEX if f.ndim > 1 else CONVEX.keys() - WITHIN_SAMPLES))
    terms = [CONVEX[name] for name in draw(st.lists(names, min_size=1, max_size=2))]
    divisor = DIVISORS[draw(st.sampled_from(sorted(DIVISORS)))]
    if draw(st.booleans()):
        by_sample = w.reshape(len(w), -1).amax(1).reshape(-1, *[1] * (w.ndim - 1))
        w = by_sample.expand(shape).clone()

    def loss(f, t, w):
        return sum((w * term(f, t)).sum() for term in terms) / divisor(t, w)

    if draw(st.booleans()):
        return lambda f, y: loss(f, *y), f, (t, w)
    return lambda f, y: loss(f, y, w), f, t


@given(random_losses())
def test_any_sum_over_samples_divided_by_anything(given_loss):
    criterion, f, y = given_loss
    result = derivatives(expand_batch(as_loss(criterion), f, f, y))
    truth = criterion(f, y), *autograd_derivatives(criterion, f, y)
    for part, expected in zip(result, truth, strict=True):
        assert (part - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())


@given(random_losses(), st.sampled_from([1e-4, 1e-2, 1.0]), st.sampled_from(["sum", "pair", "exp"]))
def test_any_interaction_of_samples_is_refused(given_loss, size, kind):
    criterion, f, y = given_loss
    _, blocks = autograd_derivatives(criterion, f, y)
    size = size * (1 + float(blocks.abs().max()))

    def interacting(f, y):
        total, last = f.reshape(len(f), -1).sum(1), f.reshape(len(f), -1)[:, -1]
        extra = {
            "sum": total.sum().square(),
            "pair": (last[0] - last[1]).square(),
            "exp": 10 * (total.sum() / total.detach().abs().sum()).exp(),
        }
        return criterion(f, y) + size * extra[kind]

    with pytest.raises(ValueError, match="samples interact"):
        expand_batch(as_loss(interacting), f, f, y)


# --- refusals ---------------------------------------------------------------------------------

INTERACTING = {
    "root of a mean": (lambda f, y: squares(f, y).mean().sqrt(), TARGETS),
    "logarithm of a mean": (lambda f, y: squares(f, y).mean().log(), TARGETS),
    "variance": (lambda f, y: (f - y).var(), TARGETS),
    "contrastive": (lambda f, y: F.cross_entropy(f @ f.T, torch.arange(N)), TARGETS),
    "two samples": (lambda f, y: squares(f, y).sum() + squares(f[0], f[1]).sum(), TARGETS),
    "normalised over the batch": (
        lambda f, y: squares((f - f.mean(0)) / f.std(0), y).mean(), TARGETS
    ),
    "divided by the outputs": (lambda f, y: squares(f, y).sum() / f.square().sum(), TARGETS),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("name", INTERACTING)
def test_what_interacts_is_refused_with_what_works(name, dtype):
    given_case = problem_of(Case(*INTERACTING[name]), dtype)
    message = (
        "^newton_step: criterion must have a Hessian without entries between samples; got a "
        "criterion in which samples interact. .*classes on axis 1 and ignore_index.*weights in y"
    )
    with pytest.raises(ValueError, match=message):
        newton_step(*given_case, 0.1)


def test_derivatives_that_are_not_finite_are_refused():
    f = torch.cat([torch.zeros(1, C, dtype=FLOAT64), torch.ones(N - 1, C, dtype=FLOAT64)])
    with pytest.raises(ValueError, match="the loss must be finite; got nan or inf"):
        expand_batch(as_loss(lambda f, y: (WEIGHTS * f.abs() ** 1.5).sum() / 3), f, f, f)


def test_curvature_below_zero_is_refused():
    f = torch.randn(N, C, dtype=FLOAT64)
    with pytest.raises(ValueError, match="convex in the outputs; got a Hessian eigenvalue of -"):
        expand_batch(as_loss(lambda f, y: -(WEIGHTS * f.square()).sum() / 3), f, f, f)


RANDOM = {
    "dropout": (nn.Sequential(nn.Dropout(), nn.Flatten()), "dropout in train mode.*in Dropout"),
    "batch norm": (nn.BatchNorm1d(C), "batch normalisation .* in train mode.*in BatchNorm1d"),
    "noise": (lambda f: f + torch.randn_like(f), "the random function randn_like"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_chance_is_refused_before_anything_is_drawn(name):
    function, message = RANDOM[name]
    before = torch.get_rng_state()
    rule = "criterion must not depend on chance or on the call before; got "
    with pytest.raises(ValueError, match=rule + message):
        newton_step(
            *problem_of(Case(lambda f, y: squares(function(f), y)[MASK].mean(), TARGETS)), 0.1
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_no_targets_are_drawn():
    with pytest.raises(ValueError, match="must have a likelihood to draw targets from"):
        monte_carlo(CASES["class weights"].criterion, 2, torch.Generator())


# --- digits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [10.0, 40.0, 400.0])
@pytest.mark.parametrize("name", ["tokens flattened", "masked bce", "class weights"])
def test_confident_nets_interact_no_more(name, scale):
    case = CASES[name]
    f, y = scale * outputs_of(case), cast(case.y, FLOAT64)
    result = derivatives(expand_batch(as_loss(case.criterion), f, f, y))
    check_close(result, (case.criterion(f, y), *autograd_derivatives(case.criterion, f, y)), 1e-12)


def test_a_net_that_is_right_and_certain_is_flat():
    f = 900 * F.one_hot(LABELS, C).double()
    expansion = expand_batch(as_loss(CASES["class weights"].criterion), f, f, LABELS)
    assert (expansion.h == 0).all()
    assert (expansion.value == 0).all()


def test_weights_of_any_size_keep_their_digits():
    w = 10.0 ** torch.arange(-10, 11, 4, dtype=FLOAT64)[:, None]
    f, y = torch.randn(2, 6, C, dtype=FLOAT64)
    expansion = as_loss(lambda f, y: (w * torch.cosh(f - y).log()).sum() / w.sum()).expand(f, y)
    truth = 6 * w / w.sum() / torch.cosh(f - y).square()
    torch.testing.assert_close(expansion.h, truth, rtol=1e-13, atol=0)


def test_a_criterion_that_takes_only_float32():
    class OnlyFloat32(torch.autograd.Function):
        @staticmethod
        def forward(x):
            if x.dtype != FLOAT32:
                raise RuntimeError("float32 only")
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, u):
            return u

    y, loss = TARGETS, CASES["boolean index"].criterion
    f = outputs_of(CASES["boolean index"], FLOAT32)
    record = as_loss(lambda f, y: loss(OnlyFloat32.apply(f), y))
    result = derivatives(expand_batch(record, f, f.double(), y))
    wide = f.double(), y.double()
    check_close(result, (loss(*wide), *autograd_derivatives(loss, *wide)), 1e-6)


def test_outputs_may_have_bounds():
    """`F.binary_cross_entropy` refuses what is not in [0, 1], as are shifted outputs."""
    f, y = torch.rand(N, C, dtype=FLOAT64), (TARGETS > 0).double()
    f[0, 0], f[1, 1] = 1e-9, 1 - 1e-9

    def criterion(f, y):
        return (F.binary_cross_entropy(f, y, reduction="none") * MASK).sum() / MASK.sum()

    result = derivatives(expand_batch(as_loss(criterion), f, f, y))
    truth = criterion(f, y), *autograd_derivatives(criterion, f, y)
    for part, expected in zip(result, truth, strict=True):
        assert error(part, expected) < 1e-12


# --- through other functions ------------------------------------------------------------------

SOME = ["boolean index", "weights in y", "class weights", "tokens flattened", "by its own value"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("gram", ["structured", "dense"])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunks_change_nothing(name, gram, chunk_size):
    given_case = problem_of(CASES[name])
    whole = newton_step(*given_case, 0.1)
    assert error(newton_step(*given_case, 0.1, gram=gram, chunk_size=chunk_size), whole) < 1e-11


@pytest.mark.parametrize("name", SOME)
def test_the_record_has_the_loss_of_the_batch(name):
    given_case = problem_of(CASES[name])
    truth = dense(*given_case)
    _, info = newton_step_and_info(*given_case, 0.1)
    assert error(info.loss, truth.loss) < 1e-14
    assert error(info.gradient_norm, truth.gradient.norm()) < 1e-12
    assert error(ggn_eigvalsh(*given_case)[-3:], eigenpairs(truth)[0][-3:]) < 1e-12


@pytest.mark.parametrize("name", SOME)
def test_sub_samples_are_of_the_batchs_derivatives(name):
    grad, ggn = [4, 0, 2], [1, 2, 3, 5]
    given_case = problem_of(CASES[name])
    truth = dense(*given_case)
    result = newton_step(
        *given_case, 0.1, complement=0.1, subsampling_grad=grad, subsampling_ggn=ggn
    )
    of_ggn = Dense(truth.loss, *(part[ggn] for part in truth[1:])).ggn
    damped = of_ggn + 0.1 * torch.eye(len(of_ggn), dtype=FLOAT64)
    expected = -torch.linalg.solve(damped, truth.gradients[grad].mean(0))
    assert error(result, expected) < 1e-11


@pytest.mark.parametrize("name", SOME)
def test_the_empirical_fisher_is_of_the_samples_parts(name):
    model_fn, params, X, y, criterion = problem_of(CASES[name])
    truth = dense(model_fn, params, X, y, criterion)
    result = newton_step(model_fn, params, X, y, empirical_fisher(criterion), 0.1, complement=0.1)
    G = truth.gradients.T @ truth.gradients / N
    damped = G + 0.1 * torch.eye(len(G), dtype=FLOAT64)
    assert error(result, -torch.linalg.solve(damped, truth.gradient)) < 1e-11


@pytest.mark.parametrize("name", [*SOME, "mask in a closure", "missing labels as zeros"])
def test_an_ensemble_is_its_members(name):
    model_fn, params, X, y, criterion = problem_of(CASES[name])
    members = tree_map(lambda p: torch.stack([p, p.flip(0), -p]), params)
    result = vmap(lambda p: newton_step(model_fn, p, X, y, criterion, 0.1))(members)
    for n in range(3):
        own = tree_map(lambda p, n=n: p[n], members)
        step = newton_step(model_fn, own, X, y, criterion, 0.1)
        assert error(tree_map(lambda p, n=n: p[n], result), step) < 1e-11


def test_a_member_in_which_samples_interact_is_refused():
    model_fn, params, X, y, _ = problem_of(CASES["boolean index"])
    members = tree_map(lambda p: torch.stack([p, 2 * p]), params)
    with pytest.raises(ValueError, match="samples interact"):
        vmap(lambda p: newton_step(model_fn, p, X, y, INTERACTING["variance"][0], 0.1))(members)
