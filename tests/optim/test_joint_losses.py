"""Training on criteria whose samples have no losses of their own: the criterion itself falls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from ddnewton import (
    directional_derivatives,
    directional_newton,
    fixed,
    held_out,
    levenberg_marquardt,
    newton_step_and_info,
    top_k,
    trust_region,
)
from ddnewton.optim import DirectionalNewton
from tests.models import normal
from tests.reference import error

FLOAT64 = torch.float64
N, C = 8, 3
WEIGHTS = torch.tensor([0.1, 2.0, 0.0, 1.0, 0.7, 3.0, 1.5, 0.2], dtype=FLOAT64)


def model_fn(p, x):
    return torch.tanh(x @ p["in"].T) @ p["out"].T


@pytest.fixture
def params():
    return {"in": normal(5, 4).double(), "out": normal(C, 5).double()}


@pytest.fixture
def batch():
    """Inputs, and targets with their weights."""
    return normal(N, 4).double(), (normal(N, C).double(), WEIGHTS)


def joint(f, y):
    """Σ w ℓ / Σ w: no sample has a loss of its own."""
    target, weight = y
    return (weight * (f - target).square().sum(1)).sum() / weight.sum()


def plain(f, y):
    """The same loss as a plain mean, with weights that were divided before."""
    target, share = y
    return (share * (f - target).square().sum(1)).mean()


def as_plain(y):
    target, weight = y
    return target, N * weight / weight.sum()


DAMPINGS = {
    "levenberg_marquardt": levenberg_marquardt,
    "trust_region": trust_region,
    "fixed": lambda: fixed(0.5),
    "held_out": lambda: held_out(every=2),
}
OPTIONS = {
    "nothing": {},
    "weight decay": {"weight_decay": 0.01},
    "top": {"select": top_k(4), "complement": "damping"},
    "exact": {"learning_rate": "exact"},
    "chunks": {"chunk_size": 3},
    "gradient's samples": {"subsampling_grad": [5, 0, 3, 1]},
    "directions' samples": {"subsampling_ggn": [1, 3, 4, 5, 6]},
    "curvature's samples": {
        "subsampling_ggn": [1, 3, 4, 5, 6],
        "subsampling_curvature": [0, 2, 7],
        "select": top_k(6),
    },
}


def loss_at(params, X, y, decay=0.0):
    squares = sum(leaf.square().sum() for leaf in params.values())
    return joint(model_fn(params, X), y) + decay / 2 * squares


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("option", OPTIONS)
def test_training_is_that_of_the_same_loss_as_a_plain_mean(damping, option, params, batch):
    X, y = batch
    runs = [
        directional_newton(model_fn, criterion, DAMPINGS[damping](), **OPTIONS[option])
        for criterion in (joint, plain)
    ]
    ours, theirs = [(params, run.init(params), None) for run in runs]
    for _ in range(4):
        before = ours[0]
        ours = runs[0].update(*ours[:2], X, y)
        theirs = runs[1].update(*theirs[:2], X, as_plain(y))
        assert error(ours[0], theirs[0]) < 1e-8
        info, expected = ours[2], theirs[2]
        assert info.accepted == expected.accepted
        assert info.attempts == expected.attempts
        assert error(info.ratio, expected.ratio) < 1e-6
        decrease = (x.loss - x.loss_after for x in (info, expected))
        assert error(*decrease) < 1e-8
        # What is told is the criterion's own value, of whatever samples the gradient is.
        decay = OPTIONS[option].get("weight_decay", 0.0)
        assert error(info.loss, loss_at(before, X, y, decay)) < 1e-13
        if damping != "held_out" and "subsampling_grad" not in OPTIONS[option]:
            assert error(info.loss_after, loss_at(ours[0], X, y, decay)) < 1e-13


def test_the_loss_of_a_sub_sample_leaves_other_samples_where_they_are(params, batch):
    X, y = batch
    samples = [5, 0, 3]
    optimizer = directional_newton(model_fn, joint, subsampling_grad=samples)
    moved, _, info = optimizer.update(params, optimizer.init(params), X, y)
    f = model_fn(params, X)
    before = joint(f, y)
    f[samples] = model_fn(moved, X)[samples]
    assert info.accepted
    assert error(info.loss, before) < 1e-14
    assert error(info.loss_after, before + N / 3 * (joint(f, y) - before)) < 1e-13


def test_levenberg_marquardt_lowers_the_criterion_to_its_minimum(params, batch):
    X, y = batch
    optimizer = directional_newton(model_fn, joint)
    state, losses = optimizer.init(params), [float(loss_at(params, X, y))]
    for _ in range(60):
        params, state, info = optimizer.update(params, state, X, y)
        losses.append(float(loss_at(params, X, y)))
        assert abs(float(info.loss_after) - losses[-1]) <= 1e-12 * losses[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-10 * losses[0]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_and_its_record_are_those_of_a_plain_mean(option, params, batch):
    X, y = batch
    options = {"complement": 0.3} | {
        name: value for name, value in OPTIONS[option].items()
        if name in {"select", "chunk_size"} or name.startswith("subsampling")
    }  # fmt: skip
    step, info = newton_step_and_info(model_fn, params, X, y, joint, 0.3, **options)
    expected = newton_step_and_info(model_fn, params, X, as_plain(y), plain, 0.3, **options)
    assert error(step, expected[0]) < 1e-10
    assert error(info.loss, joint(model_fn(params, X), y)) < 1e-14
    for name in ("evals", "lambdas", "predicted_decrease", "gradient_norm", "gradient_share"):
        assert error(getattr(info, name), getattr(expected[1], name)) < 1e-9, name
    assert error(info.gammas.abs(), expected[1].gammas.abs()) < 1e-9


def test_derivatives_of_samples_have_the_batchs_as_their_mean(params, batch):
    X, y = batch
    gammas, lambdas = directional_derivatives(model_fn, params, X, y, joint, select=top_k(4))
    _, info = newton_step_and_info(model_fn, params, X, y, joint, 0.0, select=top_k(4))
    assert error(gammas.mean(0).abs(), info.gammas.mean(0).abs()) < 1e-12
    assert error(lambdas.mean(0), info.evals) < 1e-12
    assert (gammas[2] == 0).all()  # its weight is 0


def test_an_ensemble_trains_as_its_members(params, batch):
    X, y = batch
    members = tree_map(lambda p: torch.stack([p, -p, p.flip(0)]), params)
    optimizer = directional_newton(model_fn, joint, subsampling_grad=[0, 1, 3, 4, 5])

    def train(p):
        state = optimizer.init(p)
        for _ in range(3):
            p, state, info = optimizer.update(p, state, X, y)
        return p, info.loss

    result, losses = vmap(train)(members)
    for n in range(3):
        own, loss = train(tree_map(lambda p, n=n: p[n], members))
        assert error(tree_map(lambda p, n=n: p[n], result), own) < 1e-9
        assert error(losses[n], loss) < 1e-12


def walled(f, y):
    """Finite only near the start."""
    return joint(f, y) + 0 / (f.abs().amax() < 4).to(f.dtype) * f.sum()


def test_a_step_to_no_finite_loss_is_not_taken(batch):
    X, (target, weight) = batch
    optimizer = directional_newton(lambda p, x: p * x[:, :C], walled, fixed(0.0))
    start = torch.ones(C, dtype=FLOAT64)
    moved, _, info = optimizer.update(start, optimizer.init(start), X, (100 * target, weight))
    assert info.accepted
    assert info.attempts > 1
    assert info.loss_after < info.loss
    assert error(info.loss_after, walled(moved * X[:, :C], (100 * target, weight))) < 1e-12


class Tagger(nn.Module):
    """Logits [N, T, V] of tokens, as a language model has them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embedding(tokens).cumsum(1))))


