"""``precision``: float64 from end to end, never, or where it matters; and what is lost."""

import inspect

import pytest
import torch
from torch import nn

import ddnewton
from ddnewton import (
    Batches,
    covariance,
    directional_derivatives,
    directional_newton,
    fit,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    newton_step,
    newton_step_and_info,
    prepare,
    standard_errors,
    top_k,
)
from ddnewton.columns.exact_products import matrix_product, sliced_product
from ddnewton.linearize.precision import (
    float64_columns,
    float64_on_demand,
    float64_throughout,
)
from ddnewton.optim import DirectionalNewton
from tests.models import problem
from tests.nets_in_training import exact, in_float32
from tests.reference import dense, error, solve
from tests.slow_float64 import as_where_float64_is_slow

FLOAT32, FLOAT64 = torch.float32, torch.float64
CPU = torch.device("cpu")
GRAMS = pytest.mark.parametrize("gram", ["auto", "dense", "structured", "free"])
DELTAS = pytest.mark.parametrize("delta", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.linspace(0, 1, 16).reshape(8, 2)
MSE = nn.MSELoss()
PARAMS = {"W": torch.linspace(-0.5, 0.7, 6).reshape(3, 2), "b": torch.tensor([0.1, -0.2])}


class Watched:
    """A model that notes which dtypes it is evaluated in."""

    def __init__(self):
        self.dtypes = set()

    def __call__(self, p, x):
        outputs = torch.tanh(x @ p["W"]) + p["b"]
        self.dtypes.add(outputs.dtype)
        return outputs


def an_update(model_fn, **options):
    optimizer = directional_newton(model_fn, MSE, **options)
    optimizer.update(PARAMS, optimizer.init(PARAMS), X, Y)


CALLS = {
    "newton_step": lambda f, **o: newton_step(f, PARAMS, X, Y, MSE, 1e-6, **o),
    "newton_step_and_info": lambda f, **o: newton_step_and_info(f, PARAMS, X, Y, MSE, 1e-6, **o),
    "ggn_eigvalsh": lambda f, **o: ggn_eigvalsh(f, PARAMS, X, Y, MSE, **o),
    "ggn_eigh": lambda f, **o: ggn_eigh(f, PARAMS, X, Y, MSE, **o),
    "directional_derivatives": lambda f, **o: directional_derivatives(f, PARAMS, X, Y, MSE, **o),
    "gram_matrix": lambda f, **o: gram_matrix(f, PARAMS, X, Y, MSE, **o),
    "covariance": lambda f, **o: covariance(f, PARAMS, X, Y, **o),
    "standard_errors": lambda f, **o: standard_errors(f, PARAMS, X, Y, **o),
    "directional_newton": an_update,
    "fit": lambda f, **o: fit(f, PARAMS, X, Y, max_updates=2, **o),
}


def test_every_function_with_gram_has_it_by_keyword():
    public = [getattr(ddnewton, name) for name in ddnewton.__all__] + [DirectionalNewton]
    with_gram = set()
    for function in filter(callable, public):
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:
            continue
        if "gram" in parameters:
            with_gram.add(function.__name__)
            assert parameters["precision"].default == "auto"
            assert parameters["precision"].kind is inspect.Parameter.KEYWORD_ONLY
    assert with_gram == {*CALLS, "DirectionalNewton"}


@pytest.mark.parametrize("call", CALLS)
def test_in_its_own_dtype_a_model_never_sees_float64(call):
    model_fn = Watched()
    CALLS[call](model_fn, precision="model")
    assert model_fn.dtypes == {FLOAT32}


@pytest.mark.parametrize("call", CALLS)
def test_otherwise_it_does(call):
    for precision in ("auto", "float64"):
        model_fn = Watched()
        CALLS[call](model_fn, precision=precision)
        assert model_fn.dtypes == {FLOAT32, FLOAT64}


@pytest.mark.parametrize("gram", ["dense", "free"])
def test_on_demand_neither(gram, monkeypatch):
    """Where a step is not cheap, a small damping asks for float64, but of "auto" alone."""
    monkeypatch.setattr("ddnewton.linearize.precision.CHEAP_FLOPS", 0)
    model_fn = Watched()
    newton_step(model_fn, PARAMS, X, Y, MSE, 1e-8, gram=gram, precision="model")
    assert model_fn.dtypes == {FLOAT32}


def test_a_module_is_trained_in_its_own_dtype():
    dtypes = []

    class Noted(nn.Linear):
        def forward(self, x):
            outputs = super().forward(x)
            dtypes.append(outputs.dtype)
            return outputs

    for precision in ("model", "float64"):
        dtypes.clear()
        DirectionalNewton(Noted(3, 2), MSE, precision=precision).step(X, Y)
        assert (FLOAT64 in dtypes) is (precision == "float64")


# --- the rounding that is told ------------------------------------------------------------------

EPS = {"auto": 2.0**-52, "float64": 2.0**-52, "model": 2.0**-23}
AS_CALLED = ("auto", "dense", True)
"""A prepared model by dense columns is called as it is, and takes its own dtype alone."""


@GRAMS
@pytest.mark.parametrize("precision", EPS)
@pytest.mark.parametrize("prepared", [False, True], ids=["function", "prepared"])
def test_the_info_tells_the_rounding(precision, gram, prepared):
    model_fn = prepare(Watched(), PARAMS, X) if prepared else Watched()
    options = {"gram": gram, "precision": precision}
    _, info = newton_step_and_info(model_fn, PARAMS, X, Y, MSE, 0.1, **options)
    eps = EPS["model" if (precision, gram, prepared) == AS_CALLED else precision]
    assert info.rounding.item() == pytest.approx(eps)


def test_the_rounding_of_casts_inside_is_told():
    def model_fn(p, x):
        return (x.bfloat16() @ p["W"].bfloat16()).float() + p["b"]

    told = {}
    for precision in ("auto", "model"):
        _, info = newton_step_and_info(model_fn, PARAMS, X, Y, MSE, 0.1, precision=precision)
        told[precision] = info.rounding.item()
    assert told == pytest.approx({"auto": 2.0**-52, "model": 2.0**-7})


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["double", "float32", None, FLOAT64])
@pytest.mark.parametrize("call", CALLS)
def test_other_values_are_refused(call, value):
    match = f"{call}: precision must be one of 'auto', 'float64', 'model'; got {value!r}. Leave it"
    with pytest.raises(ValueError, match=match):
        CALLS[call](Watched(), precision=value)


