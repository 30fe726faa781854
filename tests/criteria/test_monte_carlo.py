"""Curvature from drawn targets and from gradients: unbiased, repeatable, refused where wrong."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from ddnewton import newton_step
from ddnewton.criteria import (
    Loss,
    as_loss,
    convex,
    cross_entropy,
    empirical_fisher,
    expand_batch,
    monte_carlo,
    mse,
)
from ddnewton.criteria.likelihoods import poisson_quantile
from ddnewton.criteria.random_numbers import RowsOfBatch, numbers_of_graph, uniform_from
from ddnewton.linearize.basis import written_out
from ddnewton.quadratic.compilable import with_seeds
from tests.reference import autograd_derivatives, dense, error, solve

FLOAT64 = torch.float64
DRAWS = 4000
WEIGHT = torch.tensor([0.5, 1.0, 2.5], dtype=FLOAT64)
CLASSES = torch.tensor([0, 2, -100, 1])
TOKENS = torch.tensor([[0, 2], [1, -100], [2, 2], [0, 1]])
UNIT = torch.linspace(0, 1, 12, dtype=FLOAT64).reshape(4, 3)
COUNTS = torch.arange(12).reshape(4, 3)

# Each case: a loss, its targets, the shape of an output, and its positions.
LIKELIHOODS = {
    "mse": (F.mse_loss, UNIT, (3,), 1),
    "mse, weight": (partial(F.mse_loss, weight=2 * UNIT + 0.1), UNIT, (3,), 1),
    "mse, one output": (nn.MSELoss(reduction="sum"), UNIT[:, 0], (), 1),
    "classes": (nn.CrossEntropyLoss(), CLASSES, (3,), 1),
    "classes, options": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        CLASSES,
        (3,),
        1,
    ),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), 2 * UNIT, (3,), 1),
    "one class": (nn.CrossEntropyLoss(), 0 * CLASSES.clamp(0), (1,), 1),
    "tokens": (nn.CrossEntropyLoss(), TOKENS, (3, 2), 2),
    "tokens, options": (
        partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.2, ignore_index=2),
        TOKENS.clamp(0),
        (3, 2),
        2,
    ),
    "bce": (nn.BCEWithLogitsLoss(), UNIT, (3,), 1),
    "bce, weights": (nn.BCEWithLogitsLoss(WEIGHT, pos_weight=3 * WEIGHT), UNIT, (3,), 1),
    "poisson": (nn.PoissonNLLLoss(), COUNTS, (3,), 1),
    "gaussian": (partial(F.gaussian_nll_loss, var=UNIT + 0.2), UNIT, (3,), 1),
    "gaussian, pair": (nn.GaussianNLLLoss(), (UNIT, UNIT + 0.2), (3,), 1),
}
EVERY = pytest.mark.parametrize("name", LIKELIHOODS)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def outputs_for(name, *members):
    return torch.randn(*members, 4, *LIKELIHOODS[name][2], dtype=FLOAT64)


def exact(criterion, f, y):
    """∇ℓ_n and ∇²ℓ_n of the mean of the ℓ_n."""
    _, basis, z, h, _ = expand_batch(as_loss(criterion), f, f, y)
    L = written_out(basis)
    return torch.einsum("ncm,nm->nc", L, z), torch.einsum("ncm,nm,nbm->ncb", L, h, L)


@pytest.mark.parametrize("per", ["position", "sequence"])
@EVERY
def test_the_mean_of_many_draws_is_the_hessian(name, per):
    """In its own standard errors, which the draws have as well."""
    criterion, y, _, positions = LIKELIHOODS[name]
    positions = positions if per == "position" else 1
    f = outputs_for(name)
    loss = as_loss(monte_carlo(criterion, DRAWS, source(), per=per))
    expansion = expand_batch(loss, f, f, y)
    assert expansion.basis.shape[2] == loss.columns(f) == DRAWS * positions
    columns = expansion.basis * (DRAWS * expansion.h)[:, None].sqrt()
    columns = columns.reshape(*columns.shape[:2], positions, DRAWS)
    squares = torch.einsum("nctd,nbtd->dncb", columns, columns)
    _, truth = exact(criterion, f, y)
    errors = squares.std(0) / DRAWS**0.5
    assert ((squares.mean(0) - truth).abs() <= 5 * errors + 1e-12 * truth.abs().max()).all()
    assert (errors.diagonal(dim1=1, dim2=2) > 0).any() or truth.abs().max() < 1e-12


@EVERY
def test_the_gradient_and_the_value_are_exact(name):
    criterion, y, _, _ = LIKELIHOODS[name]
    f = outputs_for(name)
    expansion = expand_batch(as_loss(monte_carlo(criterion, 3, source())), f, f, y)
    gradient, _ = exact(criterion, f, y)
    assert (expansion.z == 0).all()
    assert expansion.R.shape == (*gradient.shape, 1)
    torch.testing.assert_close(expansion.R[:, :, 0], gradient, rtol=1e-13, atol=1e-14)
    value = expand_batch(as_loss(criterion), f, f, y).value
    torch.testing.assert_close(expansion.value, value, rtol=1e-13, atol=1e-14)


@EVERY
def test_expanding_again_draws_the_same(name):
    criterion, y, _, _ = LIKELIHOODS[name]
    f = outputs_for(name)
    loss = as_loss(monte_carlo(criterion, 3, source()))
    first = loss.expand(f, y)
    torch.manual_seed(1)
    for own, again in zip(first, loss.expand(f, y), strict=True):
        assert torch.equal(own, again)
    same = as_loss(monte_carlo(criterion, 3, source())).expand(f, y)
    assert torch.equal(first.basis, same.basis)
    if name != "one class":
        other = as_loss(monte_carlo(criterion, 3, source(1))).expand(f, y)
        assert not torch.equal(first.basis, other.basis)


@EVERY
def test_every_call_draws_one_seed(name):
    criterion, y, _, _ = LIKELIHOODS[name]
    generator, like = source(), source()
    random_state = torch.get_rng_state()
    given = monte_carlo(criterion, 3, generator)
    assert torch.equal(generator.get_state(), like.get_state())
    first, second = as_loss(given), as_loss(given)
    for _ in range(2):
        torch.randint(2**63 - 1, (), generator=like)
    f = torch.zeros(4, *LIKELIHOODS[name][2], dtype=FLOAT64)
    columns = [loss.expand(f, y).basis for loss in (first, second)]
    assert torch.equal(generator.get_state(), like.get_state())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert name == "one class" or not torch.equal(*columns)


@EVERY
def test_members_of_an_ensemble_share_the_noise(name):
    criterion, y, _, _ = LIKELIHOODS[name]
    members = outputs_for(name, 3)

    def columns(f):
        return as_loss(monte_carlo(criterion, 2, source())).expand(f, y)

    found = vmap(columns)(members)
    for n, member in enumerate(members):
        for own, alone in zip(found, columns(member), strict=True):
            torch.testing.assert_close(own[n], alone, rtol=1e-13, atol=1e-14)


def test_a_score_has_no_cancellation_on_a_saturated_net():
    """p − e of the class that is drawn is minus the sum of the others."""
    f, y = torch.tensor([[0.0, -60.0, 100.0]], dtype=FLOAT64), torch.tensor([0])
    (column,) = as_loss(monte_carlo(cross_entropy(), 1, source())).expand(f, y).basis[:, :, 0]
    p = f[0].softmax(0)
    torch.testing.assert_close(column, torch.stack([p[0], p[1], -p[0]]), rtol=1e-15, atol=0)
    y = torch.zeros(1, 1, dtype=FLOAT64)
    loss = as_loss(monte_carlo(nn.BCEWithLogitsLoss(), 1, source()))
    column = loss.expand(torch.full((1, 1), 60.0), y).basis
    torch.testing.assert_close(column, -torch.tensor([[[-60.0]]], dtype=FLOAT64).sigmoid())


def test_tokens_cost_a_column_each():
    """Not T (C − 1), nor is a matrix of that size made."""
    f, y = torch.randn(2, 500, 40), torch.randint(500, (2, 40))
    expansion = as_loss(monte_carlo(nn.CrossEntropyLoss(), 1, source())).expand(f, y)
    assert expansion.basis.shape == (2, 500 * 40, 40)


def test_a_sequence_costs_a_column():
    """It is the sum of its tokens' columns, at the same targets."""
    f, y = torch.randn(2, 500, 40), torch.randint(500, (2, 40))
    columns = {
        per: as_loss(monte_carlo(nn.CrossEntropyLoss(), 3, source(), per=per)).expand(f, y).basis
        for per in ("position", "sequence")
    }
    assert columns["sequence"].shape == (2, 500 * 40, 3)
    together = columns["position"].reshape(2, 500 * 40, 40, 3).sum(2)
    torch.testing.assert_close(columns["sequence"], together)
    # A user's loss may have no other form than the columns of its positions.
    loss = cross_entropy()._replace(position_scores=None)
    plain = as_loss(monte_carlo(loss, 3, source(), per="sequence"))
    torch.testing.assert_close(plain.expand(f, y).basis, together)
    assert plain.columns(f) == 3


