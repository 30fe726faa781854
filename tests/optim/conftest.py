"""What tests of modules in training ask for by name."""

import pytest

import ddnewton.optim.modules
from ddnewton import prepare
from tests.optim.twins import layers, net


@pytest.fixture(autouse=True)
def _layers_found_at_once(monkeypatch):
    """Look for layers in the first update, as for larger problems."""
    monkeypatch.setattr(ddnewton.optim.modules, "UPDATES_TO_TRACE", 0)


@pytest.fixture
def layers_found_once(monkeypatch):
    """Look only once for the layers of the net that most tests share: it takes a while."""

    def found(model_fn, params, X):
        names = [name for name, _ in net().named_parameters()]
        shared = list(params) == names and params["0.weight"].shape == (5, X.shape[1])
        return layers(X.dtype) if shared else prepare(model_fn, params, X)

    monkeypatch.setattr(ddnewton.optim.modules, "prepare", found)
