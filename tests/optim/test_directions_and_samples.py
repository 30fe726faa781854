"""Updates along some directions, in blocks, from some samples, and by Cholesky's factorization."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ddnewton import (
    Group,
    empirical_fisher,
    ggn_eigh,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    top_k,
)
from tests.methods import FLOAT64
from tests.models import Problem, problem
from tests.optim.textbook import (
    Pulls,
    along,
    at,
    error,
    far,
    loss_of,
    optimizer_of,
    some,
    spring,
    step_of,
    updated,
)
from tests.reference import dense, directions, flat, softmax_derivatives, solve, solve_in_decimals

# --- which directions, which samples --------------------------------------------------------


@pytest.mark.parametrize("complement", [None, "damping", 0.7])
@pytest.mark.parametrize("pulls", [(0.0, 0.0), (0.8, 0.0), (0.0, 0.05), (0.8, 0.05)], ids=str)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_selected_directions_and_what_is_outside(name, pulls, complement):
    given, theta = problem(name), flat(problem(name).params)
    options = {"momentum": pulls[0], "weight_decay": pulls[1], "learning_rate": 0.1}
    optimizer = optimizer_of(given, 0.3, select=top_k(2), complement=complement, **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(theta)
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        kept = directions(reference, lambda evals: range(len(evals) - 2, len(evals)))
        outside = (reference.gradient, 0.3 if complement == "damping" else complement)
        vector = along(
            kept.vectors,
            kept.gammas.mean(0),
            kept.evals,
            torch.zeros(2, dtype=FLOAT64),
            theta,
            previous,
            Pulls(0.3, *pulls),
            None if complement is None else outside,
        )
        params, state, info = optimizer.update(params, state, given.X, given.y)
        assert error(flat(params) - theta, 0.1 * vector) < 1e-9
        previous = vector
        share = kept.gammas.mean(0).square().sum() / reference.gradient.square().sum()
        assert info.gradient_share.isnan() or error(info.gradient_share, share) < 1e-9


@pytest.mark.parametrize("pulls", [(0.0, 0.0), (0.8, 0.05)], ids=str)
@pytest.mark.parametrize("damping", ["number", "marquardt"])
def test_groups_are_blocks_with_dampings_of_their_own(damping, pulls):
    given = problem("tanh_mlp")
    momentum, decay = pulls
    groups = [Group("in", damping=0.4), Group(["out", "scale"])]
    sizes = [leaf.numel() for leaf in tree_leaves(given.params)]
    owners = [0, 0, 1, 1, 1, None]  # "unused" is in none
    owner = [o for o, size in zip(owners, sizes, strict=True) for _ in range(size)]
    own = 0.1 if damping == "number" else levenberg_marquardt(rule=0.1)
    options = {"momentum": momentum, "weight_decay": decay, "learning_rate": 0.3}
    optimizer = optimizer_of(given, own, groups=groups, **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros(sum(sizes), dtype=FLOAT64)
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        delta = float(info.damping) - 0.1
        vector = torch.zeros_like(theta)
        for block, mine in ((0, 0.4), (1, 0.1)):
            i = torch.tensor([d for d, o in enumerate(owner) if o == block])
            g, G = reference.gradient[i], reference.ggn[i][:, i]
            pull = Pulls(mine + delta, momentum, decay)
            vector[i] = spring(g, G, theta[i], previous[i], pull)
        assert bool(info.accepted)
        assert int(info.attempts) == 1
        assert error(flat(params) - theta, 0.3 * vector) < 1e-9
        s = 0.3 * vector
        slope = reference.gradient @ s + decay * theta @ s
        predicted = -slope - (s @ reference.ggn @ s + decay * s @ s) / 2
        assert abs(info.predicted_decrease - predicted) < 1e-9 * slope.abs()
        previous = vector


def test_the_share_and_the_rank_of_groups():
    given = problem("relu_mlp")
    groups = [Group("0", select=top_k(1)), Group("2", select=top_k(2))]
    _, _, info = updated(given, 0.1, groups=groups, learning_rate=0.1)
    reference = dense(*given)
    inside, square, rank = 0, 0, 0
    for i, k in ((slice(0, 30), 1), (slice(30, None), 2)):
        block = reference._replace(jacobians=reference.jacobians[:, :, i])
        kept = directions(block, lambda evals, k=k: range(len(evals) - k, len(evals)))
        rank += len(directions(block).evals)
        inside += kept.gammas.mean(0).square().sum()
        square += block.gradient.square().sum()
    assert error(info.rank, torch.tensor(rank)) == 0
    assert error(info.gradient_share, inside / square) < 1e-9


CHOICES = {
    "gradient": ({"subsampling_grad": [1, 3]}, [1, 3], None),
    "curvature": ({"subsampling_ggn": [0, 2, 1]}, None, [0, 2, 1]),
    "both": ({"subsampling_grad": [4, 0], "subsampling_ggn": [2, 3, 0]}, [4, 0], [2, 3, 0]),
    "the same": ({"subsampling_grad": [4, 0], "subsampling_ggn": [4, 0]}, [4, 0], [4, 0]),
}


@pytest.mark.parametrize("pulls", [(0.0, 0.0), (0.8, 0.05)], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_all_of_the_gradient_under_sub_sampling(name, choice, pulls):
    given = problem(name)
    options, mine, curved = CHOICES[choice]
    momentum, decay = pulls
    keywords = {"momentum": momentum, "weight_decay": decay, "learning_rate": 0.1} | options
    optimizer = optimizer_of(given, 0.3, complement="damping", **keywords)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(3):
        reference, theta = at(given, params), flat(params)
        g, G = some(reference, mine).gradient, some(reference, curved).ggn
        vector = spring(g, G, theta, previous, Pulls(0.3, momentum, decay))
        before = loss_of(given, params, decay, slice(None) if mine is None else mine)
        params, state, info = optimizer.update(params, state, given.X, given.y)
        after = loss_of(given, params, decay, slice(None) if mine is None else mine)
        assert error(flat(params) - theta, 0.1 * vector) < 1e-9
        s = 0.1 * vector
        slope = g @ s + decay * theta @ s
        predicted = -slope - (s @ G @ s + decay * s @ s) / 2
        assert abs(info.predicted_decrease - predicted) < 1e-9 * slope.abs()
        assert error(info.loss, before) < 1e-12
        assert error(info.loss_after, after) < 1e-12
        assert error(info.gradient_norm, g.norm()) < 1e-12
        previous = vector


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_curvature_along_directions_of_other_samples(name, momentum):
    given = problem(name)
    samples = {"subsampling_ggn": [0, 2, 1], "subsampling_curvature": [3, 1, 4]}
    optimizer = optimizer_of(given, 0.3, momentum=momentum, learning_rate=0.1, **samples)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(2):
        reference, theta = at(given, params), flat(params)
        E = directions(some(reference, [0, 2, 1])).vectors
        curvature = torch.einsum("dk,de,ek->k", E, some(reference, [3, 1, 4]).ggn, E)
        more, gamma = torch.zeros(E.shape[1], dtype=FLOAT64), E.T @ reference.gradient
        vector = along(E, gamma, curvature, more, theta, previous, Pulls(0.3, momentum))
        params, state, _ = optimizer.update(params, state, given.X, given.y)
        assert error(flat(params) - theta, 0.1 * vector) < 1e-8
        previous = vector


def drawn_curvature(given: Problem, params, criterion) -> torch.Tensor:
    """The curvature of drawn targets, which only the library knows."""
    evals, evecs = ggn_eigh(given.model_fn, params, given.X, given.y, criterion)
    E = torch.cat([leaf.reshape(len(evals), -1) for leaf in tree_leaves(evecs)], 1)
    return E.T @ (evals[:, None] * E)


@pytest.mark.parametrize("delta", [0.3, 1e-5])
@pytest.mark.parametrize("name", ["relu_mlp", "more_columns_than_parameters", "many_points"])
def test_all_of_the_gradient_with_drawn_targets(name, delta):
    given = problem(name)
    mine, other = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn_given = given._replace(criterion=monte_carlo(given.criterion, 2, mine))
    options = {"momentum": 0.5, "weight_decay": 0.01, "learning_rate": 0.01}
    optimizer = optimizer_of(drawn_given, delta, complement="damping", **options)
    params, state = given.params, optimizer.init(given.params)
    previous = torch.zeros_like(flat(params))
    for _ in range(3):
        G = drawn_curvature(given, params, monte_carlo(given.criterion, 2, other))
        theta, g = flat(params), at(given, params).gradient
        vector = spring(g, G, theta, previous, Pulls(delta, 0.5, 0.01))
        params, state, _ = optimizer.update(params, state, given.X, given.y)
        assert error(flat(params) - theta, 0.01 * vector) < 1e-8
        previous = vector


@pytest.mark.parametrize("name", ["relu_mlp", "many_points"])
def test_the_empirical_fisher_matrix(name):
    given = problem(name)
    fisher = given._replace(criterion=empirical_fisher(given.criterion))
    reference, theta = dense(*given), flat(given.params)
    rows = reference.gradients
    zero = torch.zeros_like(theta)
    # Of a mean over samples alone; where torch averages over outputs too there is one output.
    G = rows.T @ rows / len(rows)
    for options in ({}, {"complement": "damping"}):
        vector = spring(reference.gradient, G, theta, zero, Pulls(0.3))
        assert error(step_of(fisher, 0.3, **options), vector) < 1e-10


# --- Cholesky's factorization ---------------------------------------------------------------


@pytest.mark.parametrize("delta", [1.0, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("name", ["relu_mlp", "more_columns_than_parameters", "many_points"])
def test_a_step_with_one_damping_everywhere(name, delta):
    """Relative to ``delta``'s own conditioning, whichever way it goes."""
    given, reference = problem(name), dense(*problem(name))
    scale = 1e-11 * max(1.0, float(reference.ggn.trace()) / delta) ** 0.5
    assert error(newton_step(*given, delta, complement=delta), solve(reference, delta)) < scale
    identity = torch.eye(len(reference.gradient), dtype=FLOAT64)
    for options, mine, curved in CHOICES.values():
        g, G = some(reference, mine).gradient, some(reference, curved).ggn
        expected = -torch.linalg.solve(G + delta * identity, g)
        found = newton_step(*given, delta, complement=delta, **options)
        assert error(found, expected) < 1e-13 * max(1e3, float(G.trace()) / delta)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    one, two = (monte_carlo(given.criterion, 1, generator) for generator in generators)
    G = drawn_curvature(given, given.params, one)
    found = newton_step(*given._replace(criterion=two), delta, complement=delta)
    expected = -torch.linalg.solve(G + delta * identity, reference.gradient)
    assert error(found, expected) < 1e-12 * max(1e3, float(G.trace()) / delta)


@pytest.mark.parametrize("delta", [1.0, 1e-3, 1e-8])
@pytest.mark.parametrize("times", [30.0, 1000.0])
@pytest.mark.parametrize("name", ["relu_mlp", "one_tensor", "more_columns_than_parameters"])
def test_a_step_of_a_net_that_is_certain(name, times, delta):
    """Curvatures that underflow leave slopes of one."""
    given = far(name, times**0.5 if name != "one_tensor" else times)
    reference = dense(*given, softmax_derivatives)
    D = len(reference.gradient)
    exact = solve_in_decimals(reference, delta) if D < 20 else solve(reference, delta)
    found = newton_step(*given, delta, complement=delta)
    assert error(found, exact) < 1e-9 / min(1, delta) ** 0.5
    params, _, info = updated(given, delta, complement="damping", learning_rate=1e-3 * delta)
    if info.attempts == 1:
        got = (flat(params) - flat(given.params)) / (1e-3 * delta)
        assert error(got, exact) < 1e-6 / min(1, delta) ** 0.5
