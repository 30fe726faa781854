"""Estimators of scikit-learn whose ``fit`` is that of this library.

``python examples/scikit_learn_estimator.py`` searches the width and the penalty of small nets by
cross-validation, in pipelines, and fits a curve of three parameters with their standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from ddnewton import Fit, as_function, fit, standard_errors

ModuleOf = Callable[[int, int, int], nn.Module]
"""``module_of(inputs, width, outputs)``: a new module with random weights."""


def perceptron(inputs: int, width: int, outputs: int) -> nn.Module:
    """Return a net with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


class _Net(BaseEstimator):
    """What both estimators share: the module, its fit, and its outputs."""

    def __init__(
        self,
        module_of: ModuleOf = perceptron,
        width: int = 8,
        penalty: float = 1e-3,
        max_updates: int = 30,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.module_of = module_of
        self.width = width
        self.penalty = penalty
        self.max_updates = max_updates
        self.random_state = random_state

    def _fitted(self, X: NDArray, y: Tensor, outputs: int, criterion: nn.Module) -> Self:
        """Fit a new module, whose weights the random state draws, and keep it as ``module_``."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.module_of(X.shape[1], self.width, outputs).double().eval()
        model_fn, params = as_function(module)
        options: dict[str, Any] = {"weight_decay": self.penalty, "max_updates": self.max_updates}
        self.result_: Fit = fit(model_fn, params, torch.tensor(X), y, criterion, **options)
        module.load_state_dict(self.result_.params, strict=False)
        self.module_, self.n_iter_ = module, max(1, self.result_.updates)
        return self

    def _outputs(self, X: ArrayLike) -> Tensor:
        """Return the outputs of the fitted module."""
        check_is_fitted(self)
        samples = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            outputs: Tensor = self.module_(torch.tensor(samples))
        return outputs


class NetRegressor(RegressorMixin, _Net):
    """A net with squared errors, for one target."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit a net to samples and their targets, in units of the targets' spread."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        self.mean_, self.spread_ = float(y.mean()), float(y.std()) or 1.0
        targets = torch.tensor((y - self.mean_) / self.spread_)[:, None]
        return self._fitted(X, targets, 1, nn.MSELoss())

    def predict(self, X: ArrayLike) -> NDArray:
        """Return the predicted targets."""
        outputs = self._outputs(X)[:, 0].numpy()
        predictions: NDArray = self.mean_ + self.spread_ * outputs
        return predictions


class NetClassifier(ClassifierMixin, _Net):
    """A net with cross-entropy, for two or more classes."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit a net to samples and their classes."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            message = f"a classifier needs two classes; there is one class, {self.classes_[0]!r}"
            raise ValueError(message)
        return self._fitted(X, torch.tensor(labels), len(self.classes_), nn.CrossEntropyLoss())

    def predict_proba(self, X: ArrayLike) -> NDArray:
        """Return the probability of every class."""
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X: ArrayLike) -> NDArray:
        """Return the likeliest class."""
        labels = self._outputs(X).argmax(1).numpy()
        classes: NDArray = self.classes_[labels]
        return classes


class CurveRegressor(RegressorMixin, BaseEstimator):
    """A function of few parameters, with their standard errors as an attribute.

    ``model_fn(params, X)`` takes the samples as a tensor [N, inputs]; ``start`` are the parameters
    to begin with by their names, and ``bounds`` are as for `ddnewton.fit`.
    """

    def __init__(
        self,
        model_fn: Callable[[dict[str, Tensor], Tensor], Tensor],
        start: Mapping[str, float],
        bounds: tuple[Any, Any] | None = None,
    ) -> None:
        self.model_fn = model_fn
        self.start = start
        self.bounds = bounds

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit the parameters, and find how well the samples tell them."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        start = {name: torch.tensor(value).double() for name, value in self.start.items()}
        data = torch.tensor(X), torch.tensor(y)
        self.result_ = fit(self.model_fn, start, *data, bounds=self.bounds)
        errors = standard_errors(self.model_fn, self.result_.params, *data)
        self.params_ = {name: value.item() for name, value in self.result_.params.items()}
        self.standard_errors_ = {name: value.item() for name, value in errors.items()}
        return self

    def predict(self, X: ArrayLike) -> NDArray:
        """Return the values of the fitted function."""
        check_is_fitted(self)
        samples = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))
        return self.model_fn(self.result_.params, samples).numpy()


def oscillation(params: dict[str, Tensor], X: Tensor) -> Tensor:
    """Return a damped oscillation at times X [N, 1]."""
    t = X[:, 0]
    wave = torch.cos(params["frequency"] * t)
    return params["height"] * torch.exp(-params["rate"] * t) * wave


def main(folds: int = 3, penalties: Sequence[float] = (1e-3, 1e-2, 1e-1)) -> dict[str, Any]:
    """Search, cross-validate and fit, and return the scores and the curve's estimator."""
    # A regressor in a pipeline: width and penalty by cross-validation.
    net = NetRegressor(penalty=1e-2, max_updates=8, random_state=0)
    grid = {"netregressor__width": [2, 4], "netregressor__penalty": penalties}
    search = GridSearchCV(make_pipeline(StandardScaler(), net), grid, cv=folds)
    search.fit(*load_diabetes(return_X_y=True))
    best = {name.rpartition("__")[2]: value for name, value in search.best_params_.items()}
    print(f"diabetes: {best}, R² {search.best_score_:.3f}")
    # A classifier in a pipeline.
    classifier = NetClassifier(width=4, penalty=1e-2, max_updates=15, random_state=0)
    pipeline = make_pipeline(StandardScaler(), classifier)
    accuracy = cross_val_score(pipeline, *load_iris(return_X_y=True), cv=folds).mean()
    print(f"iris: accuracy {accuracy:.3f}")
    # A curve, its parameters and their standard errors.
    times = np.linspace(0, 4, 60)[:, None]
    noise = 0.05 * np.random.default_rng(0).standard_normal(60)
    heights = 2 * np.exp(-0.5 * times[:, 0]) * np.cos(math.pi * times[:, 0]) + noise
    start = {"height": 1.0, "rate": 1.0, "frequency": 3.0}
    curve = CurveRegressor(oscillation, start, bounds=(0.0, math.inf)).fit(times, heights)
    for name, value in curve.params_.items():
        print(f"{name} {value:.3f} ± {curve.standard_errors_[name]:.3f}")
    return {"R²": search.best_score_, "accuracy": accuracy, "curve": curve}


if __name__ == "__main__":
    main()