def test_other_values_are_refused_for_a_module():
    with pytest.raises(ValueError, match=r"precision must be one of .*; got 'half'"):
        DirectionalNewton(nn.Linear(3, 2), MSE, precision="half")


def without_float64(p, x):
    if x.dtype == FLOAT64:
        raise RuntimeError("no kernel for Double")
    return x @ p["W"] + p["b"]


def another_in_float64(p, x):
    return x @ p["W"] + (p["b"] if x.dtype == FLOAT32 else 2 * p["b"])


def rounded_inside(p, x):
    return x @ p["W"] + (p["b"] * x[:, :1].sum()).half().to(x.dtype)


REFUSED = r'precision="float64" needs a model that is the same function in float64; got a model in '


@pytest.mark.parametrize("model_fn", [without_float64, another_in_float64])
@pytest.mark.parametrize("gram", ["auto", "dense", "free"])
def test_what_is_no_function_of_float64_is_refused(model_fn, gram):
    with pytest.raises(ValueError, match=f"newton_step: {REFUSED}torch.float32"):
        newton_step(model_fn, PARAMS, X, Y, MSE, 0.1, gram=gram, precision="float64")


def cancelling(p, x):
    """In float32 all but the rounding is lost in the last term, so that float64 has others."""
    return x @ p["W"] + p["b"] + (1e4 * (1 + 1e-7 * x[:, :1]) - 1e4)


@pytest.mark.parametrize("gram", ["auto", "structured", "free"])
def test_a_prepared_model_without_a_float64_version_is_refused(gram):
    prepared = prepare(cancelling, PARAMS, X)
    assert prepared.wide is None
    with pytest.raises(ValueError, match=f"newton_step: {REFUSED}torch.float32"):
        newton_step(prepared, PARAMS, X, Y, MSE, 0.1, gram=gram, precision="float64")


@GRAMS
def test_a_cast_inside_a_float64_model_is_left_out_or_refused(gram):
    def model_fn(p, x):
        return torch.tanh(x @ p["W"]).float().to(x.dtype) + p["b"]

    def whole(p, x):
        return torch.tanh(x @ p["W"]) + p["b"]

    given = ({name: p.double() for name, p in PARAMS.items()}, X.double(), Y.double(), MSE)
    options = {"gram": gram, "precision": "float64", "tol": 1e-9}
    if gram == "structured":
        with pytest.raises(ValueError, match=r"a model that casts to fewer digits inside"):
            newton_step(model_fn, *given, 1e-6, **options)
        return
    step = newton_step(model_fn, *given, 1e-3, **options)
    assert error(step, solve(dense(whole, *given), 1e-3)) < 1e-7


