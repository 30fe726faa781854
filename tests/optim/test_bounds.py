"""Fits inside bounds: SciPy's solutions, never an ulp outside, and what is refused."""

import math

import pytest
import torch
from scipy.optimize import least_squares, nnls
from torch import nn
from torch.func import grad, jacfwd
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.nist.regressions import regression
from ddnewton import Group, fit, held_out, levenberg_marquardt, spring, trust_region
from ddnewton.quadratic.arguments import arguments_of
from ddnewton.quadratic.held import of_free
from ddnewton.quadratic.matrices import matrices_of
from ddnewton.quadratic.quadratic_model import gradients, quadratic_model
from ddnewton.transforms import unwrapped
from tests.methods import DTYPES, FLOAT32, FLOAT64, seeded
from tests.reference import dense

TIGHT = {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14}
INF = math.inf


def of_scipy(model, data, start, limits, method):
    """The loss and parameters of SciPy's best."""
    X, y = data
    lower, upper = (side.numpy() for side in limits)
    result = least_squares(
        lambda b: (model(torch.tensor(b), X) - y).numpy(),
        start.numpy(),
        jac=lambda b: jacfwd(model)(torch.tensor(b), X).numpy(),
        bounds=(lower, upper),
        method=method,
        x_scale="jac",
        max_nfev=2000,
        **TIGHT,
    )
    return 2 * result.cost / len(y), torch.tensor(result.x)


def check_solution(model, X, y, params, lower, upper):
    """Require a point at which the projected gradient vanishes, inside the box to the last bit."""
    assert ((params >= lower) & (params <= upper)).all()
    J, r = jacfwd(model)(params, X), model(params, X) - y
    cosines = (J.T @ r) / (J.norm(dim=0) * r.norm())
    held = ((params == lower) & (cosines > 0)) | ((params == upper) & (cosines < 0))
    assert cosines[~held | (lower == upper)].abs().max() < 1e-5 if (~held).any() else True
    return held


LINE_X = torch.tensor([-1.59, -1.12, 1.74], dtype=FLOAT64)
LINE_Y = torch.tensor([3.45, 6.67, -0.61], dtype=FLOAT64)


def line(p, x):
    return p["m"] * x + p["c"]


def test_a_line_whose_slope_ends_at_its_bound():
    start = {"m": torch.tensor([0.1]).double(), "c": torch.tensor([51.0]).double()}
    result = fit(line, start, LINE_X, LINE_Y, bounds=({"m": 0.1, "c": 2.0}, 100.0))
    assert result.reason.startswith("converged")
    vector = lambda v, x: v[0] * x + v[1]  # noqa: E731
    limits = torch.tensor([0.1, 2.0]).double(), torch.tensor([100.0, 100.0]).double()
    loss, best = of_scipy(vector, (LINE_X, LINE_Y), torch.tensor([0.15, 51.0]), limits, "trf")
    assert float(result.params["m"]) == 0.1
    torch.testing.assert_close(result.params["c"], best[1:], rtol=1e-6, atol=0.0)
    assert float(result.loss) <= loss * (1 + 1e-9)


def test_a_rate_that_must_stay_positive():
    root = lambda p, x: p["a"] * torch.sqrt(p["b"] - x)  # noqa: E731
    x = torch.linspace(0, 1, 20, dtype=FLOAT64)
    y = torch.sqrt(1.01 - x)
    start = {"a": torch.tensor([5.0]).double(), "b": torch.tensor([2.5]).double()}
    result = fit(root, start, x, y, bounds=({"a": -INF, "b": 1.0 + 1e-9}, INF))
    assert abs(float(result.params["b"]) - 1.01) < 1e-6


# Bounds on the parameters of NIST's problems, as numbers between the start, 0, and the certified
# ones, 1: where the certified ones are outside, a bound is active.
REGRESSIONS = {
    "Misra1a/2, none active": ("Misra1a", 1, [-1, -1], [2, 2]),
    "Misra1a/2, one active": ("Misra1a", 1, [-1, -1], [0.5, 2]),
    "Chwirut2/2, two active": ("Chwirut2", 1, [-1, -1, -1], [2, 0.7, 2]),
    "DanWood/1, both active": ("DanWood", 0, [-1, -1], [0.3, 0.2]),
    "Gauss1/1, one active": ("Gauss1", 0, [-9] * 8, [9, 0.5, 9, 9, 9, 0.5, 9, 9]),
    "Kirby2/2, one active": ("Kirby2", 1, [-1] * 5, [2, 2, 2, 0.5, 2]),
    "Eckerle4/2, one active": ("Eckerle4", 1, [-1] * 3, [2, 2, 0.5]),
    "ENSO/1, none active": ("ENSO", 0, [-1] * 9, [2] * 9),
    "ENSO/2, four active": ("ENSO", 1, [-1] * 9, [2, 0.5, 2, 2, 0.5, 2, 2, 2, 0.5]),
    "Rat43/2, one active": ("Rat43", 1, [-1] * 4, [0.5, 2, 2, 2]),
    "MGH09/2, one active": ("MGH09", 1, [-1] * 4, [2, 2, 2, 0.5]),
    "Thurber/2, one active": ("Thurber", 1, [-1] * 7, [2, 2, 2, 2, 2, 0.5, 2]),
}


