"""Products with the Hessians of losses are those of their expansions, and need no basis."""

import copy
from decimal import Decimal, getcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from ddnewton import clipped, empirical_fisher, fisher, majorized, monte_carlo, weighted
from ddnewton import with_curvature as curved
from ddnewton.criteria import (
    as_loss,
    expand_batch,
    hessian_products,
    heteroscedastic_nll,
    slopes_of,
)
from ddnewton.criteria.batch_root import root_of_batch
from ddnewton.criteria.eigenvectors import hessians_of
from ddnewton.criteria.expand import NotConvex
from ddnewton.criteria.likelihoods import poisson_nll
from ddnewton.criteria.noise import of_likelihood
from ddnewton.errors import NotFinite
from tests.criteria.test_monte_carlo import LIKELIHOODS, WEIGHT, outputs_for
from tests.criteria.test_transformers import focal
from tests.methods import CLASSES as FIVE_CLASSES
from tests.methods import (
    CURVATURES,
    FLOAT64,
    OF_RESIDUALS,
    REALS,
    TORCH_LOSSES,
    UNIT_INTERVAL,
    seeded,
)

LOGITS = torch.linspace(-2, 2, 15, dtype=FLOAT64).reshape(5, 3).mul(7).sin()
PAIRS = torch.linspace(-1, 1, 20, dtype=FLOAT64).reshape(5, 2, 2).mul(9).cos()
PAIR_TARGETS = torch.linspace(-1, 1, 10, dtype=FLOAT64).reshape(5, 2)
SHARES = UNIT_INTERVAL.double()
PIXELS = torch.linspace(-2, 2, 60, dtype=FLOAT64).reshape(5, 3, 2, 2).mul(7).sin()
PIXEL_CLASSES = torch.tensor([0, 1, 2, 2, 1] * 4).reshape(5, 2, 2)

CE, MSE, BCE, HUBER = (
    nn.CrossEntropyLoss(weight=WEIGHT), nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.HuberLoss()
)  # fmt: skip


def drawn(criterion, samples=2, per="position"):
    return monte_carlo(criterion, samples, seeded(), per=per)


def log_cosh(f, y):
    return torch.cosh(f - y).log().mean()


def cross_entropy(f, y):
    """A function, whose closed form is not looked up."""
    return F.cross_entropy(f, y)


def valid(f, y):
    """Its mean is over what is valid, so that samples have no losses of their own."""
    mask = y > 0.2
    return (
        torch.where(mask, torch.cosh(f - y).log() + (f[:, :1] - f).square(), 0).sum() / mask.sum()
    )


