"""State in, state out: saved, stacked, in chunks, and nothing that is passed changes."""

import copy
import io
import itertools
from functools import partial

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ddnewton import State, levenberg_marquardt, top_k
from ddnewton.damping import signal_to_noise
from tests.linearize.layer_cases import prepared_problem
from tests.methods import ADAPTATIONS, DTYPES
from tests.models import problem
from tests.optim.textbook import error, far, optimizer_of, updated

# --- the state ------------------------------------------------------------------------------


BESIDES = {
    "number": {"momentum": 0.8},
    "trust_region": {"weight_decay": 0.01},
}
STATES = {
    **{name: (one.make(), BESIDES.get(name, {})) for name, one in ADAPTATIONS.items()},
    "noise": (signal_to_noise(), {"learning_rate": 0.1}),
    "exact": (levenberg_marquardt(), {"momentum": "exact", "learning_rate": "exact"}),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", ["tanh_mlp", "one_tensor", "tied_autoencoder"])
def test_a_state_is_saved_and_loaded(name, case):
    given = far(name, 2.0)
    damping, options = STATES[case]
    optimizer = optimizer_of(given, damping, **options)
    params, state = given.params, optimizer.init(given.params)
    for _ in range(2):
        params, state, _ = optimizer.update(params, state, given.X, given.y)
    assert isinstance(state, State)
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(state))
    buffer = io.BytesIO()
    torch.save((params, state), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    buffer.seek(0)
    known = [State, type(params)] if isinstance(params, tuple) else [State]
    with torch.serialization.safe_globals(known):
        safely = torch.load(buffer, weights_only=True)
    other = optimizer_of(given, damping, **options)
    for _ in range(2):
        params, state, info = optimizer.update(params, state, given.X, given.y)
        *loaded, again = other.update(*loaded, given.X, given.y)
        *safely, _ = other.update(*safely, given.X, given.y)
    for tree in ((*loaded, again), (*safely, again)):
        for a, b in zip(tree_leaves((params, state, info)), tree_leaves(tree), strict=True):
            assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", ["tanh_mlp", "many_points"])
def test_an_ensemble_is_a_loop(name, case):
    given = problem(name)
    members = [far(name, times, seed=seed).params for seed, times in enumerate((1.0, 5.0, 3.0))]
    damping, options = STATES[case]
    optimizer = optimizer_of(given, damping, **options)
    together = tree_map(lambda *leaves: torch.stack(leaves), *members)
    states = vmap(optimizer.init)(together)
    apart = [optimizer.init(params) for params in members]
    attempts = set()
    for _ in range(4):
        together, states, info = vmap(
            lambda p, s: optimizer.update(p, s, given.X, given.y), randomness="error"
        )(together, states)
        for i in range(3):
            members[i], apart[i], one = optimizer.update(members[i], apart[i], given.X, given.y)
            for a, b in ((together, members[i]), (states, apart[i]), (info, one)):
                # The rank and the share are known where there are eigenpairs.
                pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
                for mine, expected in pairs:
                    if bool(expected.isfinite().all()):
                        assert error(mine[i], expected) < 1e-4, (i, type(a))
            assert int(info.attempts[i]) == int(one.attempts)
            attempts.add(int(one.attempts))
    if case == "levenberg_marquardt" and name == "tanh_mlp":
        assert len(attempts) > 1


def test_an_ensemble_of_batches():
    given = problem("many_points")
    optimizer = optimizer_of(given)
    members = [problem("many_points", seed=seed) for seed in range(3)]
    stack = partial(tree_map, lambda *leaves: torch.stack(leaves))
    params, X, y = (stack(*(m[i] for m in members)) for i in (1, 2, 3))
    found, _, _ = vmap(optimizer.update)(params, vmap(optimizer.init)(params), X, y)
    for i, member in enumerate(members):
        expected, *_ = updated(member)
        assert error(tree_map(lambda leaf, i=i: leaf[i], found), expected) < 1e-8


@DTYPES
@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("name", ["tanh_mlp", "one_tensor"])
def test_nothing_that_is_passed_changes(name, case, dtype):
    given = problem(name, dtype)
    for leaf in tree_leaves(given.params):
        leaf.requires_grad_()
    damping, options = STATES[case]
    optimizer = optimizer_of(given, damping, **options)
    state = optimizer.init(given.params)
    params, state, _ = optimizer.update(given.params, state, given.X, given.y)
    arguments = (params, state, given.X, given.y)
    before = copy.deepcopy(arguments)
    one = optimizer.update(*arguments)
    two = optimizer.update(*arguments)
    pairs = zip(tree_leaves(before), tree_leaves(arguments), strict=True)
    assert all(torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)) for a, b in pairs)
    for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True):
        assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
        assert not a.requires_grad
    assert all(leaf.grad is None for leaf in tree_leaves(given.params))
    assert tree_flatten(one[0])[1] == tree_flatten(given.params)[1]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = optimizer.update(*arguments)
        assert error(again[0], one[0]) < 1e-6
    if options.get("momentum") or getattr(damping, "momentum", 0.0):
        for leaf, like in zip(tree_leaves(one[1].previous), tree_leaves(given.params), strict=True):
            assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    else:
        assert one[1].previous == ()


# --- chunks and prepared models -------------------------------------------------------------


OPTIONS = {
    **{name: (one.make(), {}) for name, one in ADAPTATIONS.items()},
    "momentum": (0.1, {"momentum": 0.8}),
    "weight decay": (levenberg_marquardt(), {"weight_decay": 0.05}),
    "select": (0.1, {"select": top_k(2), "complement": "damping", "momentum": 0.5}),
    "half": (0.1, {"subsampling_ggn": [0, 3], "complement": "damping", "weight_decay": 0.1}),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [*itertools.product(("relu_mlp", "many_points"), OPTIONS), ("attention", "momentum")],
)
def test_chunks_and_prepared_models_change_nothing(name, case):
    given = problem(name)
    damping, options = OPTIONS[case]
    expected, *_ = updated(given, damping, gram="dense", times=2, **options)
    prepared = given._replace(model_fn=prepared_problem(name)[0])
    size = 9 if name == "many_points" else 2
    for chunk_size in (None, size):
        found, *_ = updated(prepared, damping, chunk_size=chunk_size, times=2, **options)
        assert error(found, expected) < 1e-7
    found, *_ = updated(given, damping, gram="dense", chunk_size=size, times=2, **options)
    assert error(found, expected) < 1e-10