@pytest.mark.parametrize("method", ["trf", "dogbox"])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions_with_bounds_have_scipys_solutions(name, method):
    problem, which, *sides = REGRESSIONS[name]
    data = regression(problem)
    start = data.starts[which]
    # In units of the start; the box is that between the two sides, whichever is lower.
    ends = [1 + torch.tensor(side).double() * (data.certified / start - 1) for side in sides]
    lower, upper = torch.minimum(*ends), torch.maximum(*ends)
    model = lambda p, x: data.model(p * start, x)  # noqa: E731
    ones = torch.ones_like(start)
    result = fit(model, ones, data.X, data.y, bounds=(lower, upper), **TIGHT)
    assert result.reason.startswith("converged")
    held = check_solution(model, data.X, data.y, result.params, lower, upper)
    expected = {"none": 0, "one": 1, "two": 2, "both": 2, "four": 4}[name.split()[1]]
    assert int(held.sum()) == expected
    loss, best = of_scipy(model, (data.X, data.y), ones, (lower, upper), method)
    assert float(result.loss) <= loss * (1 + 1e-9)
    if float(result.loss) >= loss * (1 - 1e-6):  # the same minimum
        torch.testing.assert_close(result.params, best, rtol=1e-4, atol=1e-6)


# --- linear problems, whose solution is one ----------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(30, 8), (8, 8), (6, 20)], ids=str)
@pytest.mark.parametrize("damping", [levenberg_marquardt, trust_region])
def test_nonnegative_least_squares(shape, damping, dtype):
    A = torch.randn(shape, generator=seeded(), dtype=dtype)
    y = torch.randn(shape[0], generator=seeded(1), dtype=dtype)
    start = torch.ones(shape[1], dtype=dtype)
    result = fit(
        *(lambda p, x: x @ p, start, A, y), damping=damping(), bounds=(0, INF), max_updates=300
    )
    assert result.reason.startswith("converged")
    assert (result.params >= 0).all()
    _, residual = nnls(A.double().numpy(), y.double().numpy())
    assert float(result.loss) * shape[0] <= residual**2 * (1 + 1e-6) + 1e-10
    slopes = grad(lambda p: (A.double() @ p - y).square().mean())(result.params.double())
    assert slopes[result.params > 0].abs().max() < 1e-4
    assert slopes.min() > -1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"gram": "structured"},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "scale": None},
        {"scale": None},
        {"scale": 2.0},
        {"complement": "damping"},
        {"groups": [Group("['a']"), Group("['b']")]},
        {"damping": 0.01},
        {"learning_rate": 0.5},
        {"trust_radius": 0.5},
    ],
    ids=str,
)
def test_options_go_with_bounds(options):
    A = torch.randn(30, 6, generator=seeded(), dtype=FLOAT64)
    y = torch.randn(30, generator=seeded(1), dtype=FLOAT64)
    model = lambda p, x: x[:, :3] @ p["a"] + x[:, 3:] @ p["b"]  # noqa: E731
    start = {name: torch.full((3,), 0.5, dtype=FLOAT64) for name in "ab"}
    decay = options.get("weight_decay", 0.0)
    result = fit(model, start, A, y, bounds=(0.0, 0.6), max_updates=400, **options)
    both = torch.cat([result.params["a"], result.params["b"]])
    loss = lambda p: (A @ p - y).square().mean() + decay / 2 * p.square().sum()  # noqa: E731
    slopes = grad(loss)(both)
    inside = (both > 0) & (both < 0.6)
    assert slopes[inside].abs().max() < 1e-3 if inside.any() else True
    assert (slopes[both == 0] >= 0).all()
    assert (slopes[both == 0.6] <= 0).all()
    assert ((both >= 0) & (both <= 0.6)).all()


# --- the box -----------------------------------------------------------------------------------