# Each case: a criterion, outputs and targets.
CASES = {
    f"{curvature}, {name}, {reduction}": (
        CURVATURES[curvature].make(loss.module(reduction=reduction), 0), LOGITS, loss.y
    )
    for curvature in CURVATURES
    for name, loss in TORCH_LOSSES.items()
    for reduction in ("mean", "sum")
    if loss.draws or curvature not in {"fisher", "monte_carlo"}
    if not (curvature == "convex" and isinstance(loss.y, tuple))
    if loss.module is not nn.GaussianNLLLoss or curvature != "convex"
} | {
    f"majorized, {name}": (OF_RESIDUALS["majorized"].make(loss.module(), 0), LOGITS, loss.y)
    for name, loss in TORCH_LOSSES.items()
    if name in {"mse", "huber", "smooth_l1"}
} | {
    f"{per}, {name}": (drawn(criterion, 3, per), outputs_for(name), y)
    for name, (criterion, y, _, _) in LIKELIHOODS.items()
    for per in ("position", "sequence")
} | {
    f"exact, {name}": (criterion, outputs_for(name), y)
    for name, (criterion, y, _, _) in LIKELIHOODS.items()
} | {
    "rates": (poisson_nll(log_input=False), LOGITS + 2, (4 * UNIT_INTERVAL).round()),
    "fisher of rates": (fisher(poisson_nll(log_input=False)), LOGITS + 2, (4 * REALS**2).round()),
    "pairs": (clipped(heteroscedastic_nll()), PAIRS, PAIR_TARGETS),
    "fisher of pairs": (fisher(weighted(heteroscedastic_nll(), 3.0)), PAIRS, PAIR_TARGETS),
    "draws of pairs": (drawn(heteroscedastic_nll(), 2, "sequence"), PAIRS, PAIR_TARGETS),
    "nll": (nn.NLLLoss(WEIGHT), LOGITS.log_softmax(1), FIVE_CLASSES),
    "fisher of nll": (
        weighted(fisher(nn.NLLLoss(WEIGHT)), 0.5), PIXELS.log_softmax(1), PIXEL_CLASSES
    ),
    "fisher of bce": (fisher(weighted(nn.BCELoss(), 2.0)), LOGITS.sigmoid(), SHARES),
    "noise of bce": (of_likelihood(nn.BCELoss()), LOGITS.sigmoid(), SHARES),
    "fisher of a function": (
        fisher(lambda f, y: F.gaussian_nll_loss(f[:, :1], y, F.softplus(f[:, 1:]))),
        PAIRS[:, 0], PAIR_TARGETS[:, :1],
    ),
    "pixels": (CE, PIXELS, PIXEL_CLASSES),
    "joint": (valid, LOGITS, REALS.double()),
    "joint, weighted": (weighted(valid, 2.0), LOGITS, REALS.double()),
    "empirical of joint": (empirical_fisher(valid), LOGITS, REALS.double()),
    "joint with another's": (curved(valid, HUBER), LOGITS, REALS.double()),
    "another with joint's": (curved(HUBER, valid), LOGITS, REALS.double()),
    "weights of weights": (weighted(weighted(CE, 2.0), 5.0), PIXELS, PIXEL_CLASSES),
    "weighted draws": (weighted(drawn(CE, 2), 3.0), PIXELS, PIXEL_CLASSES),
    "weighted draws of sequences": (weighted(drawn(CE, 2, "sequence"), 3.0), PIXELS, PIXEL_CLASSES),
    "draws of a weighted loss": (drawn(weighted(CE, 3.0), 1, "sequence"), PIXELS, PIXEL_CLASSES),
    "another's draws": (
        curved(nn.CrossEntropyLoss(), drawn(CE, 2, "sequence")), PIXELS, PIXEL_CLASSES
    ),
    "a sum with a mean's": (
        curved(nn.CrossEntropyLoss(reduction="sum"), CE), PIXELS, PIXEL_CLASSES
    ),
    "weighted, another's, clipped": (
        weighted(curved(nn.CrossEntropyLoss(), clipped(CE)), 2.0), PIXELS, PIXEL_CLASSES
    ),
    "fisher of another's": (fisher(curved(CE, weighted(CE, 2.0))), PIXELS, PIXEL_CLASSES),
    "empirical of weighted": (empirical_fisher(weighted(BCE, 2.0)), LOGITS, UNIT_INTERVAL),
    "majorized, weighted": (weighted(majorized(weighted(HUBER, 2.0)), 3.0), LOGITS, REALS),
    "clipped majorized": (clipped(majorized(HUBER)), LOGITS, REALS),
    "clipped focal": (clipped(focal), LOGITS, FIVE_CLASSES),
    "saturated": (CE, 40 * PIXELS, PIXEL_CLASSES),
    "saturated draws": (drawn(CE, 7), 40 * PIXELS, PIXEL_CLASSES),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CASES)


def matrix_of(function, n, columns):
    """The matrices of a linear map of every sample, by unit vectors."""
    units = torch.eye(columns, dtype=FLOAT64)
    return torch.stack([function(unit.expand(n, -1)) for unit in units], 2)


