"""A fit on several ranks is that of the whole batch, and ends on all of them for one reason."""

import contextlib
import io
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import distributed, nn

from ddnewton import fit, spring
from ddnewton.optim import fit_loop, fitted_model
from tests.distributed.split_problems import (
    assert_all_raise,
    assert_close,
    assert_same_bits,
    curve,
    group_of,
    inputs,
    normal,
    own,
    params,
    slope,
    targets,
)

ENDED = "ended after max_updates = 3"


def squares(rank, size):
    return curve, params(), own(inputs(), rank, size), own(targets(), rank, size), nn.MSELoss()


def terms(rank, size):
    model_fn = {"values": curve, "slopes": slope}
    X = own({"values": inputs(), "slopes": inputs()}, rank, size)
    y = own({"values": targets(), "slopes": normal(9, 24, 3)}, rank, size)
    return model_fn, params(), X, y, nn.MSELoss()


def drawn(rank, size):
    """Inputs that are drawn anew after every second update; targets of every update."""

    def points(t):
        return own(normal(20 + t // 2, 24, 3), rank, size)

    def values(t):
        return own(normal(30 + t // 2, 24, 2).tanh(), rank, size)

    return curve, params(), points, values, nn.MSELoss()


CASES = {
    "squares": (squares, {"max_updates": 4}),
    "bounds": (squares, {"max_updates": 4, "bounds": ({"W": -0.4, "b": -10.0}, 0.6)}),
    "two terms": (terms, {"max_updates": 3}),
    "new points": (drawn, {"max_updates": 4, "damping": spring()}),
    "to the end": (squares, {"ftol": 1e-3}),
}


def fitted(rank, name, size, **more):
    problem, options = CASES[name]
    model_fn, p, X, y, criterion = problem(rank, size)
    if "bounds" in options:
        p = {name: leaf.clamp(-0.3, 0.3) for name, leaf in p.items()}
    return fit(model_fn, p, X, y, criterion, process_group=group_of(size), **options | more)


@pytest.mark.parametrize("name", CASES)
def test_fits_are_those_of_the_whole_batch(name, four):
    results = four.results(fitted, name, 4)
    # The history is the same, too: its seconds are those of the first rank.
    assert_same_bits(results)
    actual, expected = results[0], fitted(0, name, 1)
    assert_close(actual.params, expected.params, 1e-10)
    assert_close(actual.loss, expected.loss)
    assert_close(actual.history._replace(seconds=expected.history.seconds), expected.history, 1e-8)
    assert actual.reason == expected.reason


def continued(rank, size, result=None):
    problem = squares(rank, size)
    start = {} if result is None else {"state": result.state}
    if result is not None:
        problem = (problem[0], result.params, *problem[2:])
    return fit(*problem, process_group=group_of(size), max_updates=2, **start)


def test_a_fit_goes_on_with_other_numbers_of_ranks(two, four):
    first = four.results(continued, 4)[0]
    second = two.results(continued, 2, first)[0]
    whole = fit(*squares(0, 1), max_updates=4)
    assert_close(second.params, whole.params, 1e-10)
    assert int(second.state.updates) == 4


class Stops:
    """A callback that ends a fit at an update, by an error or as it is told to."""

    def __init__(self, update, error):
        self.update, self.error, self.seen = update, error, []

    def __call__(self, result):
        self.seen.append((result.updates, float(result.loss)))
        if result.updates == self.update:
            raise self.error


def stopped(rank, by_rank):
    """A fit that a callback ends; what it has seen as well."""
    error = by_rank[rank]
    callback = Stops(2 if error else 99, error)
    result = fitted(rank, "squares", 2, callback=callback)
    return result, callback.seen


def test_a_callback_on_any_rank_stops_all(two):
    results = two.results(stopped, [None, StopIteration()])
    assert_same_bits(results)
    result, seen = results[0]
    assert (result.updates, result.reason) == (2, "stopped: by the callback")
    assert [number for number, _ in seen] == [1, 2]


def test_an_error_in_a_callback_is_raised_on_all(two):
    outcomes = two.run(stopped, [None, ZeroDivisionError("no more")])
    assert_all_raise(outcomes, "RankError", "rank 1: ZeroDivisionError: no more")


def late(rank, number):
    """A fit in which time passes by days, or stands still, on every rank."""
    clock = iter(range(0, 10**9, 10**6 if rank == number else 1))
    with mock.patch.object(fit_loop, "time", SimpleNamespace(monotonic=lambda: next(clock))):
        return fitted(rank, "squares", 2, max_seconds=10**4)


def test_the_first_rank_has_the_clock(two):
    results = two.results(late, 0)
    assert_same_bits(results)
    assert results[0].updates == 1
    assert results[0].reason == "ended after max_seconds = 10000"
    results = two.results(late, 1)
    assert_same_bits(results)
    assert results[0].reason == "ended after max_updates = 4"


def shown(rank):
    """What a fit writes on the screen."""
    screen = io.StringIO()
    without_bar = mock.patch("ddnewton.optim.progress.find_spec", return_value=None)
    with contextlib.redirect_stderr(screen), without_bar:
        fitted(rank, "squares", 2, progress=True)
    return screen.getvalue()


def test_the_first_rank_shows_the_progress(two):
    first, second = two.results(shown)
    assert first.startswith("fit: update 1, loss ")
    assert second == ""


def with_bad_points(rank, update, kind):
    """Points that one rank cannot make at an update, or that are no numbers there."""
    model_fn, p, X, y, criterion = squares(rank, 2)

    def points(t):
        if rank == 1 and t == update:
            if kind == "nan":
                return X * torch.nan
            raise LookupError("no points")
        return X

    group = distributed.group.WORLD
    return fit(model_fn, p, points, y, criterion, process_group=group, max_updates=4)


@pytest.mark.parametrize("update", [0, 2])
def test_an_error_in_the_points_of_one_rank_is_raised_on_all(update, two):
    outcomes = two.run(with_bad_points, update, "error")
    assert_all_raise(outcomes, "RankError", "rank 1: LookupError: no points")


def test_what_is_not_finite_on_one_rank_ends_the_fit_on_all(two):
    results = two.results(with_bad_points, 2, "nan")
    assert_same_bits(results)
    assert results[0].updates == 2
    assert results[0].reason.startswith("ended where the next update is not defined: ")
    outcomes = two.run(with_bad_points, 0, "nan")
    assert_all_raise(outcomes, "NotFinite", "fit: rank 1: the outputs of model_fn must be finite")


def partly_drawn(rank):
    """Points that are drawn anew on one rank only."""
    model_fn, p, X, y, criterion = squares(rank, 2)
    X = points_of if rank else X
    group = distributed.group.WORLD
    return fit(model_fn, p, X, y, criterion, process_group=group, max_updates=3, damping=spring())


def points_of(t):
    return normal(40 + t, 9, 3)


def test_points_that_change_on_one_rank_change_for_all(two):
    """The parameters are those of the last update, on all ranks, as no losses can be compared."""
    results = two.results(partly_drawn)
    assert_same_bits(results)
    assert results[0].reason == ENDED
    assert torch.equal(results[0].loss.cpu(), results[0].history.losses[-1])


def different(rank, option, values):
    fitted(rank, "squares", 2, **{option: values[rank]})


@pytest.mark.parametrize(
    ("option", "values", "rule"),
    [
        ("max_updates", [3, 4], "max_updates must be the same on all ranks; got 3 on rank 0, 4"),
        ("ftol", [None, 1e-8], "ftol must be the same on all ranks; got None on rank 0, 1e-08"),
        ("bounds", [None, (-9.0, 9.0)], "bounds must be the same on all ranks; got None on rank 0"),
        ("max_updates", [3, 0], "rank 1: max_updates must be an integer ≥ 1"),
        ("progress", [False, 1], "rank 1: progress must be True or False"),
    ],
)
def test_limits_that_differ_are_refused_on_all(option, values, rule, two):
    outcomes = two.run(different, option, values)
    assert_all_raise(outcomes, "BadType" if option == "progress" else "BadValue", "fit: ", rule)


def branching(p, x):
    """A model whose layers are found on the first rank alone."""
    outputs = curve(p, x)
    if (
        distributed.is_initialized()
        and distributed.get_rank()
        and float(outputs.detach().sum()) > 1e9
    ):
        return -outputs
    return outputs


def traced(rank, size, model_fn=branching):
    """A fit that searches for layers, as that of a larger model does."""
    _, p, X, y, criterion = squares(rank, size)
    always = mock.patch.object(fitted_model, "LEAST_FLOPS_TO_TRACE", 0.0)
    with always, mock.patch("ddnewton.optim.modules.is_tiny", return_value=False):
        return fit(model_fn, p, X, y, criterion, process_group=group_of(size), max_updates=2)


def test_layers_that_one_rank_has_not_found_are_used_by_none(two):
    outcomes = two.run(traced, 2)
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert_same_bits([outcome.value for outcome in outcomes])
    assert_close(outcomes[0].value.params, traced(0, 1, curve).params, 1e-11)
    # The first rank says so, though it is another one that has none.
    (warning,) = outcomes[0].warnings
    assert warning.startswith("UserWarning: the layers of the model are not found")
    assert outcomes[1].warnings == ()


def counted(p, x):
    """A model that is never called on nothing."""
    assert len(x) > 0
    return curve(p, x)


def test_a_rank_without_samples_looks_for_no_layers(four):
    results = four.results(traced, 4, counted)
    assert_same_bits(results)
    assert_close(results[0].params, traced(0, 1, curve).params, 1e-11)


def test_seconds_are_those_of_an_update():
    """The clock of an update runs until its result is known."""
    started = time.monotonic()
    result = fitted(0, "squares", 1)
    assert 0 < float(result.history.seconds.sum()) <= time.monotonic() - started
