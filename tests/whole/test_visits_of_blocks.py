"""However many blocks there are, the model is visited as often as for one."""

from collections.abc import Callable

import pytest

from ddnewton import (
    Group,
    directional_derivatives,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    newton_step,
    newton_step_and_info,
    per_layer,
    per_parameter,
    top_k,
)
from ddnewton.linearize import by_program
from tests.whole.blocks import DELTA, by, problem


def functions(damping=DELTA) -> dict[str, Callable]:
    return {
        "newton_step": lambda *a, **o: newton_step(*a, damping, **o),
        "newton_step, top": lambda *a, **o: newton_step(*a, damping, select=top_k(2), **o),
        "newton_step_and_info": lambda *a, **o: newton_step_and_info(*a, damping, **o),
        "ggn_eigvalsh": ggn_eigvalsh,
        "ggn_eigh": ggn_eigh,
        "directional_derivatives": directional_derivatives,
        "gram_matrix": gram_matrix,
    }


@pytest.fixture
def visits(monkeypatch):
    """How often a program is visited."""
    count = []
    plain = by_program.visit

    def counting(*arguments):
        count.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(by_program, "visit", counting)

    def of(function, *arguments, **options) -> int:
        count.clear()
        function(*arguments, **options)
        return len(count)

    return of


@pytest.mark.parametrize("function", functions())
def test_a_prepared_model_is_visited_once_for_all_blocks(function, visits):
    made = by("structured", "convolution")
    for groups in (None, [Group("0")], per_layer(made.params), per_parameter(made.params)):
        assert visits(functions()[function], *made, groups=groups) == 1


@pytest.mark.parametrize("function", functions())
def test_a_model_is_called_no_more_often_for_several_blocks(function):
    made = problem("relu_mlp")
    calls = []

    def counting(params, X):
        calls.append(X)
        return made.model_fn(params, X)

    counts = []
    for groups in (None, per_layer(made.params), per_parameter(made.params)):
        calls.clear()
        arguments = made._replace(model_fn=counting)
        functions()[function](*arguments, groups=groups, gram="dense")
        counts.append(len(calls))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("function", ["ggn_eigvalsh", "gram_matrix", "directional_derivatives"])
def test_several_chunks_are_paired_in_one_sweep_for_all_blocks(function, visits):
    """What needs no lift from Gram coordinates to parameters needs no second sweep."""
    made = by("structured", "convolution")
    large = [Group("0.weight"), Group("3.weight")]
    options = {"chunk_size": 2}
    one = visits(functions()[function], *made, groups=large[:1], **options)
    assert visits(functions()[function], *made, groups=large, **options) == one


def test_a_step_in_several_chunks_keeps_what_it_has_visited(visits):
    made = by("structured", "convolution")
    options = {"chunk_size": 2}
    large = [Group(path) for path in ("0.weight", "3.weight")]  # on the side of the columns
    products, one, two = (
        visits(function, *made, *damping, groups=groups, **options)
        for function, damping, groups in [
            (gram_matrix, [], large),
            (newton_step, [DELTA], large[:1]),
            (newton_step, [DELTA], large),
        ]
    )
    assert products == one == two