def assert_close(found, expected, tolerance=1e-12):
    """Relative to the largest entry of every sample."""
    size = expected.abs().reshape(len(expected), -1).amax(1).clamp(min=1e-150)
    distance = (found - expected).abs().reshape(len(expected), -1).amax(1)
    assert found.shape == expected.shape
    assert (distance <= tolerance * size).all()


@EVERY
def test_products_are_those_of_the_expansion(name):
    criterion, f, y = CASES[name]
    loss = as_loss(criterion)
    root, expansion = root_of_batch(loss, f, f, y), expand_batch(loss, f, f, y)
    n, c = len(f), f[0].numel()
    H = hessians_of(expansion)
    assert_close(root.value, expansion.value)
    assert_close(root.gradient, slopes_of(expansion))
    assert root.spans == (expansion.R.shape[2] == 0)
    assert all(part.dtype == FLOAT64 for part in (root.value, root.gradient))
    S = matrix_of(root.times, n, root.columns)
    assert root.columns <= (c if loss.columns is None else loss.columns(f))
    assert_close(S @ S.mT, H)
    assert_close(matrix_of(root.transposed, n, c), S.mT)
    assert_close(matrix_of(root.product, n, c), H)
    # And of several vectors at once.
    units = torch.eye(c, dtype=FLOAT64)[:, None].expand(c, n, c)
    assert_close(vmap(root.product)(units).movedim(0, 2), H)


@EVERY
def test_a_root_of_some_samples_has_their_rows(name):
    criterion, f, y = CASES[name]
    root = root_of_batch(as_loss(criterion), f, f, y)
    n, c = len(f), f[0].numel()
    S = matrix_of(root.times, n, root.columns)
    for rows in (slice(1, 3), torch.tensor([3, 0]), slice(2, 2)):
        part = root.at(rows)
        assert torch.equal(part.value, root.value[rows])
        assert torch.equal(part.gradient, root.gradient[rows])
        assert (part.columns, part.spans) == (root.columns, root.spans)
        if len(part.value):
            assert_close(matrix_of(part.times, len(part.value), root.columns), S[rows], 1e-14)
    again = root.at(torch.tensor([4 % n, 1, 2])).at(slice(1, None))
    assert_close(matrix_of(again.product, 2, c), (S @ S.mT)[1:3])


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"fisher of a function"}))
def test_members_of_an_ensemble_have_their_products(name):
    """Of all but what vmap cannot expand either."""
    criterion, f, y = CASES[name]
    members = torch.stack([f, f.roll(1, 0)])
    v = torch.linspace(-1, 1, f.numel(), dtype=FLOAT64).reshape(len(f), -1)

    def product(outputs):
        # A copy of the criterion has a generator in the same state.
        return root_of_batch(as_loss(copy.deepcopy(criterion)), outputs, outputs, y).product(v)

    for found, member in zip(vmap(product)(members), members, strict=True):
        assert_close(found, product(member), 1e-10)


# --- products of a criterion's gradient, where Hessians are too large ----------------------------