def test_copies_of_a_criterion_draw_the_same_columns():
    f, y = torch.randn(2, 5, 4), torch.randint(5, (2, 4))
    criterion = monte_carlo(nn.CrossEntropyLoss(), 2, source(), per="sequence")
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied.per == "sequence"
        first, second = (as_loss(one).expand(f, y) for one in (copied, copy.deepcopy(criterion)))
        assert torch.equal(first.basis, second.basis)


@pytest.mark.parametrize("rate", [0.0, 1e-300, 1e-3, 0.7, 5.0, 30.0, 1e3, 1e6, 1e10])
def test_poisson_quantiles_invert_the_distribution(rate):
    """P(K ≤ k − 1) < u ≤ P(K ≤ k), at the ends of what is drawn and between."""
    ends = torch.tensor([2.0**-54, 2.0**-53, 1e-9, 1 - 1e-9, 1 - 2.0**-53], dtype=FLOAT64)
    u = torch.cat([ends, torch.linspace(0.01, 0.99, 99, dtype=FLOAT64)])
    rate = torch.tensor(rate, dtype=FLOAT64)
    k = poisson_quantile(u, rate)
    assert (k == k.round()).all()
    assert (torch.special.gammaincc(k + 1, rate.expand_as(k)) >= u).all()
    below = torch.special.gammaincc(k[k > 0], rate.expand_as(k[k > 0]))
    assert (below < u[k > 0]).all()


