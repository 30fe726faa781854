"""Steps in other units of the parameters, against −S (S G S + δI)⁻¹ S g in dense matrices."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ddnewton import Group, monte_carlo, newton_step, newton_step_and_info, top_k
from ddnewton.damping import relative
from tests.methods import FLOAT32, FLOAT64, seeded, truth
from tests.models import problem
from tests.reference import Dense, error, flat, solve, step

SIDES = ("relu_mlp", "tanh_mlp", "more_columns_than_parameters", "many_points", "tied_autoencoder")
"""Problems with fewer columns NM than parameters D, and with more."""


def _drawn(leaf, shape):
    return 0.2 + torch.rand(shape, generator=seeded(leaf.numel()), dtype=FLOAT64)


def _rows(leaf):
    return _drawn(leaf, leaf.shape[:1] + (1,) * (leaf.ndim - 1))


SCALES = {
    "a number": lambda params: 0.3,
    "a tensor without axes": lambda params: torch.tensor(2.0),
    "one a leaf": lambda params: tree_map(lambda leaf: float(_drawn(leaf, ())), params),
    "one a row": lambda params: tree_map(_rows, params),
    "rows times columns": lambda params: tree_map(
        lambda leaf: _rows(leaf) * _drawn(leaf, leaf.shape[-1:]), params
    ),
    "one an entry": lambda params: tree_map(lambda leaf: _drawn(leaf, leaf.shape), params),
}
"""As callers say them."""


def vector_of(scale, params):
    """The scale of every parameter, in one vector."""
    leaves = tree_leaves(params)
    one = not isinstance(scale, (dict, list, tuple))
    parts = [scale] * len(leaves) if one else tree_leaves(scale)
    pairs = zip(parts, leaves, strict=True)
    return torch.cat(
        [
            torch.as_tensor(part, dtype=FLOAT64).expand(leaf.shape).reshape(-1)
            for part, leaf in pairs
        ]
    )


def scaled(reference: Dense, S) -> Dense:
    """The problem in θ / S: the columns of its Jacobian times S."""
    return reference._replace(jacobians=reference.jacobians * S)


@pytest.mark.parametrize("gram", ["dense", "structured"])
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(SIDES, SCALES)])
def test_every_way_to_say_it(name, kind, gram):
    given, delta = problem(name), 1e-2
    scale = SCALES[kind](given.params)
    S = vector_of(scale, given.params)
    expected = S * solve(scaled(truth(name), S), delta)
    for damping in (delta, lambda evals, *_: torch.full_like(evals, delta)):
        found = newton_step(*given, damping, scale=scale, gram=gram)
        assert error(found, expected) < 1e-9


@pytest.mark.parametrize("name", SIDES)
def test_by_the_sizes_of_the_columns(name):
    """Of fewer parameters than columns; parameters of more are left as they are."""
    given, reference = problem(name), truth(name)
    columns = len(reference.hessians) * int(torch.linalg.matrix_rank(reference.hessians).max())
    S = 1 / reference.ggn.diagonal().sqrt()
    if columns <= len(S):
        S = torch.ones_like(S)
    for gram in ("dense", "structured"):
        found, info = newton_step_and_info(*given, 1e-2, scale="jac", gram=gram)
        assert error(found, S * solve(scaled(reference, S), 1e-2)) < 1e-9
        g = S * reference.gradient
        assert error(info.gradient_norm, g.norm()) < 1e-9
        evals = torch.linalg.eigvalsh(S[:, None] * reference.ggn * S)
        assert error(info.evals[-1], evals[-1]) < 1e-9
        assert error(info.evals.sum(), evals.sum()) < 1e-9


def test_a_parameter_that_changes_nothing_has_a_scale_of_one():
    x = torch.linspace(-1, 1, 9, dtype=FLOAT64)[:, None]
    params = {"slope": torch.ones(1, dtype=FLOAT64), "unused": torch.ones(2, dtype=FLOAT64)}
    found = newton_step(
        lambda p, x: p["slope"] * x, params, x, 3 * x, nn.MSELoss(), 0.0, scale="jac"
    )
    assert error(found["slope"], torch.tensor([2.0])) < 1e-12
    assert not found["unused"].any()


def test_units_of_a_parameter_do_not_matter():
    """The step of a parameter in thousandths is a thousand times as long."""
    x = torch.linspace(0, 2, 12, dtype=FLOAT64)[:, None]
    y = 2 * torch.exp(-x)
    start = {"height": torch.ones(1, dtype=FLOAT64), "rate": torch.full((1,), 0.3, dtype=FLOAT64)}

    def curve(unit):
        return lambda p, x: p["height"] * torch.exp(-p["rate"] * unit * x)

    def step_in(unit, scale):
        params = start | {"rate": start["rate"] / unit}
        found = newton_step(curve(unit), params, x, y, nn.MSELoss(), 1e-2, scale=scale)
        return found | {"rate": found["rate"] * unit}

    assert error(step_in(1e-3, "jac"), step_in(1.0, "jac")) < 1e-10
    assert error(step_in(1e-3, None), step_in(1.0, None)) > 0.1


OPTIONS = {
    "select": {"select": top_k(3)},
    "complement": {"select": top_k(2), "complement": 0.5},
    "everything outside too": {"complement": 1e-2},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", SIDES)
def test_directions_are_those_of_the_scaled_parameters(name, option):
    given = problem(name)
    scale = SCALES["one an entry"](given.params)
    S = vector_of(scale, given.params)
    options = OPTIONS[option]
    select = options.get("select") and (
        lambda evals: range(len(evals) - options["select"].k, len(evals))
    )
    for damping in (1e-2, relative(0.1)):
        found = newton_step(*given, damping, scale=scale, **options)
        expected = S * step(scaled(truth(name), S), damping, select, options.get("complement"))
        assert error(found, expected) < 1e-8


@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_blocks_have_their_part_of_it(name):
    given, reference = problem(name), truth(name)
    scale = SCALES["one a row"](given.params)
    S, start = vector_of(scale, given.params), 0
    groups = [Group(key, damping=0.1 * (number + 1)) for number, key in enumerate(given.params)]
    found = flat(newton_step(*given, 0.0, groups=groups, scale=scale))
    for number, leaf in enumerate(given.params.values()):
        part = slice(start, start + leaf.numel())
        block = reference._replace(jacobians=reference.jacobians[:, :, part] * S[part])
        expected = S[part] * solve(block, 0.1 * (number + 1))
        assert error(found[part], expected) < 1e-9
        start += leaf.numel()


def test_samples_of_their_own():
    """The gradient of some samples, the curvature of others, λ of others still."""
    given, reference = problem("relu_mlp"), truth("relu_mlp")
    scale = SCALES["one an entry"](given.params)
    S, delta = vector_of(scale, given.params), 0.1
    wide = scaled(reference, S)

    def part(samples):
        return Dense(wide.loss, *(tensor[samples] for tensor in wide[1:]))

    found = newton_step(
        *given,
        delta,
        scale=scale,
        complement=delta,
        subsampling_grad=[0, 1],
        subsampling_ggn=[2, 3],
    )
    G = part([2, 3]).ggn + delta * torch.eye(len(S), dtype=FLOAT64)
    assert error(found, -S * torch.linalg.solve(G, part([0, 1]).gradient)) < 1e-9
    # λ of a sample that gives no directions.
    info = newton_step_and_info(
        *given,
        delta,
        scale=scale,
        subsampling_ggn=[0, 1, 2],
        subsampling_curvature=[4],
        select=top_k(1),
    )[1]
    evals, E = torch.linalg.eigh(part([0, 1, 2]).ggn)
    along = E[:, -1]
    assert error(info.evals[-1], evals[-1]) < 1e-9
    assert error(info.lambdas.mean(), along @ part([4]).ggn @ along) < 1e-9


def test_drawn_curvature():
    """Of the same draws, columns are those of the scaled parameters."""
    given = problem("relu_mlp")
    scale, S = 0.5, 0.5

    def drawn(**options):
        criterion = monte_carlo(given.criterion, 1, seeded())
        return newton_step(*given[:4], criterion, complement=0.2, **options)

    assert error(drawn(damping=0.2, scale=scale), drawn(damping=0.2 / S**2)) > 1e-2
    once = newton_step(*given[:4], monte_carlo(given.criterion, 1, seeded()), 0.2, scale=scale)
    again = newton_step(*given[:4], monte_carlo(given.criterion, 1, seeded()), 0.2 / S**2)
    assert error(once, again) < 1e-9


def test_in_float32_and_of_complex_parameters():
    given = problem("many_points", FLOAT32)
    found = newton_step(*given, 1e-2, scale="jac")
    assert error(found, newton_step(*problem("many_points"), 1e-2, scale="jac")) < 1e-4
    x = torch.linspace(0, 1, 7, dtype=FLOAT64)[:, None]
    params = {"a": torch.tensor([0.3 + 0.2j], dtype=torch.complex128)}
    wave = lambda p, x: (p["a"] * torch.exp(2j * x)).real  # noqa: E731 - one line of a model
    one = newton_step(wave, params, x, x, nn.MSELoss(), 0.1, scale={"a": torch.tensor([0.5])})
    assert (
        error(
            torch.view_as_real(one["a"]),
            torch.view_as_real(newton_step(wave, params, x, x, nn.MSELoss(), 0.4)["a"]),
        )
        < 1e-10
    )


def _step_at(given, scale, params):
    return newton_step(given.model_fn, params, *given[2:], 1e-2, scale=scale)


def test_an_ensemble_has_scales_of_its_own():
    given = problem("many_points")
    members = [tree_map(lambda leaf, t=t: t * leaf, given.params) for t in (1.0, 2.0)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *members)
    for scale in ("jac", tree_map(lambda leaf: 2.0, given.params)):
        one = partial(_step_at, given, scale)
        together = torch.func.vmap(one)(stacked)
        for number, member in enumerate(members):
            assert error(tree_map(lambda leaf, n=number: leaf[n], together), one(member)) < 1e-9


@pytest.mark.parametrize(
    ("scale", "kind", "match"),
    [
        ("Jac", ValueError, 'must be positive numbers, "jac" or None'),
        (0.0, ValueError, "scale must be"),
        (-1.0, ValueError, "scale must be"),
        ({}, ValueError, "have the structure of params"),
        ({"W": "a", "v": 1.0}, TypeError, "scale of W must be a number or a tensor"),
        ({"W": torch.ones(3), "v": 1.0}, ValueError, r"broadcast to \[2, 2\]"),
        ({"W": 1.0, "v": torch.tensor([[1.0], [0.0]])}, ValueError, "scale of v must be positive"),
        (torch.tensor(float("nan")), ValueError, "must be positive and finite"),
    ],
)
def test_what_is_no_scale(scale, kind, match):
    with pytest.raises(kind, match=match):
        newton_step(*problem("many_points"), 0.1, scale=scale)