@DTYPES
def test_the_model_never_sees_parameters_outside(dtype):
    lower, upper = 0.1, 0.7  # neither of which a binary number is
    seen = []

    def watched(p, x):
        seen.extend(unwrapped(part).clone() for part in tree_leaves(p))
        return p["a"] * torch.exp(-p["b"] * x)

    x = torch.linspace(0, 3, 20, dtype=dtype)
    start = {"a": torch.tensor(0.4, dtype=dtype), "b": torch.tensor(lower, dtype=dtype)}
    result = fit(watched, start, x, 3 * torch.exp(-2 * x), bounds=(lower, upper))
    # Also where it is evaluated in float64.
    values = torch.cat([part.reshape(-1) for part in seen]).double()
    ends = torch.tensor([lower, upper], dtype=dtype).double()
    assert ((values >= ends[0]) & (values <= ends[1])).all()
    assert float(result.params["a"]) == float(ends[1])
    assert float(ends[0]) < float(result.params["b"]) < float(ends[1])


def test_bounds_that_are_never_met_change_no_bit():
    data = regression("Misra1a")
    options = {"max_updates": 8, "ftol": None, "xtol": None, "gtol": None}
    free = fit(data.model, data.starts[1], data.X, data.y, **options)
    boxed = fit(data.model, data.starts[1], data.X, data.y, bounds=(-1e9, 1e9), **options)
    assert torch.equal(boxed.params, free.params)
    assert torch.equal(boxed.history.losses, free.history.losses)


def test_equal_bounds_hold_a_parameter():
    start = {"m": torch.tensor([0.1]).double(), "c": torch.tensor([5.0]).double()}
    result = fit(line, start, LINE_X, LINE_Y, bounds=({"m": -INF, "c": 5.0}, {"m": INF, "c": 5.0}))
    assert float(result.params["c"]) == 5.0
    slope = float(((LINE_Y - 5.0) * LINE_X).sum() / LINE_X.square().sum())
    assert abs(float(result.params["m"]) - slope) < 1e-9


def test_a_corner_is_a_minimum():
    start = {"m": torch.tensor([0.1]).double(), "c": torch.tensor([-9.0]).double()}
    result = fit(line, start, LINE_X, LINE_Y, bounds=({"m": 0.1, "c": -9.0}, {"m": 1.0, "c": -8.0}))
    assert {name: float(p) for name, p in result.params.items()} == {"m": 0.1, "c": -8.0}
    assert result.reason.startswith("converged: the gradient is zero")
    assert float(result.history.gradient_norms[-1]) == 0.0


def test_a_fit_in_a_box_goes_on_as_if_it_had_not_ended():
    data = regression("Chwirut2")
    start = data.starts[1]
    bounds = (start * 0.5, start * 1.2)
    options = {"bounds": bounds, "ftol": None, "xtol": None, "gtol": None}
    whole = fit(data.model, start, data.X, data.y, max_updates=8, **options)
    first = fit(data.model, start, data.X, data.y, max_updates=3, **options)
    second = fit(
        data.model, first.params, data.X, data.y, max_updates=5, state=first.state, **options
    )
    assert torch.equal(second.params, whole.params)