def hugging_face(logits, labels):
    """The loss of shifted labels, with −100 for what is padding."""
    shifted = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(shifted, labels[:, 1:].reshape(-1), ignore_index=-100)


@pytest.mark.parametrize("damping", ["levenberg_marquardt", "held_out"])
def test_a_module_in_place_with_padded_tokens(damping):
    tokens = torch.arange(24).mul(5).remainder(7).reshape(4, 6)
    labels = torch.where(torch.arange(6) < torch.tensor([[6], [3], [5], [2]]), tokens, -100)
    module = Tagger().double()
    optimizer = DirectionalNewton(module, hugging_face, DAMPINGS[damping]())
    first = hugging_face(module(tokens), labels)
    for _ in range(12):
        before = hugging_face(module(tokens), labels)
        loss = optimizer.step(tokens, labels)
        assert error(loss, before) < 1e-12
    assert hugging_face(module(tokens), labels) < 0.5 * first


def test_batches_of_any_size_with_weights_in_y(params):
    optimizer = directional_newton(model_fn, joint, fixed(1.0))
    state = optimizer.init(params)
    for n in (8, 1, 5, 2):
        X, y = normal(n, 4).double(), (normal(n, C).double(), torch.rand(n, dtype=FLOAT64))
        loss = joint(model_fn(params, X), y)
        params, state, info = optimizer.update(params, state, X, y)
        assert error(info.loss, loss) < 1e-13


def test_functional_and_in_place_training_are_one():
    module = Tagger().double()
    tokens = torch.arange(24).mul(5).remainder(7).reshape(4, 6)
    labels = torch.where(tokens > 1, tokens, -100)
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    functional = directional_newton(lambda p, x: functional_call(module, p, (x,)), hugging_face)
    in_place, state = DirectionalNewton(module, hugging_face), functional.init(own)
    for _ in range(3):
        in_place.step(tokens, labels)
        own, state, _ = functional.update(own, state, tokens, labels)
    assert error(dict(module.named_parameters()), own) < 1e-6
