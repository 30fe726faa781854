"""Updates on samples that are on several ranks are those on the whole batch, state and all."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from ddnewton import (
    directional_newton,
    fixed,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    spring,
    top_k,
)
from ddnewton.damping import relative
from tests.distributed.split_problems import (
    assert_all_raise,
    assert_close,
    assert_same_bits,
    curve,
    group_of,
    inputs,
    labels,
    normal,
    own,
    params,
    slope,
    targets,
)

UPDATES = 4
COMPLEX = {"a": torch.complex(normal(11, 3, 2), normal(12, 3, 2))}


def rotated(p, x):
    return torch.sin(x.to(p["a"].dtype) @ p["a"])


def squared_distance(outputs, y):
    return (outputs - y).abs().square().mean()


def drawn():
    return monte_carlo(nn.CrossEntropyLoss(), 3, torch.Generator().manual_seed(2))


def squares():
    return curve, params(), inputs(), targets(), nn.MSELoss()


def classes():
    return curve, params(), inputs(), labels(), nn.CrossEntropyLoss()


def draws():
    return curve, params(), inputs(), labels(), drawn()


def terms():
    """The samples of one term come one after the other on the ranks, as do those of the other."""
    X, y = (
        {"values": inputs(), "slopes": inputs()},
        {"values": targets(), "slopes": normal(9, 24, 3)},
    )
    return {"values": curve, "slopes": slope}, params(), X, y, nn.MSELoss()


def complex_outputs():
    y = torch.complex(targets(), normal(13, 24, 2))
    return rotated, COMPLEX, inputs(), y, squared_distance


CASES = {
    "trust region": (squares, {}),
    "trust radius": (squares, {"damping": 0.1, "trust_radius": 0.05}),
    "levenberg marquardt": (squares, {"damping": levenberg_marquardt()}),
    "a rule": (classes, {"damping": fixed(relative(0.1)), "select": top_k(3)}),
    "held out and drawn": (draws, {"damping": held_out(every=2)}),
    "held out, with a complement": (draws, {"damping": held_out(), "complement": "damping"}),
    "momentum": (classes, {"damping": spring(), "momentum": 0.9}),
    "exact momentum": (classes, {"damping": 0.01, "momentum": "exact"}),
    "weight decay": (squares, {"weight_decay": 0.1}),
    "weight decay by leaf": (squares, {"weight_decay": {"W": 0.1, "b": 0.0}}),
    "sub-samples": (
        classes,
        {"damping": spring(), "subsampling_grad": [1, 7, 20], "subsampling_ggn": [4, 18]},
    ),
    "two terms": (terms, {}),
    "products": (classes, {"damping": levenberg_marquardt(), "gram": "free"}),
    "complex": (complex_outputs, {"damping": 0.01}),
}


def updated(rank, name, size, count=UPDATES, start=None):
    """Some updates: parameters, state and record after each of them."""
    problem, options = CASES[name]
    model_fn, p, X, y, criterion = problem()
    optimizer = directional_newton(model_fn, criterion, process_group=group_of(size), **options)
    p, state = (p, optimizer.init(p)) if start is None else start
    done = []
    for _ in range(count):
        p, state, info = optimizer.update(p, state, own(X, rank, size), own(y, rank, size))
        done.append((p, state, info))
    return done


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_the_whole_batch(name, four):
    results = four.results(updated, name, 4)
    assert_same_bits(results)
    for actual, expected in zip(results[0], updated(0, name, 1), strict=True):
        (p, state, info), (q, reference, told) = actual, expected
        assert_close(p, q, 1e-11)
        assert_close(state, reference, 1e-9)
        # What is left over where nothing is lost is rounding.
        for field in ("loss", "loss_after", "damping", "learning_rate", "step_norm", "attempts"):
            assert_close(getattr(info, field), getattr(told, field), 1e-9)


def test_a_run_goes_on_with_other_numbers_of_ranks(two, four):
    name = "levenberg marquardt"
    first = four.results(updated, name, 4, 2)[0][-1]
    second = two.results(updated, name, 2, 1, first[:2])[0][-1]
    third = updated(0, name, 1, 1, second[:2])[-1]
    assert_close(third[0], updated(0, name, 1, 4)[-1][0], 1e-11)


def refused(rank, problem, **by_rank):
    """An update with an option of every rank's own; or with a state, or inputs."""
    model_fn, p, X, y, criterion = problem()
    options = {name: values[rank] for name, values in by_rank.items()}
    control, spoiled = options.pop("control", None), options.pop("spoiled", False)
    optimizer = directional_newton(
        model_fn, criterion, process_group=distributed.group.WORLD, **options
    )
    state = optimizer.init(p)
    if control is not None:
        state = state._replace(control=torch.tensor(control, dtype=torch.float64))
    X, y = own(X, rank, 2), own(y, rank, 2)
    optimizer.update(p, state, X[1:] if spoiled else X, y)