def test_a_step_with_drawn_curvature():
    """−(Ĝ + δI)⁻¹ g with the whole gradient, of which the drawn columns hold a part."""
    X, y = torch.randn(4, 2, dtype=FLOAT64), TOKENS
    params = {"W": torch.randn(6, 2, dtype=FLOAT64)}
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def model_fn(p, x):
        return torch.tanh(x @ p["W"].T).reshape(-1, 3, 2)

    def derivatives(loss, f, y):
        drawn = as_loss(monte_carlo(loss, 1, source()))
        _, L, _, h, _ = drawn.expand(f, y)
        hessians = torch.einsum("ncm,nm,nbm->ncb", L, h, L) / drawn.denominator(f, y)
        return autograd_derivatives(loss, f, y)[0], hessians

    truth = dense(model_fn, params, X, y, criterion, derivatives)
    given = monte_carlo(criterion, 1, source())
    result = newton_step(model_fn, params, X, y, given, 0.1, complement=0.1)
    assert error(result, solve(truth, 0.1)) < 1e-12


# --- the empirical Fisher ---------------------------------------------------------------------


def log_cosh(f, y):
    return (f - y).cosh().log().mean()


FISHERS = {name: LIKELIHOODS[name][:3] for name in LIKELIHOODS if "pair" not in name} | {
    "huber": (nn.HuberLoss(reduction="sum"), UNIT, (3,)),
    "smooth_l1": (nn.SmoothL1Loss(beta=0.3), UNIT, (3,)),
    "callable": (log_cosh, UNIT, (3,)),
    "record": (convex(log_cosh), UNIT, (3,)),
}


