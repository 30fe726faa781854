"""A data set in batches is one batch: the same steps, records and refusals, a batch at a time."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, TensorDataset

from ddnewton import (
    Batches,
    Group,
    above,
    as_function,
    clipped,
    covariance,
    directional_derivatives,
    directional_newton,
    empirical_fisher,
    fit,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    held_out,
    majorized,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    per_layer,
    prepare,
    top_k,
    weighted,
    with_curvature,
)
from ddnewton.damping import constant, relative, signal_to_noise
from tests.models import problem
from tests.reference import error

FLOAT64 = torch.float64
N, SIZE = 43, 12  # uneven: the last batch is smaller


def net(inputs: int = 3, outputs: int = 3, dtype: torch.dtype = FLOAT64):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))
    return as_function(module.to(dtype))


def data(dtype: torch.dtype = FLOAT64):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N, 3, generator=generator, dtype=FLOAT64).to(dtype)
    return X, torch.randint(0, 3, (N,), generator=generator)


def cut(X, y, size: int = SIZE) -> list:
    slices = [slice(start, start + size) for start in range(0, N, size)]
    return [(X[part], y[part]) for part in slices]


def both(criterion, function=newton_step, *arguments, y=None, **options):
    """What a function returns for a data set in batches, and for the same in one batch."""
    X, labels = data()
    y = labels if y is None else y
    given = net()
    in_batches = function(*given, Batches(cut(X, y)), None, criterion, *arguments, **options)
    return in_batches, function(*given, X, y, criterion, *arguments, **options)


def residuals():
    return torch.randn(N, 3, generator=torch.Generator().manual_seed(2), dtype=FLOAT64)


def ignoring():
    """Labels of which a whole batch is ignored, and some of every other."""
    _, y = data()
    y = y.clone()
    y[12:24], y[::5] = -100, -100
    return y


def mean_of_logits(f, y):
    """A function that the library does not know."""
    return -f.log_softmax(1).gather(1, y[:, None]).mean()


WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=FLOAT64)
LABELLED = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHT),
    "smoothed": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
    "function": F.cross_entropy,
    "callable mean": mean_of_logits,
    "callable sum": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    "twice": weighted(nn.CrossEntropyLoss(weight=WEIGHT), 2.0),
    "empirical": empirical_fisher(nn.CrossEntropyLoss()),
    "other curvature": with_curvature(nn.CrossEntropyLoss(), nn.CrossEntropyLoss()),
}
MEASURED = {
    "mean": nn.MSELoss(),
    "sum": nn.MSELoss(reduction="sum"),
    "callable": lambda f, y: (f - y).pow(4).mean(),
    "clipped": clipped(lambda f, y: torch.log1p((f - y).square()).sum()),
    "robust": majorized(nn.HuberLoss(delta=0.5)),
}
OPTIONS = {
    "a number": {"damping": 0.1},
    "a rule": {"damping": signal_to_noise()},
    "leading": {"damping": relative(0.1), "select": top_k(4)},
    "complement": {"damping": 0.1, "select": above(0.1), "complement": 0.3},
    "everywhere": {"damping": 0.1, "complement": 0.1},
    "groups": {"damping": 0.1, "groups": [Group("0"), Group("2", top_k(3), constant(0.2))]},
    "scale": {"damping": 0.1, "scale": 2.0},
    "columns' sizes": {"damping": 0.1, "scale": "jac"},
    "structured": {"damping": 0.1, "gram": "structured"},
    "dense": {"damping": 0.1, "gram": "dense", "select": top_k(4)},
    "chunks": {"damping": signal_to_noise(), "chunk_size": 5},
    "free": {"damping": 0.1, "complement": 0.1, "gram": "free", "tol": 1e-14},
    "free, leading": {"damping": relative(0.1), "select": top_k(4), "gram": "free", "tol": 1e-9},
}


# --- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LABELLED)
def test_a_step_is_that_of_one_batch_of_labels(name):
    in_batches, at_once = both(LABELLED[name], newton_step, 0.1)
    assert error(in_batches, at_once) < 1e-10


@pytest.mark.parametrize("name", MEASURED)
def test_a_step_is_that_of_one_batch_of_targets(name):
    in_batches, at_once = both(MEASURED[name], newton_step, 0.1, y=residuals())
    assert error(in_batches, at_once) < 1e-10


@pytest.mark.parametrize("gram", ["auto", "free"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_a_batch_may_be_ignored(weight, gram):
    criterion = nn.CrossEntropyLoss(weight=weight)
    options = {"gram": gram, "complement": 0.1, "tol": 1e-14}
    (in_batches, info), (at_once, _) = both(
        criterion, newton_step_and_info, 0.1, y=ignoring(), **options
    )
    assert error(in_batches, at_once) < (1e-7 if gram == "free" else 1e-10)
    f, p = net()
    expected = criterion(f(p, data()[0]), ignoring())
    torch.testing.assert_close(info.loss, expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name):
    options = dict(OPTIONS[name])
    damping = options.pop("damping")
    in_batches, at_once = both(nn.CrossEntropyLoss(weight=WEIGHT), newton_step, damping, **options)
    assert error(in_batches, at_once) < (1e-7 if options.get("gram") == "free" else 1e-10)


@pytest.mark.parametrize("name", ["a number", "leading", "columns' sizes", "free, leading"])
def test_the_record_is_that_of_one_batch(name):
    options = dict(OPTIONS[name])
    criterion = nn.CrossEntropyLoss(weight=WEIGHT)
    damping = options.pop("damping")
    (_, of_batches), (_, of_one) = both(criterion, newton_step_and_info, damping, **options)
    for field in ("loss", "losses", "evals", "dampings", "rank", "gradient_norm", "gradient_share"):
        torch.testing.assert_close(
            getattr(of_batches, field), getattr(of_one, field), rtol=1e-9, atol=1e-12
        )
    for field in ("gammas", "lambdas", "coefficients"):  # up to the sign, of known directions
        left, right = (getattr(info, field)[..., -3:].abs() for info in (of_batches, of_one))
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("gram", ["auto", "free"])
def test_the_curvature_is_that_of_one_batch(gram):
    criterion = nn.CrossEntropyLoss(weight=WEIGHT)
    options = {"select": top_k(3), "gram": gram, "tol": 1e-9}
    (evals, evecs), (expected, directions) = both(criterion, ggn_eigh, **options)
    torch.testing.assert_close(evals, expected, rtol=1e-9, atol=0)
    left, right = (tree_map(torch.abs, vectors) for vectors in (evecs, directions))
    assert error(left, right) < 1e-7
    of_batches, of_one = both(criterion, directional_derivatives, **options)
    for left, right in zip(of_batches, of_one, strict=True):
        torch.testing.assert_close(left.abs(), right.abs(), rtol=1e-6, atol=1e-8)
    if gram == "auto":
        evals, expected = both(criterion, ggn_eigvalsh)
        torch.testing.assert_close(evals, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["relu_mlp", "convolution", "attention", "lstm", "tanh_mlp"])
@pytest.mark.parametrize("damping", [0.1, signal_to_noise()], ids=["number", "rule"])
def test_fewer_samples_than_parameters(name, damping):
    """On the side of the parameters nevertheless."""
    given = problem(name, FLOAT64)
    n = len(tree_leaves(given.X)[0])
    parts = [slice(0, 1), slice(1, n)]
    loader = [(tree_map(lambda x, s=s: x[s], given.X), given.y[s]) for s in parts]
    in_batches = given._replace(X=Batches(loader), y=None)
    result, info = newton_step_and_info(*in_batches, damping)
    expected, of_one = newton_step_and_info(*given, damping)
    assert error(result, expected) < 1e-10
    assert info.rank == of_one.rank
    torch.testing.assert_close(info.loss, of_one.loss)
    torch.testing.assert_close(
        ggn_eigvalsh(*in_batches), ggn_eigvalsh(*given), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("gram", ["auto", "free"])
def test_a_prepared_model(gram):
    X, y = data()
    f, p = net()
    prepared = prepare(f, p, X)
    options = {"gram": gram, "tol": 1e-14}
    loader = DataLoader(TensorDataset(X, y), batch_size=SIZE)
    result = newton_step(prepared, p, Batches(loader), None, nn.CrossEntropyLoss(), 0.1, **options)
    expected = newton_step(f, p, X, y, nn.CrossEntropyLoss(), 0.1)
    assert error(result, expected) < (1e-6 if gram == "free" else 1e-10)


@pytest.mark.parametrize("options", [{}, {"gram": "free", "tol": 1e-14}], ids=["sums", "free"])
def test_samples_of_other_lengths_in_every_batch(options):
    """Padded to the longest of their batch, as a collate function does."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 7, (9, 6), generator=generator)
    tokens[:4, 3:], y = 0, torch.randint(0, 2, (9,), generator=generator)
    params = {
        "rows": torch.randn(7, 3, generator=generator, dtype=FLOAT64),
        "out": torch.randn(3, 2, generator=generator, dtype=FLOAT64),
    }

    def bag(p, x):
        return torch.tanh(((x > 0)[..., None] * p["rows"][x]).sum(1)) @ p["out"]

    loader = [(tokens[:4, :3], y[:4]), (tokens[4:], y[4:])]
    criterion = nn.CrossEntropyLoss()
    result = newton_step(bag, params, Batches(loader), None, criterion, 0.1, **options)
    assert error(result, newton_step(bag, params, tokens, y, criterion, 0.1)) < 1e-6