PRODUCTS = {
    "mean": (log_cosh, LOGITS, REALS.double()),
    "sum": (lambda f, y: torch.cosh(f - y).log().sum(), LOGITS, REALS.double()),
    "joint": (valid, LOGITS, REALS.double()),
    "weighted": (weighted(log_cosh, 3.0), LOGITS, REALS.double()),
    "weighted joint": (weighted(valid, 3.0), LOGITS, REALS.double()),
    "another's": (curved(HUBER, valid), LOGITS, REALS.double()),
    "of another": (curved(valid, log_cosh), LOGITS, REALS.double()),
    "tokens": (lambda f, y: F.cross_entropy(f, y, ignore_index=1), PIXELS, PIXEL_CLASSES),
    "fits of pairs": (heteroscedastic_nll(), PAIRS, PAIRS[..., 0]),
    "one sample": (log_cosh, LOGITS[:1], REALS[:1].double()),
    "probabilities": (nn.BCELoss(), LOGITS.sigmoid(), UNIT_INTERVAL.double()),
    "float32 alone": (
        lambda f, y: torch.cosh(f.to(torch.float32) - y).log().mean(), LOGITS.float(), REALS
    ),
}  # fmt: skip


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(hessian_products, "DENSE_ENTRIES", 0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_a_large_criterion_are_those_of_its_expansion(name):
    criterion, f, y = PRODUCTS[name]
    tolerance = 1e-5 if f.dtype == torch.float32 else 1e-12
    loss = as_loss(criterion)
    root, expansion = root_of_batch(loss, f, f, y), expand_batch(loss, f, f, y)
    n, c = len(f), f[0].numel()
    H = hessians_of(expansion)
    assert root.times is None
    assert root.transposed is None
    assert (root.columns, root.spans) == (c, expansion.R.shape[2] == 0)
    assert_close(root.value, expansion.value, tolerance)
    assert_close(root.gradient, slopes_of(expansion), tolerance)
    assert_close(matrix_of(root.product, n, c), H, tolerance)
    for rows in (slice(n // 2, n), torch.arange(n).flip(0)[:2]):
        part = root.at(rows)
        assert_close(matrix_of(part.product, len(part.value), c), H[rows], tolerance)
        assert_close(part.gradient, root.gradient[rows], tolerance)
    assert_close(matrix_of(root.at(slice(0, 3)).at(slice(0, 1)).product, 1, c), H[:1], tolerance)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["mean", "joint", "weighted joint", "tokens"])
def test_products_of_a_large_criterion_map_over_vectors_and_members(name):
    criterion, f, y = PRODUCTS[name]
    members = torch.stack([f, f.roll(1, 0)])
    vectors = torch.linspace(-1, 1, 2 * f.numel(), dtype=FLOAT64).reshape(2, len(f), -1)

    def products(outputs):
        return root_of_batch(as_loss(criterion), outputs, outputs, y).product(vectors[0])

    expected = torch.stack([products(member) for member in members])
    assert_close(vmap(products)(members), expected)
    root = root_of_batch(as_loss(criterion), f, f, y)
    together = vmap(root.at(slice(0, 3)).product)(vectors[:, :3])
    assert_close(together, torch.stack([root.product(v)[:3] for v in vectors]))


@pytest.mark.usefixtures("large")
def test_negative_curvature_along_a_vector_is_refused():
    f, y = 4 * LOGITS, FIVE_CLASSES
    expansion = as_loss(focal).expand(f, y)
    n, m = divmod(int(expansion.h.argmin()), 3)
    assert expansion.h[n, m] < -0.01
    v = torch.zeros_like(f)
    v[n] = expansion.basis[n, :, m]
    root = root_of_batch(as_loss(focal), f, f, y)
    for part, vectors in ((root, v), (root.at(slice(n, n + 1)), v[n : n + 1])):
        with pytest.raises(NotConvex, match=r"a curvature of -.* along a vector.*clipped"):
            part.product(vectors)
    robust = as_loss(lambda f, y: torch.log1p((f - y) ** 2).sum())
    with pytest.raises(NotConvex, match="majorized"):
        root_of_batch(robust, f, f, torch.zeros_like(f)).product(torch.ones_like(f))


@pytest.mark.usefixtures("large")
def test_flat_directions_and_certain_nets_are_no_negative_curvature():
    """Their products are rounding, of either sign."""
    for scale in (1.0, 30.0, 300.0):
        f = scale * LOGITS
        root = root_of_batch(as_loss(cross_entropy), f, f, f.argmax(1))
        for v in (torch.ones_like(f), torch.linspace(-1, 1, 15, dtype=FLOAT64).reshape(5, 3)):
            assert root.product(v).isfinite().all()


@pytest.mark.usefixtures("large")
def test_clipped_curvature_of_a_large_criterion_is_from_its_expansion():
    loss = as_loss(clipped(focal))
    assert loss.root(LOGITS, FIVE_CLASSES) is None
    root = root_of_batch(loss, LOGITS, LOGITS, FIVE_CLASSES)
    H = hessians_of(expand_batch(loss, LOGITS, LOGITS, FIVE_CLASSES))
    assert_close(matrix_of(root.product, 5, 3), H)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "criterion",
    [
        lambda f, y: (f - y).square().sum().sqrt(),
        lambda f, y: f.mean(0).square().sum(),
        lambda f, y: f.square().sum() + f[0, 0] * f[-1, 0],
    ],
)
def test_samples_that_interact_are_refused(criterion):
    with pytest.raises(ValueError, match="a criterion in which samples interact"):
        root_of_batch(as_loss(criterion), LOGITS, LOGITS, REALS.double())


def test_what_does_not_fit_or_is_not_finite_is_refused():
    infinite = LOGITS.clone()
    infinite[1, 2] = torch.inf
    for loss, y in ((MSE, REALS), (CE, FIVE_CLASSES)):
        with pytest.raises(NotFinite, match="nan or inf in the loss or its derivatives"):
            root_of_batch(as_loss(loss), infinite, infinite, y)
    with pytest.raises(ValueError, match="y"):
        root_of_batch(as_loss(CE), LOGITS, LOGITS, FIVE_CLASSES[:3])
    overflowing = torch.full((1, 1), 800.0, dtype=FLOAT64)
    with pytest.raises(NotFinite):
        root_of_batch(as_loss(nn.PoissonNLLLoss()), overflowing, overflowing, torch.ones(1, 1))
    with pytest.raises(NotConvex):
        root_of_batch(as_loss(focal), 4 * LOGITS, 4 * LOGITS, FIVE_CLASSES)


def test_a_root_is_not_used_where_the_expansion_was_replaced_by_hand():
    loss = as_loss(CE)
    given = LOGITS, LOGITS, FIVE_CLASSES
    changed = loss._replace(expand=lambda f, y: loss.expand(2 * f, y))
    for criterion in (changed, weighted(changed, 2.0), curved(changed, changed), clipped(changed)):
        root = root_of_batch(as_loss(criterion), *given)
        expected = hessians_of(expand_batch(as_loss(criterion), *given))
        assert_close(matrix_of(root.product, 5, 3), expected)
        assert_close(root.value, expand_batch(as_loss(criterion), *given).value)
    changed = loss._replace(scores=lambda *drawn: 2 * loss.scores(*drawn))
    for per in ("position", "sequence"):
        doubled = as_loss(monte_carlo(changed, 2, seeded(), per=per))
        root = root_of_batch(doubled, *given)
        assert_close(matrix_of(root.product, 5, 3), hessians_of(expand_batch(doubled, *given)))
    assert as_loss(loss) is loss


# --- digits ------------------------------------------------------------------------------------


def softmax_product(logits, v):
    """(diag(p) − ppᵀ) v to fifty digits, and the largest entry of the matrix."""
    getcontext().prec = 50
    exponentials = [Decimal(x).exp() for x in logits.tolist()]
    p = [x / sum(exponentials) for x in exponentials]
    entries = [Decimal(x) for x in v.tolist()]
    # p_i Σ_j p_j (v_i − v_j), whose terms are differences of given numbers.
    pairs = list(zip(p, entries, strict=True))
    product = [a * sum(b * (x - y) for b, y in pairs) for a, x in pairs]
    largest = max(a * sum(b for j, b in enumerate(p) if j != i) for i, a in enumerate(p))
    return product, largest


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_softmax_keeps_its_digits(scale, seed):
    """Relative to ‖H‖ ‖v‖, to the rounding that the exponentials of such logits have."""
    f = scale * torch.randn(1, 9, dtype=FLOAT64, generator=seeded(seed))
    v = torch.randn(1, 9, dtype=FLOAT64, generator=seeded(seed + 100))
    found = root_of_batch(as_loss(nn.CrossEntropyLoss()), f, f, torch.tensor([0])).product(v)[0]
    expected, size = softmax_product(f[0], v[0])
    distance = max(abs(Decimal(x) - y) for x, y in zip(found.tolist(), expected, strict=True))
    assert distance <= Decimal("1e-14") * size * Decimal(v.norm().item())


@pytest.mark.parametrize("gap", [-300.0, -40.0, -3.0, 0.0, 40.0, 300.0])
def test_a_certain_net_of_two_classes_loses_no_digit(gap):
    f, v = torch.tensor([[0.0, gap]], dtype=FLOAT64), torch.tensor([[0.3, -0.7]], dtype=FLOAT64)
    found = root_of_batch(as_loss(nn.CrossEntropyLoss()), f, f, torch.tensor([0])).product(v)[0]
    expected, _ = softmax_product(f[0], v[0])
    for x, y in zip(found.tolist(), expected, strict=True):
        assert abs(Decimal(x) - y) <= Decimal("1e-15") * abs(y)


def test_draws_of_a_certain_net_lose_no_digit():
    """Drawn every time, a class has a score of the other's probability."""
    f, y = torch.tensor([[0.0, 60.0]], dtype=FLOAT64), torch.tensor([1])
    loss = as_loss(drawn(nn.CrossEntropyLoss(), 3))
    root, expansion = root_of_batch(loss, f, f, y), expand_batch(loss, f, f, y)
    expected = hessians_of(expansion)
    assert 0 < expected.max() < 1e-50
    torch.testing.assert_close(matrix_of(root.product, 1, 2), expected, rtol=1e-14, atol=0)


# --- vocabularies: a basis of these losses would have terabytes ---------------------------------

VOCABULARY, TOKENS = 50_000, 8

VOCABULARIES = {
    "exact": lambda ce: ce,
    "weighted": lambda ce: weighted(ce, 2.0),
    "empirical": empirical_fisher,
    "another's": lambda ce: curved(ce, ce),
    "fisher": fisher,
    "clipped": clipped,
    "position": lambda ce: drawn(ce, 2),
    "sequence": lambda ce: drawn(ce, 2, "sequence"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_is_no_matter(name):
    f = torch.randn(2, VOCABULARY, TOKENS, generator=seeded())
    y = torch.randint(0, VOCABULARY, (2, TOKENS), generator=seeded())
    root = root_of_batch(as_loss(VOCABULARIES[name](nn.CrossEntropyLoss())), f, f, y)
    v = torch.randn(2, VOCABULARY * TOKENS, dtype=FLOAT64, generator=seeded())
    u = torch.randn(2, root.columns, dtype=FLOAT64, generator=seeded())
    # ⟨u, Sᵀv⟩ = ⟨Su, v⟩, and of a chunk as well.
    left, right = (u * root.transposed(v)).sum(1), (root.times(u) * v).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(root.at(slice(1, 2)).product(v[1:]), root.product(v)[1:])
    # The mean over 16 tokens of two samples: every token has a share of 2 / 16.
    if name in {"exact", "weighted", "another's", "fisher", "clipped"}:
        p, x = f.double().softmax(1), v.reshape(f.shape)
        expected = p * (x - (p * x).sum(1, keepdim=True)) / TOKENS
        expected = (2.0 if name == "weighted" else 1.0) * expected.flatten(1)
        assert (root.product(v) - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_a_function_with_many_outputs_is_no_matter():
    def log_sum(f, y):
        return (f.logsumexp(1) - f[:, 0]).mean()

    f = torch.randn(2, 20_000, dtype=FLOAT64, generator=seeded())
    v = torch.randn(2, 20_000, dtype=FLOAT64, generator=seeded(1))
    root = root_of_batch(as_loss(log_sum), f, f, torch.zeros(2))
    assert root.times is None
    p = f.softmax(1)
    expected = p * (v - (p * v).sum(1, keepdim=True))
    assert (root.product(v) - expected).abs().max() <= 1e-12 * expected.abs().max()