@pytest.mark.parametrize("name", FISHERS)
def test_the_empirical_fisher_is_made_of_the_samples_gradients(name):
    """G_n / N = r_n r_nᵀ / d for the gradients r_n / d that torch has of the whole batch."""
    criterion, y, shape = FISHERS[name]
    f = torch.randn(4, *shape, dtype=FLOAT64)
    loss = empirical_fisher(criterion)
    expansion = expand_batch(loss, f, f, y)
    assert expansion.basis.shape[2] == 1
    assert expansion.R.shape[2] == 0
    function = log_cosh if isinstance(criterion, Loss) else criterion
    slopes, _ = autograd_derivatives(function, f, y)
    denominator = loss.denominator(f, y)
    truth = torch.einsum("nc,nb->ncb", slopes, slopes) * denominator
    L, z, h = expansion[1:4]
    found = torch.einsum("ncm,nm->nc", L, z) / 4
    torch.testing.assert_close(found, slopes, rtol=1e-12, atol=1e-14)
    found = torch.einsum("ncm,nm,nbm->ncb", L, h, L) / 4
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


def test_a_step_with_the_empirical_fisher():
    X, y = torch.randn(4, 2, dtype=FLOAT64), torch.tensor([0, 2, 1, 1])
    params = {"W": torch.randn(3, 2, dtype=FLOAT64)}

    def model_fn(p, x):
        return torch.tanh(x @ p["W"].T)

    def derivatives(loss, f, y):
        slopes, _ = autograd_derivatives(loss, f, y)
        return slopes, len(f) * torch.einsum("nc,nb->ncb", slopes, slopes)

    truth = dense(model_fn, params, X, y, F.cross_entropy, derivatives)
    result = newton_step(model_fn, params, X, y, empirical_fisher(F.cross_entropy), 0.1)
    assert error(result, solve(truth, 0.1)) < 1e-12


# --- refusals ---------------------------------------------------------------------------------

SAMPLED = monte_carlo(mse(), 1, source())
REFUSALS = {
    "samples 0": ({"samples": 0}, ValueError, "monte_carlo: samples must be at least 1; got 0"),
    "samples bool": ({"samples": True}, TypeError, "samples must be an integer; got bool"),
    "samples float": ({"samples": 1.5}, TypeError, "samples must be an integer; got float"),
    "generator int": ({"generator": 0}, TypeError, r"must be a torch.Generator; got int\. Pass"),
    "generator None": ({"generator": None}, TypeError, "must be a torch.Generator; got NoneType"),
    "per": ({"per": "token"}, ValueError, 'per must be "position" or "sequence"; got \'token\''),
    "no loss": ({"criterion": "mse"}, TypeError, "^monte_carlo: criterion must be a loss function"),
    "a class": ({"criterion": nn.MSELoss}, TypeError, "criterion must be a loss function"),
    "none": ({"criterion": nn.MSELoss(reduction="none")}, ValueError, "reduction='none'"),
    "huber": (
        {"criterion": nn.HuberLoss()},
        ValueError,
        r"must have a likelihood to draw targets from; got HuberLoss\. MSELoss, CrossEntropyLoss",
    ),
    "function": ({"criterion": F.smooth_l1_loss}, ValueError, "got smooth_l1_loss"),
    "partial": (
        {"criterion": partial(F.poisson_nll_loss, log_input=False)},
        ValueError,
        r"got poisson_nll_loss\..*Poisson with log_input=True",
    ),
    "callable": ({"criterion": log_cosh}, ValueError, "got log_cosh"),
    "convex": ({"criterion": convex(log_cosh)}, ValueError, "got a Loss without scores"),
    "twice": ({"criterion": SAMPLED}, ValueError, "got monte_carlo of one. Pass the loss itself"),
    "drawn": ({"criterion": as_loss(SAMPLED)}, ValueError, "got a Loss without scores"),
    "fisher": ({"criterion": empirical_fisher(mse())}, ValueError, "got a Loss without scores"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_monte_carlo_refuses(name):
    changes, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        monte_carlo(**{"criterion": mse(), "samples": 1, "generator": source()} | changes)


def test_monte_carlo_needs_a_generator():
    with pytest.raises(TypeError, match="generator"):
        monte_carlo(mse(), 1)


def test_monte_carlo_asks_what_the_loss_asks():
    loss = as_loss(monte_carlo(mse(), 1, source()))
    with pytest.raises(ValueError, match="shape of the model's outputs"):
        loss.check(torch.zeros(4, 2), torch.zeros(4))


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (SAMPLED, ValueError, "empirical_fisher: criterion must be a loss; got monte_carlo of one"),
        (3, TypeError, "empirical_fisher: criterion must be a loss function; got 3"),
    ],
)
def test_the_empirical_fisher_refuses(criterion, error, message):
    with pytest.raises(error, match=message):
        empirical_fisher(criterion)