def test_float32_is_summed_in_float64_where_a_damping_asks_for_it(monkeypatch):
    monkeypatch.setattr("ddnewton.linearize.precision.CHEAP_FLOPS", 0.0)
    f, p = net(dtype=torch.float32)
    X, y = data(torch.float32)
    arguments = nn.CrossEntropyLoss(), 1e-8
    result = newton_step(f, p, Batches(cut(X, y)), None, *arguments, gram="structured")
    wide_f, wide_p = as_function(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    )
    wide_p = {name: p[name].double() for name in wide_p}
    expected = newton_step(wide_f, wide_p, X.double(), y, *arguments)
    assert error(tree_map(torch.Tensor.double, result), expected) < 1e-4


@pytest.mark.parametrize("name", ["mean", "callable mean", "callable sum"])
def test_batches_of_one_sample(name):
    X, y = data()
    f, p = net()
    result = newton_step(f, p, Batches(cut(X, y, 1)), None, LABELLED[name], 0.1)
    assert error(result, newton_step(f, p, X, y, LABELLED[name], 0.1)) < 1e-10


# --- terms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gram": "free", "tol": 1e-14}], ids=["sums", "free"])
def test_terms_may_be_in_batches_each_its_own(options):
    X, _ = data()
    f, p = net()
    terms = {"inside": f, "edge": lambda p, x: f(p, x)[:, :1]}
    criteria = {"inside": nn.MSELoss(), "edge": weighted(nn.MSELoss(reduction="sum"), 0.1)}
    X_of, y_of = {"inside": X, "edge": X[:8]}, {"inside": residuals(), "edge": residuals()[:8, :1]}
    in_batches = {
        "inside": Batches(cut(X, residuals())),
        "edge": Batches([(X[:3], residuals()[:3, :1]), (X[3:8], residuals()[3:8, :1])]),
    }
    mixed, targets = {**in_batches, "edge": X[:8]}, {"inside": None, "edge": y_of["edge"]}
    expected, of_one = newton_step_and_info(terms, p, X_of, y_of, criteria, 0.1)
    for some, y in ((in_batches, None), (mixed, targets)):
        result, info = newton_step_and_info(terms, p, some, y, criteria, 0.1, **options)
        assert error(result, expected) < (1e-6 if options else 1e-10)
        torch.testing.assert_close(info.losses, of_one.losses)
        torch.testing.assert_close(info.loss, of_one.loss)