@pytest.mark.parametrize("held", [[], [2], [0, 1, 3, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("scale", [None, 3.0], ids=str)
@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize("n", [3, 9])
def test_the_matrix_of_free_parameters(n, gram, scale, held):
    A = torch.randn(n, 3, generator=seeded(), dtype=FLOAT64)
    y = torch.ones(n, dtype=FLOAT64)
    net = lambda p, x: torch.tanh(x @ p["W"])[:, 0] + p["b"]  # noqa: E731
    params = {"W": A[:3, :2].clone(), "b": torch.zeros(1, dtype=FLOAT64)}
    free = torch.ones(7, dtype=torch.bool)
    free[held] = False
    loss = nn.MSELoss()
    arguments = arguments_of(net, params, A, y, loss, gram=gram, scale=scale)
    with quadratic_model(arguments) as whole:
        model, (matrix,) = of_free(whole, matrices_of(whole), free)
        textbook = dense(net, params, A, y, loss)
        columns = (scale or 1.0) * textbook.jacobians[:, 0].T * free[:, None]
        assert matrix.on_columns == (n == 3)
        expected = 2 / n * (columns.T @ columns if n == 3 else columns @ columns.T)
        torch.testing.assert_close(matrix.matrix(), expected, rtol=0.0, atol=1e-13)
        vectors = torch.randn(7, 2, generator=seeded(1), dtype=FLOAT64)
        torch.testing.assert_close(matrix.columns.rmatmat(vectors), columns.T @ vectors)
        weights = torch.randn(2, n, generator=seeded(1), dtype=FLOAT64)
        torch.testing.assert_close(matrix.columns.matmat(weights), weights @ columns.T)
        (gradient,) = gradients(model, [matrix])
        torch.testing.assert_close(gradient, (scale or 1.0) * free * textbook.gradient)


# --- forms of bounds ---------------------------------------------------------------------------

START = {"m": torch.tensor([0.5]).double(), "c": torch.tensor([5.0, 6.0]).double()}


def lines(p, x):
    return p["m"] * x + p["c"].mean()


FORMS = {
    "numbers": (0.25, 5.5),
    "tensors": (torch.tensor(0.25), torch.tensor(5.5)),
    "a list": [0.25, 5.5],
    "lower a tree": ({"m": 0.25, "c": 0.25}, 5.5),
    "upper a tree of tensors": (0.25, {"m": torch.tensor(5.5), "c": torch.tensor([5.5, 5.5])}),
    "in another order": (0.25, {"c": [5.5, 5.5], "m": 5.5}),
    "of another dtype": ({"m": 0.25, "c": torch.tensor([0.25, 0.25])}, 5.5),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_bounds(form):
    start = tree_map(lambda leaf: leaf.clamp(max=5.25), START)
    expected = fit(lines, start, LINE_X, LINE_Y, bounds=FORMS["numbers"])
    result = fit(lines, start, LINE_X, LINE_Y, bounds=FORMS[form])
    assert all(map(torch.equal, tree_leaves(result.params), tree_leaves(expected.params)))


PAIR = r"bounds must be a pair \(lower, upper\), each a number or a pytree like params; got "
REFUSED = {
    "a dict of pairs": ({"m": (0.1, 100.0)}, TypeError, PAIR),
    "a number": (3.0, TypeError, PAIR + "3.0"),
    "three": ((0, 1, 2), TypeError, PAIR),
    "a missing key": (({"m": 0.0}, INF), ValueError, PAIR + "a lower of other keys"),
    "another key": ((0, {"m": 1.0, "c": 9.0, "d": 1.0}), ValueError, PAIR + "a upper of other"),
    "none": (
        ({"m": None, "c": 0.0}, INF),
        TypeError,
        r"bounds: lower\['m'\] must be a number, or numbers of the shape \[1\]; got None. Pass inf",
    ),
    "a word": (("low", INF), ValueError, PAIR),
    "a shape": (
        ({"m": 0.0, "c": torch.zeros(3)}, INF),
        ValueError,
        r"bounds: lower\['c'\] must be a number, or numbers of the shape \[2\]; got \[3\]",
    ),
    "nan": ((math.nan, INF), ValueError, r"bounds: lower\['m'\] must be a number, .* got nan"),
    "masks": (({"m": True, "c": 0.0}, INF), TypeError, r"bounds: lower\['m'\] must be .* True"),
    "crossed": (
        (INF, -INF),
        ValueError,
        r"bounds: lower\['m'\] must not be above upper\['m'\]; got inf and -inf. Pass \(lower, upp",
    ),
    "outside": (
        (1.0, INF),
        ValueError,
        r"params\['m'\] must lie inside its bounds; got 0.5, which is not in \[1, inf\]. Start ins",
    ),
    "an entry outside": ((0.0, 5.5), ValueError, r"params\['c'\] must lie inside .* got 6, which"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_which_bounds_are_refused(case):
    bounds, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"^fit: {message}"):
        fit(lines, START, LINE_X, LINE_Y, bounds=bounds)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"momentum": 0.5}, "momentum"),
        ({"damping": held_out()}, "momentum"),
        ({"damping": spring()}, "momentum"),
        ({"subsampling_curvature": [0]}, "subsampling_curvature"),
    ],
)
def test_what_goes_with_no_bounds(options, name):
    with pytest.raises(ValueError, match=f"^fit: bounds go with neither .*; got {name}"):
        fit(lines, START, LINE_X, LINE_Y, bounds=(0.0, INF), **options)


def test_complex_parameters_have_no_bounds():
    with pytest.raises(TypeError, match=r"^fit: bounds are of real parameters; got params: torch"):
        fit(lambda p, x: p.abs() * x, torch.tensor(1j), LINE_X, LINE_Y, bounds=(0, 1))


def test_params_that_are_no_number_are_outside():
    start = {"m": torch.tensor([math.nan]), "c": torch.tensor([5.0, 6.0])}
    with pytest.raises(
        ValueError, match=r"^fit: params\['m'\] must lie inside its bounds; got nan"
    ):
        fit(lines, start, LINE_X.to(FLOAT32), LINE_Y.to(FLOAT32), bounds=(0.0, INF))
