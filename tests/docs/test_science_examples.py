"""The examples for scikit-learn, DeepXDE's users and laplace-torch's."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, jacrev

from ddnewton import Group, ggn_eigh, top_k

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def test_scikit_learn_estimators(capsys):
    pytest.importorskip("sklearn")
    import scikit_learn_estimator

    before = torch.get_rng_state()
    found = scikit_learn_estimator.main(folds=2, penalties=[1e-2])
    assert found["R²"] > 0.4
    assert found["accuracy"] > 0.92
    # SciPy's fit of the same curve has the same parameters and errors.
    import numpy as np
    from scipy.optimize import curve_fit

    times = np.linspace(0, 4, 60)
    noise = 0.05 * np.random.default_rng(0).standard_normal(60)
    heights = 2 * np.exp(-0.5 * times) * np.cos(np.pi * times) + noise
    params, cov = curve_fit(
        lambda t, a, b, c: a * np.exp(-b * t) * np.cos(c * t), times, heights, (1, 1, 3)
    )
    curve = found["curve"]
    assert list(curve.params_.values()) == pytest.approx(params, rel=1e-5)
    assert list(curve.standard_errors_.values()) == pytest.approx(np.diag(cov) ** 0.5, rel=1e-4)
    assert curve.score(times[:, None], heights) > 0.99
    assert torch.equal(torch.get_rng_state(), before)
    assert "rate 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["NetRegressor", "NetClassifier"])
def test_all_checks_of_scikit_learn_hold(kind):
    pytest.importorskip("sklearn")
    import scikit_learn_estimator
    from sklearn.utils.estimator_checks import check_estimator

    estimator = getattr(scikit_learn_estimator, kind)(width=4, max_updates=2, random_state=0)
    results = check_estimator(estimator, on_fail="raise", on_skip=None)
    unmade = {result["check_name"] for result in results if result["status"] != "passed"}
    # What is not made needs pandas, or a switch of SciPy's.
    assert all("array" in name for name in unmade)
    assert len(results) - len(unmade) > 45


def test_equal_random_states_make_equal_nets():
    pytest.importorskip("sklearn")
    import scikit_learn_estimator
    from sklearn.base import clone
    from sklearn.datasets import load_iris

    X, y = load_iris(return_X_y=True)
    net = scikit_learn_estimator.NetClassifier(width=3, max_updates=3, random_state=1)
    one, same = net.fit(X, y).predict_proba(X), clone(net).fit(X, y).predict_proba(X)
    differing = clone(net).set_params(random_state=2).fit(X, y).predict_proba(X)
    assert (one == same).all()
    assert abs(one - differing).max() > 1e-3
    assert one.sum(1) == pytest.approx(1)


def test_a_classifier_of_one_class_is_refused():
    pytest.importorskip("sklearn")
    import scikit_learn_estimator

    with pytest.raises(ValueError, match="a classifier needs two classes"):
        scikit_learn_estimator.NetClassifier().fit([[0.0], [1.0]], ["a", "a"])


def test_deepxde_problem(capsys):
    import deepxde_problem

    course = deepxde_problem.main(updates=30, counts=(200, 30, 40))
    assert len(course["error"]) == 30
    assert course["error"][-1] < 1e-3
    assert course["error"][0] > 0.1
    assert "30 updates" in capsys.readouterr().out


def test_the_exact_solution_solves_the_equation_at_its_points():
    import deepxde_problem

    points = deepxde_problem.drawn((50, 20, 20), seed=3)
    solution = {"u": lambda params, X: params * deepxde_problem.exact(X)}
    one = torch.ones((), dtype=torch.float64)
    inside = deepxde_problem.residual(one, points["inside"], **solution)
    assert inside.shape == (50, 1)
    assert inside.abs().max() < 1e-12
    assert deepxde_problem.exact(points["ends"]).abs().max() < 1e-12
    assert set(points["ends"][:, 0].tolist()) == {0.0, 1.0}
    assert (points["beginning"][:, 1] == 0).all()
    # What does not solve it has a residual: 0.4 π² sin πx too much where u does not decay.
    steady = {"u": lambda params, X: params * torch.sin(math.pi * X[:, :1])}
    forced = deepxde_problem.residual(one, points["inside"], **steady)
    expected = 0.4 * math.pi**2 * torch.sin(math.pi * points["inside"][:, :1])
    assert torch.allclose(forced, expected)


def dense_posterior(task, mean, names):
    """The precision of the data, from Jacobians of named parameters, and the function of these."""

    def outputs(params, X):
        return functional_call(task.net, {**mean, **params}, (X,))

    def rows(X):
        of_names = jacrev(outputs)({name: mean[name] for name in names}, X)
        return torch.cat([of_names[name].flatten(2) for name in names], 2)

    J, f = rows(task.X), outputs({}, task.X)
    if task.likelihood == "regression":
        blocks = torch.eye(1).double().expand(len(f), 1, 1) / 0.1**2
    else:
        p = f.softmax(1)
        blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncd,nce,nef->df", J, blocks, J), rows, f


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_laplace_posterior_is_the_dense_one(kind):
    import laplace_posterior

    task = getattr(laplace_posterior, kind)(30)
    laplace = laplace_posterior.fitted(task, 0.5, updates=30)
    names = list(laplace.mean)
    H, rows, f = dense_posterior(task, laplace.mean, names)
    eye, J = torch.eye(len(H)).double(), rows(task.looked_at)
    # The covariance of outputs.
    expected = J @ torch.linalg.inv(H + 0.5 * eye) @ J.mT
    found = laplace_posterior.output_covariance(laplace, task.looked_at)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
    # The evidence, at several precisions of the prior, the likeliest among them.
    theta = torch.cat([laplace.mean[name].flatten() for name in names])
    if kind == "regression":
        normal = torch.distributions.Normal(f, 0.1)
        likelihood = normal.log_prob(task.y).sum()
    else:
        likelihood = f.log_softmax(1).gather(1, task.y[:, None]).sum()
    assert laplace_posterior.log_likelihood(task, f) == pytest.approx(likelihood.item())

    def evidence(tau):
        ratio = torch.logdet(H + tau * eye) - len(H) * math.log(tau)
        return (likelihood - 0.5 * (ratio + tau * theta @ theta)).item()

    best = laplace_posterior.likeliest_precision(laplace, 1000)
    for tau in (0.01, best, 3.0):
        found = laplace_posterior.log_evidence(laplace, likelihood.item(), tau)
        assert found == pytest.approx(evidence(tau), rel=1e-7)
    assert evidence(best) > max(evidence(1.05 * best), evidence(best / 1.05))


def test_laplace_of_low_rank_and_of_the_last_layer():
    import laplace_posterior

    task = laplace_posterior.classification(30)
    laplace = laplace_posterior.fitted(task, 0.5, updates=10)
    data = laplace.model_fn, laplace.mean, task.X, task.y, task.loss
    # Four directions: the data's precision is cut down to four eigenpairs.
    H, rows, _ = dense_posterior(task, laplace.mean, list(laplace.mean))
    evals, evecs = torch.linalg.eigh(H)
    kept = (evecs[:, -4:] * evals[-4:]) @ evecs[:, -4:].mT + 0.5 * torch.eye(len(H)).double()
    J = rows(task.looked_at)
    low = laplace_posterior.posterior(*data, 0.5, select=top_k(4))
    found = laplace_posterior.output_covariance(low, task.looked_at)
    assert torch.allclose(found, J @ torch.linalg.inv(kept) @ J.mT, rtol=1e-6)
    # The last layer by itself, with the others frozen, and as a group.
    names = ["2.weight", "2.bias"]
    H, rows, _ = dense_posterior(task, laplace.mean, names)
    last, J = laplace_posterior.last_layer(task, 0.5), rows(task.looked_at)
    assert list(last.mean) == names
    expected = J @ torch.linalg.inv(H + 0.5 * torch.eye(len(H)).double()) @ J.mT
    found = laplace_posterior.output_covariance(last, task.looked_at)
    assert torch.allclose(found, expected, rtol=1e-6)
    ((evals, evecs),) = ggn_eigh(*data, groups=[Group("2")])
    assert torch.allclose(evals, last.evals, rtol=1e-6)
    assert evecs["0.weight"].abs().max() == 0


def test_laplace_draws_have_the_posterior_covariance():
    import laplace_posterior

    task = laplace_posterior.regression(30)
    laplace = laplace_posterior.fitted(task, 0.5, updates=10)
    H, _, _ = dense_posterior(task, laplace.mean, list(laplace.mean))
    draws = laplace_posterior.drawn(laplace, 20000, torch.Generator().manual_seed(0))
    flat = torch.cat([(draws[n] - laplace.mean[n]).flatten(1) for n in laplace.mean], 1)
    # White noise by the root of the dense precision: unit covariance, to what 20000 draws tell.
    L = torch.linalg.cholesky(H + 0.5 * torch.eye(len(H)).double())
    white = flat @ L
    assert torch.allclose(white.mT @ white / len(white), torch.eye(len(H)).double(), atol=0.05)


def test_laplace_posterior_runs(capsys):
    import laplace_posterior

    found = laplace_posterior.main(updates=40)
    gap, far = found["regression"]["deviations"][[1, 3], 0]
    assert found["regression"]["deviations"][0, 0] < gap < far
    near, distant = found["classification"]["probabilities"].max(1).values
    assert 1 / 3 < distant < 1
    assert near > 0.5
    assert "regression: " in capsys.readouterr().out