# --- drawn curvature -------------------------------------------------------------------------


def drawn(seed: int, samples: int = 1):
    return monte_carlo(nn.CrossEntropyLoss(), samples, torch.Generator().manual_seed(seed))


def test_drawn_curvature_is_the_same_in_every_pass():
    X, y = data()
    f, p = net()
    for options in ({"damping": 0.1}, {"damping": signal_to_noise()}):
        first, again = (
            newton_step_and_info(f, p, Batches(cut(X, y)), None, drawn(4), **options)
            for _ in range(2)
        )
        assert error(first[0], again[0]) == 0
    # λ of the second pass are those that the matrix of the first was made of.
    info = newton_step_and_info(f, p, Batches(cut(X, y)), None, drawn(4), 0.1)[1]
    kept = info.evals > 1e-6
    torch.testing.assert_close(info.lambdas.mean(0)[kept], info.evals[kept], rtol=1e-8, atol=0)


def test_every_batch_draws_its_own():
    X, y = data()
    f, p = net()
    same = [(X[:5], y[:5])] * 6
    evals = ggn_eigvalsh(f, p, Batches(same), None, drawn(0))
    alone = ggn_eigvalsh(f, p, X[:5], y[:5], drawn(0))
    assert (evals > 1e-9).sum() > (alone > 1e-9).sum()