DIFFERENT = {
    "learning_rate": ([0.5, 1.0], "0.5 on rank 0, 1.0 on rank 1"),
    "momentum": ([0.5, 0.25], "0.5 on rank 0, 0.25 on rank 1"),
    "weight_decay": ([0.0, 0.25], "0.0 on rank 0, 0.25 on rank 1"),
    "trust_radius": ([1.0, 2.0], "1.0 on rank 0, 2.0 on rank 1"),
    "complement": ([1.0, "damping"], "1.0 on rank 0, "),
    "control": ([1.0, 2.0], "1.0 torch.float64 [] on rank 0, 2.0 torch.float64 [] on rank 1"),
    "damping": ([1.0, 2.0], "on rank 0, "),
}


def with_different(rank, option):
    more = {"damping": [1.0, 1.0]} if option == "complement" else {}
    refused(rank, squares, **{option: DIFFERENT[option][0]}, **more)


@pytest.mark.parametrize("option", DIFFERENT)
def test_what_differs_between_ranks_is_refused_by_its_name(option, two):
    name = "state.control" if option == "control" else option
    rule = f"{name} must be the same on all ranks"
    outcomes = two.run(with_different, option)
    assert_all_raise(outcomes, "BadValue", "update: ", rule, DIFFERENT[option][1])


def with_spoiled(rank):
    refused(rank, squares, spoiled=[False, True])


def test_an_error_on_one_rank_is_raised_on_all(two):
    outcomes = two.run(with_spoiled)
    assert_all_raise(outcomes, "BadValue", "update: rank 1: X and y must hold the same number")


def copied(rank):
    """A copy of the update, which makes the same step; and how a pickle is refused."""
    model_fn, p, X, y, criterion = squares()
    group = distributed.group.WORLD
    optimizer = directional_newton(model_fn, criterion, process_group=group)
    batch = own(X, rank, 2), own(y, rank, 2)
    steps = [
        made.update(p, made.init(p), *batch)[0] for made in (optimizer, copy.deepcopy(optimizer))
    ]
    assert_same_bits(steps)
    pickle.dumps(directional_newton(model_fn, criterion))
    pickle.dumps(optimizer)


def test_copies_share_the_group_and_a_pickle_refuses_it(two):
    rule = "an optimizer that is pickled must have no process_group; got ProcessGroup"
    assert_all_raise(two.run(copied), "BadType", rule)


def on_a_mesh(rank):
    """An update of the ranks along an axis of a mesh, which copies share, too."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    model_fn, p, X, y, criterion = squares()
    optimizer = copy.deepcopy(directional_newton(model_fn, criterion, process_group=mesh["data"]))
    return optimizer.update(p, optimizer.init(p), own(X, rank, 2), own(y, rank, 2))


def test_a_mesh_is_a_group(two):
    results = two.results(on_a_mesh)
    assert_same_bits(results)
    assert_close(results[0][0], updated(0, "trust region", 1, 1)[0][0])


def alone(rank):
    """Without a process_group nothing is exchanged, whatever is initialised."""
    return updated(0, "trust region", 1, 1)


def test_without_a_group_every_process_is_by_itself(two):
    assert_close(two.results(alone)[1][0][0], updated(0, "trust region", 1, 1)[0][0], 0.0)
