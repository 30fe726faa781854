"""Steps of losses that sum over positions, from blocks, are those from the basis with its zeros."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from ddnewton import Batches, Group, ggn_eigvalsh, newton_step
from ddnewton.columns import factors
from ddnewton.columns.factors import Outer, Stack
from ddnewton.columns.gram import rmatmat
from ddnewton.criteria import cross_entropy, expand_batch
from ddnewton.linearize.linearization import linearized
from ddnewton.linearize.structured import visit
from tests.criteria.test_positions import with_all_zeros
from tests.methods import FLOAT64
from tests.models import normal, of_module
from tests.reference import error, flat

CLASSES = 5


class Causal(nn.Module):
    """A transformer's block over tokens, each of which sees those before it."""

    def __init__(self, tokens, width=6, tied=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(CLASSES, width), nn.Parameter(normal(tokens, width))
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width)
        self.head = nn.Linear(width, CLASSES, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, X):
        x = self.embed(X) + self.place
        q, k, v = (part[:, None] for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.head(x + self.down(self.up(x).tanh())).movedim(-1, 1)


def tokens(n=2, count=7, **options):
    torch.manual_seed(0)
    X, y = torch.randint(CLASSES, (2, n, count))
    return of_module(Causal(count, **options), X, y, None, FLOAT64)


def pixels(n=2):
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))
    y = torch.randint(CLASSES, (n, 4, 3), generator=torch.Generator().manual_seed(0))
    return of_module(net, normal(n, 2, 4, 3), y, None, FLOAT64)


PROBLEMS = {
    "tokens": tokens,
    "one sentence": lambda: tokens(1),
    "tied weights": lambda: tokens(tied=True),
    "pixels": pixels,
    "on the side of the parameters": lambda: pixels(4),
}
OPTIONS = {
    "one number": (0.1, {}),
    "eigenvalues": (lambda evals, *_: 0.1 + evals, {}),
    "some at a time": (0.1, {"chunk_size": 1}),
    "slopes of some": (0.1, {"subsampling_grad": torch.tensor([0])}),
    "directions of some": (
        lambda evals, *_: 0.1 + evals,
        {"subsampling_ggn": torch.tensor([0]), "subsampling_curvature": torch.tensor([1])},
    ),
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(visit, "MOST_PARTS", 4)
    monkeypatch.setattr(visit, "PART_COLUMNS", 1)
    monkeypatch.setattr(factors, "WRITTEN_ENTRIES", 0)


@pytest.mark.parametrize("gram", ["structured", "dense"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_are_those_from_the_whole_basis(name, gram):
    model_fn, params, X, y, _ = PROBLEMS[name]()
    loss = cross_entropy(label_smoothing=0.1)
    steps = [
        newton_step(model_fn, params, X, y, criterion, 0.1, gram=gram)
        for criterion in (loss, with_all_zeros(loss))
    ]
    assert error(*map(flat, steps)) < 1e-12


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_options_find_the_blocks_too(name, option):
    model_fn, params, X, y, _ = PROBLEMS[name]()
    damping, options = OPTIONS[option]
    if len(X) == 1 and option == "directions of some":
        options = {}
    loss = cross_entropy()
    steps = [
        newton_step(model_fn, params, X, y, criterion, damping, gram="structured", **options)
        for criterion in (loss, with_all_zeros(loss))
    ]
    assert error(*map(flat, steps)) < 1e-10


def test_two_terms_and_groups_share_stacks():
    first, second = tokens(), tokens(3)
    loss, dense = cross_entropy(), with_all_zeros(cross_entropy())
    steps = []
    for losses in ((loss, loss), (loss, dense), (dense, dense)):
        terms = [
            dict(zip("ab", parts, strict=True))
            for parts in (
                (first.model_fn, first.model_fn),
                (first.X, second.X),
                (first.y, second.y),
                losses,
            )
        ]
        model_fn, X, y, criterion = terms
        steps.append(newton_step(model_fn, first.params, X, y, criterion, 0.1, gram="structured"))
    assert error(flat(steps[0]), flat(steps[2])) < 1e-12
    assert error(flat(steps[1]), flat(steps[2])) < 1e-12
    names = list(first.params)
    groups = [Group(names[:4]), Group(names[4:])]
    in_groups = [
        newton_step(*first[:4], criterion, 0.1, gram="structured", groups=groups)
        for criterion in (loss, dense)
    ]
    assert error(*map(flat, in_groups)) < 1e-12


@pytest.mark.parametrize("scale", ["jac", 2.0])
def test_units_of_parameters_are_taken_into_stacks(scale):
    model_fn, params, X, y, _ = tokens()
    scale = scale if scale == "jac" else {name: scale + p.abs() for name, p in params.items()}
    steps = [
        newton_step(model_fn, params, X, y, criterion, 0.1, gram="structured", scale=scale)
        for criterion in (cross_entropy(), with_all_zeros(cross_entropy()))
    ]
    assert error(*map(flat, steps)) < 1e-11


def test_an_ensemble_is_its_members():
    model_fn, params, X, y, _ = tokens()
    members = {name: torch.stack([p, 0.9 * p]) for name, p in params.items()}

    def step(params):
        return newton_step(model_fn, params, X, y, cross_entropy(), 0.1, gram="structured")

    together = vmap(step)(members)
    for i in range(2):
        alone = step({name: p[i] for name, p in members.items()})
        assert error(flat({name: s[i] for name, s in together.items()}), flat(alone)) < 1e-12


def test_columns_hold_the_positions_that_they_reach():
    model_fn, params, X, y, _ = tokens(2, 8)
    with linearized(model_fn, params, X, "structured", None) as linearization:
        outputs = linearization.precise
        expansion = expand_batch(cross_entropy(), outputs, outputs, y)
        columns = linearization.jacobian(expansion.basis, None)
        whole = linearization.jacobian(
            expand_batch(with_all_zeros(cross_entropy()), outputs, outputs, y).basis, None
        )
        (stacks,) = map(columns.visit, columns.chunks)
        (dense,) = map(whole.visit, whole.chunks)
    # Four parts of two positions: those up to its own, or its own alone behind the attention.
    reached = [[part.b.shape[4] for part in x.parts] for x in stacks if isinstance(x, Stack)]
    assert [2, 4, 6, 8] in reached
    assert [2, 2, 2, 2] in reached
    stored = sum(part.b.numel() for x in stacks if isinstance(x, Stack) for part in x.parts)
    assert stored < 0.6 * sum(x.b.numel() for x in dense if isinstance(x, Outer))
    vectors = normal(sum(columns.sizes), 3).double()
    block = range(len(columns.sizes))
    assert error(rmatmat([columns], block, vectors), rmatmat([whole], block, vectors)) < 1e-13


def test_eigenvalues_are_those_of_the_whole_basis():
    *problem, _ = tokens()
    spectra = [
        ggn_eigvalsh(*problem, criterion, gram="structured")
        for criterion in (cross_entropy(), with_all_zeros(cross_entropy()))
    ]
    assert error(*spectra) < 1e-12


def test_batches_are_the_whole_set():
    model_fn, params, X, y, _ = pixels(4)
    batches = Batches([(X[:3], y[:3]), (X[3:], y[3:])])
    loss = cross_entropy()
    whole = newton_step(model_fn, params, X, y, loss, 0.1, gram="structured")
    in_parts = newton_step(model_fn, params, batches, None, loss, 0.1, gram="structured")
    assert error(flat(in_parts), flat(whole)) < 1e-12