def test_drawn_curvature_has_the_exact_one_as_its_mean():
    X, y = data()
    f, p = net()
    traces = [
        ggn_eigvalsh(f, p, Batches(cut(X, y)), None, drawn(seed, 4)).sum() for seed in range(60)
    ]
    traces, exact = torch.stack(traces), ggn_eigvalsh(f, p, X, y, nn.CrossEntropyLoss()).sum()
    assert (traces.mean() - exact).abs() < 4 * traces.std() / len(traces) ** 0.5


# --- loaders ---------------------------------------------------------------------------------


def step(loader, damping=0.1, **options):
    f, p = net()
    return newton_step(f, p, Batches(loader), None, nn.CrossEntropyLoss(), damping, **options)


def test_loaders_of_torch():
    X, y = data()
    loader = DataLoader(TensorDataset(X, y), batch_size=SIZE)
    assert error(step(loader, signal_to_noise()), step(cut(X, y), signal_to_noise())) == 0
    shuffled = DataLoader(TensorDataset(X, y), batch_size=SIZE, shuffle=True)
    assert error(step(shuffled), step(cut(X, y))) < 1e-10  # of one pass, in whatever order


def test_workers_of_a_loader():
    X, y = data()
    loader = DataLoader(
        TensorDataset(X, y), batch_size=SIZE, num_workers=1, multiprocessing_context="fork"
    )
    assert error(step(loader, signal_to_noise()), step(cut(X, y), signal_to_noise())) == 0


TWO_PASSES = pytest.mark.parametrize(
    "options",
    [{"damping": signal_to_noise()}, {"gram": "free"}, {"damping": 0.0, "select": top_k(2)}],
    ids=["rule", "free", "leading"],
)


@TWO_PASSES
def test_a_shuffled_loader_is_refused(options):
    loader = DataLoader(TensorDataset(*data()), batch_size=SIZE, shuffle=True)
    with pytest.raises(ValueError, match=r"same batches every time; got another batch 0.*shuffle"):
        step(loader, **options)


