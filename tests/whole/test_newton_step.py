"""Steps and info against the dense reference, and at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

from ddnewton import above, energy, newton_step, newton_step_and_info, top_k
from tests.methods import DTYPES, FLOAT32, FLOAT64, SELECTIONS, SMALL_AND_LARGE, truth
from tests.models import PROBLEMS, problem
from tests.reference import clusters, directions, error, flat, solve, step
from tests.whole.dense_steps import TOLERANCE, captured, curvature_damping, indices

# --- every model ----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_of_every_model(name, dtype):
    given = problem(name, dtype)
    result = newton_step(*given, 0.1)
    assert error(result, solve(truth(name), 0.1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_step_looks_like_the_parameters(name):
    params = problem(name, FLOAT32).params
    leaves, structure = tree_flatten(params)
    stepped, stepped_structure = tree_flatten(newton_step(*problem(name, FLOAT32), 0.1))
    assert structure == stepped_structure
    assert type(params) is type(newton_step(*problem(name, FLOAT32), 0.1))
    for p, s in zip(leaves, stepped, strict=True):
        assert (s.shape, s.dtype, s.device) == (p.shape, p.dtype, p.device)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, "N", 100])
@pytest.mark.parametrize("name", PROBLEMS)
def test_chunks_change_nothing(name, chunk_size):
    given = problem(name)
    size = len(tree_leaves(given.X)[0]) if chunk_size == "N" else chunk_size
    result = newton_step(*given, 0.1, chunk_size=size)
    assert error(result, newton_step(*given, 0.1)) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_chunks_change_nothing_of_info(name, chunk_size):
    options = {"select": top_k(3), "complement": 0.2}
    s, info = newton_step_and_info(*problem(name), 0.1, chunk_size=chunk_size, **options)
    whole, whole_info = newton_step_and_info(*problem(name), 0.1, **options)
    assert error(s, whole) < 1e-11
    for field, found, expected in zip(info._fields, info, whole_info, strict=True):
        assert error(found.abs(), expected.abs()) < 1e-9, field


@pytest.mark.parametrize("gram", ["dense", "auto"])
def test_the_gram_options_agree(gram):
    result = newton_step(*problem("relu_mlp"), 0.1, gram=gram)
    assert error(result, solve(truth("relu_mlp"), 0.1)) < 1e-12


# --- directions, complement, damping --------------------------------------------------------


# A number in both dtypes is tried with every model above, a rule in both below.
@pytest.mark.parametrize(
    ("damping", "dtype"),
    [(0.05, FLOAT32), (curvature_damping, FLOAT64)],
    ids=["float-float32", "function-float64"],
)
@pytest.mark.parametrize("complement", [None, 0.5], ids=["inside", "complement"])
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_selected_directions(name, select, damping, complement, dtype):
    theirs, ours, _ = SELECTIONS[select]
    expected = step(truth(name), damping, ours, complement)
    result = newton_step(*problem(name, dtype), damping, select=theirs, complement=complement)
    assert error(result, expected) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_a_choice_sees_all_eigenvalues_ascending(name):
    seen = []

    def select(evals):
        seen.append(evals)
        return [len(evals) - 1]

    newton_step(*problem(name), 0.1, select=select)
    N, C, _ = truth(name).jacobians.shape
    M = C - 1 if isinstance(problem(name).criterion, nn.CrossEntropyLoss) else C
    (evals,) = seen
    assert evals.shape == (N * M,)
    assert (evals.diff() >= 0).all()
    assert evals.dtype == FLOAT64
    kept = directions(truth(name)).evals
    assert error(evals[-len(kept) :], kept) < 1e-12
    assert evals[: -len(kept)].abs().sum() < 1e-12 * evals[-1]


def test_ready_made_selections_keep_what_their_names_say():
    evals = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    assert indices(top_k(2)(evals)) == [3, 4]
    assert indices(above(0.5)(evals)) == [3, 4]
    assert indices(above(0.15, relative=False)(evals)) == [2, 3, 4]
    assert indices(energy(0.65)(evals)) == [3, 4]
    assert indices(energy(0.75)(evals)) == [2, 3, 4]


def test_the_rule_may_skip_directions_with_inf():
    def every_other(evals, evecs, gammas, lambdas):
        return torch.where(torch.arange(len(evals)) % 2 == 0, math.inf, 0.1)

    result = newton_step(*problem("relu_mlp"), every_other)
    assert error(result, step(truth("relu_mlp"), every_other)) < 1e-12


def test_an_infinite_float_takes_no_step():
    result = newton_step(*problem("relu_mlp"), math.inf)
    assert flat(result).abs().max() == 0


@DTYPES
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_what_a_damping_rule_receives(name, dtype):
    evals, evecs, gammas, lambdas = captured(name, dtype)
    N, C, _ = truth(name).jacobians.shape
    M = C - 1 if isinstance(problem(name).criterion, nn.CrossEntropyLoss) else C
    K = len(evals)
    assert evecs.shape == (N * M, K)
    assert gammas.shape == lambdas.shape == (N, K)
    assert {x.dtype for x in (evals, evecs, gammas, lambdas)} == {dtype}
    loose = TOLERANCE[dtype]
    assert error(evecs.T @ evecs, torch.eye(K)) < loose * K
    # λ_nk = N λ_k ‖u_kn‖², where u_kn are the rows m·N + n: this pins the order of the rows.
    of_sample = evecs.reshape(M, N, K).square().sum(0)
    assert error(lambdas, N * evals * of_sample) < 10 * loose


# --- info -----------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["all", "top_1", "above"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_info_is_the_references(name, select):
    """Signs, and rotations among equal eigenvalues, are free: γγᵀ and Σλ_n of a cluster are not."""
    theirs, ours, _ = SELECTIONS[select]
    _, info = newton_step_and_info(*problem(name), curvature_damping, select=theirs)
    kept = directions(truth(name), ours)
    gradient = truth(name).gradient

    assert error(info.loss, truth(name).loss) < 1e-12
    assert error(info.evals, kept.evals) < 1e-12
    for cluster in clusters(kept.evals):
        products = info.gammas[:, cluster] @ info.gammas[:, cluster].T
        assert error(products, kept.gammas[:, cluster] @ kept.gammas[:, cluster].T) < 1e-6
        lambdas = info.lambdas[:, cluster].sum(1)
        assert error(lambdas, kept.lambdas[:, cluster].sum(1)) < 1e-6
    assert error(info.gradient_norm, gradient.norm()) < 1e-12
    share = (kept.vectors.T @ gradient).square().sum() / gradient.square().sum()
    assert error(info.gradient_share, share) < 1e-10
    assert int(info.rank) == len(directions(truth(name)).evals)


@pytest.mark.parametrize("select", ["all", "top_k"])
@pytest.mark.parametrize("name", SMALL_AND_LARGE)
def test_info_fields_follow_from_one_another(name, select):
    theirs = SELECTIONS[select].select
    _, info = newton_step_and_info(*problem(name), curvature_damping, select=theirs)
    g = info.gammas.mean(0)
    dampings = curvature_damping(info.evals, None, info.gammas, info.lambdas)
    tau = -g / (info.evals + dampings)
    torch.testing.assert_close(info.dampings, dampings)
    torch.testing.assert_close(info.coefficients, tau)
    torch.testing.assert_close(info.predicted_decrease, -(g * tau + info.evals * tau**2 / 2))
    torch.testing.assert_close(info.lambdas.mean(0), info.evals)


@DTYPES
def test_info_has_the_models_dtype(dtype):
    _, info = newton_step_and_info(*problem("relu_mlp", dtype), 0.1)
    for field in ("evals", "gammas", "lambdas"):
        assert getattr(info, field).dtype == dtype


def test_info_in_float32():
    _, info = newton_step_and_info(*problem("relu_mlp", FLOAT32), 0.1)
    kept = directions(truth("relu_mlp"))
    assert error(info.evals, kept.evals) < 1e-6
    # Single directions turn by about eps λ_max / gap.
    gap = kept.evals.diff().min() / kept.evals[-1]
    loose = 10 * torch.finfo(FLOAT32).eps / float(gap)
    assert error(info.gammas.abs(), kept.gammas.abs()) < loose
    assert error(info.lambdas, kept.lambdas) < loose
    assert int(info.rank) == len(kept.evals)


def test_newton_step_is_the_first_of_the_pair():
    given = problem("convolution")
    result, _ = newton_step_and_info(*given, 0.1)
    assert error(newton_step(*given, 0.1), flat(result)) < 1e-12  # by Cholesky, no eigenpairs


# --- edges ----------------------------------------------------------------------------------


@DTYPES
def test_unused_parameters_get_exactly_zero(dtype):
    for options in ({}, {"complement": 0.1}, {"select": top_k(2)}, {"chunk_size": 1}):
        result = newton_step(*problem("tanh_mlp", dtype), 0.1, **options)
        assert torch.equal(result["unused"], torch.zeros(2, 2, dtype=dtype))
        assert result["in"]["weight"].abs().min() > 0


@DTYPES
def test_no_parameter_is_used(dtype):
    X = torch.ones(3, 2, dtype=dtype)
    params = {"a": torch.ones(2, dtype=dtype), "b": torch.ones((), dtype=dtype)}
    with pytest.raises(ValueError, match="No output depends on any parameter"):
        newton_step_and_info(
            lambda p, X: X * 1.0, params, X, 0 * X, nn.MSELoss(), 0.1, complement=1.0
        )


@DTYPES
@pytest.mark.parametrize("complement", [None, 0.1])
def test_one_class_has_nothing_to_learn(dtype, complement):
    """Cross-entropy over one class is zero, with no gradient and no curvature."""
    params, X = torch.ones(2, 1, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    y = torch.zeros(3, dtype=torch.long)
    result, info = newton_step_and_info(
        lambda W, X: X @ W, params, X, y, nn.CrossEntropyLoss(), 0.1, complement=complement
    )
    assert flat(result).tolist() == [0, 0]
    assert all(bool(torch.as_tensor(field).isfinite().all()) for field in info)


@DTYPES
def test_a_parameter_may_be_a_scalar(dtype):
    X, y = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([3.0, 5.0], dtype=dtype)
    result = newton_step(lambda p, X: p * X, torch.tensor(1.0, dtype=dtype), X, y, F.mse_loss, 0.0)
    assert result.shape == ()
    assert float(result) == pytest.approx(1.6, rel=1e-6)


def test_parameters_of_two_dtypes():
    given = problem("list_of_layers")
    mixed = [(weight, bias.float()) for weight, bias in given.params]
    result = newton_step(*given._replace(params=mixed), 0.1)
    assert [leaf.dtype for leaf in tree_leaves(result)] == [FLOAT64, FLOAT32] * 3
    assert error(result, solve(truth("list_of_layers"), 0.1)) < 1e-6


@pytest.mark.parametrize("inside", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("outside", [FLOAT32, FLOAT64])
def test_outputs_of_another_dtype_than_the_parameters(inside, outside):
    given = problem("one_tensor", inside)
    result = newton_step(
        lambda W, X: (X @ W).to(outside), given.params, given.X, given.y, given.criterion, 0.1
    )
    assert result.dtype == inside
    assert error(result, solve(truth("one_tensor"), 0.1)) < 1e-5


def test_integer_leaves_in_y_and_x_pass_through():
    given = problem("attention", FLOAT32)
    assert given.X["tokens"].dtype == torch.long
    assert given.X["mask"].dtype == torch.bool
    assert error(newton_step(*given, 1.0), solve(truth("attention"), 1.0)) < 1e-5