# --- the policy ------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("flops", [1e6, 1e12], ids=["cheap", "dear"])
def test_the_policy(fast, flops, monkeypatch):
    monkeypatch.setattr("ddnewton.linearize.precision.has_fast_float64", lambda _: fast)
    throughout = {p: float64_throughout(p, CPU, lambda: flops) for p in EPS}
    assert throughout == {"auto": flops == 1e6, "float64": True, "model": False}
    on_demand = {p: float64_on_demand(p, CPU) for p in EPS}
    assert on_demand == {"auto": fast, "float64": False, "model": False}
    columns = {p: float64_columns(p, CPU, flops) for p in EPS}
    assert columns == {"auto": fast or flops == 1e6, "float64": True, "model": False}


# --- accuracy --------------------------------------------------------------------------------


@DELTAS
@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize("net", [("tanh", 0), ("tanh", 1000), ("relu", 100)])
def test_exact_sums_of_float32_columns(net, gram, delta):
    """1e-5 of the step, by Jacobians in float32 alone."""
    expected = exact(0, net, delta)
    options = {"gram": gram}
    step, info = newton_step_and_info(*in_float32(0, net), delta, precision="model", **options)
    assert error(
        newton_step(*in_float32(0, net), delta, precision="model", **options), expected
    ) < (1e-5)
    assert error(step, expected) < 1e-5
    assert info.rounding.item() == pytest.approx(2.0**-23)
    with as_where_float64_is_slow():
        assert error(newton_step(*in_float32(0, net), delta, **options), expected) < 1e-5


@pytest.mark.parametrize("name", ["convolution", "many_points", "attention", "poisson"])
@pytest.mark.parametrize("gram", ["dense", "structured"])
def test_products_of_slices_on_either_side(name, gram):
    given, wide = problem(name, FLOAT32), problem(name, FLOAT64)
    expected = solve(dense(*wide), 1e-3)
    with as_where_float64_is_slow():
        assert error(newton_step(*given, 1e-3, gram=gram), expected) < 1e-5


def test_in_batches():
    given = (Watched(), PARAMS, Batches([(X[:4], Y[:4]), (X[4:], Y[4:])]), None, MSE)
    expected = newton_step(Watched(), PARAMS, X, Y, MSE, 1e-4)
    for precision in EPS:
        step = newton_step(*given, 1e-4, precision=precision)
        assert error(step, torch.cat([leaf.reshape(-1) for leaf in expected.values()])) < 1e-5
    assert FLOAT64 in given[0].dtypes
    given[0].dtypes.clear()
    newton_step(*given, 1e-8, precision="model", select=top_k(2))
    assert given[0].dtypes == {FLOAT32}


@pytest.mark.parametrize("length", [0, 1, 7, 256, 257, 3000])
def test_products_of_slices(length):
    """Of rows of very different sizes, a row of zeros among them."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-12, 12, 20, dtype=FLOAT64)[:, None]
    left = torch.randn(20, length, generator=generator).double() * sizes
    left[3] = 0
    right = torch.randn(9, length, generator=generator).double()
    scale = left.norm(dim=1)[:, None] * right.norm(dim=1) + 1e-300
    assert ((sliced_product(left, right) - left @ right.T).abs() / scale).amax() < 2.0**-23
    gram = sliced_product(left, left)
    assert torch.equal(gram, gram.T)
    unit = (1 / left.norm(dim=1)).nan_to_num(posinf=0)
    evals = torch.linalg.eigvalsh(unit[:, None] * gram * unit)
    assert evals.min() > -1e-13  # float32 sums are wrong by 1e-8


def test_products_are_torchs_where_float64_is_fast():
    left = torch.randn(3, 5, dtype=FLOAT64)
    assert torch.equal(matrix_product(left, left), left @ left.T)
    with as_where_float64_is_slow():
        assert torch.equal(matrix_product(left, left), left @ left.T)
        narrow = left.float()
        assert torch.equal(matrix_product(narrow, narrow), sliced_product(narrow, narrow))
        assert matrix_product(narrow, narrow).dtype == FLOAT64