class Cheat:
    """A loader whose passes differ."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


@TWO_PASSES
def test_a_loader_that_changes_is_refused(options):
    batches = cut(*data())
    X, y = batches[1]
    with pytest.raises(ValueError, match="got more than 4 batches in a later pass"):
        step(Cheat(batches, [*batches, batches[0]]), **options)
    with pytest.raises(ValueError, match="got 3 batches where there were 4 in a later pass"):
        step(Cheat(batches, batches[:3]), **options)
    changed = [(X.clone(), y), (X, y.flip(0)), (X.flip(0), y), (X[:-1], y[:-1])]
    changed[0][0][3, 1] += 1e-9
    for pair in changed:
        with pytest.raises(ValueError, match="got another batch 1 in a later pass"):
            step(Cheat(batches, [batches[0], pair, *batches[2:]]), **options)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("number", [0, 1], ids=["first pass", "second pass"])
def test_an_error_of_a_loader_passes_through_and_leaves_nothing(number, at):
    closed = []

    class Failing:
        passes = -1

        def __iter__(self):
            self.passes += 1
            try:
                for k, pair in enumerate(cut(*data())):
                    if self.passes == number and k == at:
                        raise OSError("a file is missing")
                    yield pair
            finally:
                closed.append(self.passes)

    with pytest.raises(OSError, match="a file is missing"):
        step(Failing(), signal_to_noise())
    assert closed == list(range(number + 1))


def test_an_interrupt_closes_the_pass():
    closed = []

    class Loader:
        def __iter__(self):
            try:
                yield from cut(*data())
            finally:
                closed.append(True)

    def interrupt(*_):
        raise KeyboardInterrupt

    f, p = net()
    with pytest.raises(KeyboardInterrupt):
        newton_step(f, p, Batches(Loader()), None, nn.CrossEntropyLoss(), interrupt)
    assert closed
    calls = []

    def model_fn(p, x):
        calls.append(None)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return f(p, x)

    closed.clear()
    with pytest.raises(KeyboardInterrupt):
        newton_step(model_fn, p, Batches(Loader()), None, nn.CrossEntropyLoss(), 0.1)
    assert closed


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        ([], "at least one pair"),
        ([data()[0]], r"pairs \(X, y\); got Tensor as batch 0"),
        ([(*data(), None)], r"pairs \(X, y\); got tuple of 3 as batch 0"),
        ([(data()[0], data()[1][:-1])], "X and y must hold the same number of samples"),
        ([data(), (data()[0], None)], "batch 1: .*must be tensors or pytrees of tensors"),
        ([data(), (data()[0][:0], data()[1][:0])], "batch 1: .* at least one sample"),
        ([data(), (data()[0] / 0, data()[1])], "batch 1: the outputs of model_fn must be finite"),
    ],
)
@pytest.mark.parametrize("gram", ["auto", "free"])
def test_what_a_loader_must_not_yield(loader, match, gram):
    with pytest.raises((ValueError, TypeError), match=match):
        step(loader, gram=gram)


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (iter([data()]), "list_iterator"),
        ((pair for pair in [data()]), "generator"),
        (data()[0], "Tensor"),
        ({"a": 1}, "dict"),
        (3, "int"),
    ],
)
def test_what_is_no_loader(loader, got):
    with pytest.raises(TypeError, match=f"Batches: loader must be .* again; got {got}"):
        Batches(loader)


def test_targets_and_sub_samples_are_refused():
    f, p = net()
    X, y = data()
    batches, criterion = Batches(cut(X, y)), nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="y must be None where X is Batches; got Tensor"):
        newton_step(f, p, batches, y, criterion, 0.1)
    for option in ("subsampling_grad", "subsampling_ggn", "subsampling_curvature"):
        with pytest.raises(ValueError, match=f"{option} must be None for Batches"):
            newton_step(f, p, batches, None, criterion, 0.1, **{option: [0]})
    with pytest.raises(ValueError, match=r"outside of torch\.func"):
        torch.func.vmap(lambda p: newton_step(f, p, batches, None, criterion, 0.1))(
            tree_map(lambda leaf: leaf[None], p)
        )


def test_functions_that_take_none_say_which_do():
    f, p = net()
    batches, criterion = Batches(cut(*data())), nn.CrossEntropyLoss()
    optimizer, chooser = (
        directional_newton(f, criterion),
        directional_newton(f, criterion, held_out()),
    )
    calls = [
        lambda: fit(f, p, batches, None, criterion),
        lambda: optimizer.update(p, optimizer.init(p), batches, None),
        lambda: chooser.update(p, chooser.init(p), batches, None),
        lambda: covariance(f, p, batches, None, criterion),
        lambda: gram_matrix(f, p, batches, None, criterion),
        lambda: prepare(f, p, batches),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"got X: Batches\. newton_step, .* take batches;"):
            call()


def _valid(f, y):
    return (f - y)[~y.isnan()].square().mean()


def _by_weight(f, y):
    return (y["weight"] * (f - y["y"]).square().sum(1)).sum() / y["weight"].sum()


def test_losses_that_do_not_add_up_are_refused():
    X, _ = data()
    f, p = net()
    y = residuals()
    y[::4] = torch.nan
    weighted_pairs = [
        (X[n : n + 1], {"y": residuals()[n : n + 1], "weight": torch.ones(1) + n}) for n in range(N)
    ]
    # A single sample does not show it by itself.
    for loader, criterion in ((cut(X, y), _valid), (weighted_pairs, _by_weight)):
        for gram in ("auto", "free"):
            with pytest.raises(ValueError, match="one that divides by what the samples have in y"):
                newton_step(f, p, Batches(loader), None, criterion, 0.1, gram=gram)
    plain, weights = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=WEIGHT)
    with pytest.raises(ValueError, match="divide by numbers of other ratios"):
        newton_step(f, p, Batches(cut(*data())), None, with_curvature(weights, plain), 0.1)
    ignored = torch.full((N,), -100)
    with pytest.raises(ValueError, match="needs a target of positive weight"):
        newton_step(f, p, Batches(cut(X, ignored)), None, plain, 0.1)


# --- memory ----------------------------------------------------------------------------------

PROGRAM = """
import resource, torch
from torch import nn
from ddnewton import Batches, newton_step, as_function
from ddnewton.damping import relative
from ddnewton import top_k