def test_the_criterion_itself_is_left_alone():
    criterion = nn.CrossEntropyLoss(weight=WEIGHT)
    before = copy.deepcopy(criterion.state_dict())
    as_loss(monte_carlo(criterion, 1, source())).expand(torch.zeros(4, 3), CLASSES)
    assert torch.equal(criterion.weight, before["weight"])


def test_random_numbers_of_a_graph_are_those_of_their_seed():
    """In the sequence of a generator, behind what is skipped."""
    seed, device = torch.tensor(7), torch.device("cpu")
    generator = source(7)
    torch.rand(3, generator=generator, dtype=FLOAT64)
    truth = torch.rand(5, 2, generator=generator, dtype=FLOAT64)
    assert torch.equal(numbers_of_graph(seed, 3, (5, 2), device), truth)
    torch.library.opcheck(numbers_of_graph, (seed, 3, (5, 2), device))


@pytest.mark.parametrize("rows", [None, RowsOfBatch(2, 6)])
def test_a_second_draw_goes_on_where_the_first_ended(rows):
    generator = source(7)
    truth = [torch.rand(6 if rows else 4, 2, generator=generator, dtype=FLOAT64) for _ in range(2)]
    truth = [numbers[2:] for numbers in truth] if rows else truth
    for seed in (7, torch.tensor(7)):
        uniform = uniform_from(seed, torch.device("cpu"), rows)
        for numbers in truth:
            assert torch.equal(uniform((4, 2)), numbers)


def test_a_criterion_with_a_seed_draws_no_other():
    """In the order of the terms, and a pickle keeps it."""
    f, y = outputs_for("classes"), CLASSES
    criteria = {name: monte_carlo(nn.CrossEntropyLoss(), 2, source()) for name in "ab"}
    (truth, generator), names = (source(), source()), ("b", "a")
    same = {name: monte_carlo(nn.CrossEntropyLoss(), 2, generator) for name in "ab"}
    drawn = with_seeds(same, names)
    for name in names:
        expected = as_loss(criteria[name]._replace(generator=truth)).expand(f, y)
        stored = pickle.loads(pickle.dumps(drawn[name]))
        for criterion in (drawn[name], drawn[name], stored):
            assert torch.equal(as_loss(criterion).expand(f, y).basis, expected.basis)
    assert torch.equal(generator.get_state(), truth.get_state())
    assert with_seeds(same, ("a", "c")) is same  # refused by the call, before it draws
    assert torch.equal(generator.get_state(), truth.get_state())