class Loader:  # batches of 8 MiB
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            generator = torch.Generator().manual_seed(number)
            X = torch.randn(512, 2048, generator=generator, dtype=torch.float64)
            yield X, torch.randint(0, 3, (512,), generator=generator)

f, p = as_function(nn.Sequential(nn.AvgPool1d(256), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)))
p = {{name: leaf.double() for name, leaf in p.items()}}
for count in (4, 14):
    newton_step(f, p, Batches(Loader(count)), None, nn.CrossEntropyLoss(), {damping})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.parametrize(
    "damping", ["0.1", "relative(0.1), select=top_k(3)", '0.1, gram="free"'], ids=str.split
)
def test_no_more_than_a_batch_is_in_memory(damping):
    """A process of its own: what 14 batches of 8 MiB take is what four of them did."""
    # Blocks of memory that are freed go back at once, so that what counts is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    run = [sys.executable, "-c", PROGRAM.format(damping=damping)]
    done = subprocess.run(run, capture_output=True, check=True, env=environment)
    few, many = map(int, done.stdout.split())
    assert many - few < 20


def test_what_does_not_fit_goes_free(monkeypatch):
    monkeypatch.setattr("ddnewton.inputs.memory.NEVER_ASKED_BYTES", 0)
    monkeypatch.setattr("ddnewton.inputs.memory._limits", lambda: [(1000, 0)])
    monkeypatch.setattr("ddnewton.quadratic.matrix_free.leading_directions.check_fits", print)
    expected = step(cut(*data()), gram="free")
    with pytest.warns(UserWarning, match="by products"):
        assert error(step(cut(*data())), expected) < 1e-12
    for options in ({"gram": "dense"}, {"groups": per_layer(net()[1]), "gram": "dense"}):
        with pytest.raises(MemoryError, match="Gauss-Newton matrices of side"):
            step(cut(*data()), **options)
