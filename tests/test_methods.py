"""The tables of all methods are complete: what is public is in them, and so in every suite."""

import inspect

import pytest

import ddnewton
from ddnewton import criteria, damping
from tests import methods
from tests.criteria import test_losses, test_monte_carlo


def functions_of(module, names, home: str) -> set:
    """The functions among some public names that are written in a module or a folder."""
    functions = {one for name in names if inspect.isfunction(one := getattr(module, name))}
    return {one for one in functions if f"{one.__module__}.".startswith(f"{home}.")}


def entered(table) -> set:
    return {method.function for method in table.values()} - {None}


def makers(module) -> list[str]:
    """The public names of a module, but for two that work on rules that there are."""
    return [name for name in vars(module) if not name.startswith(("_", "as_", "check_"))]


@pytest.mark.parametrize(
    ("table", "module", "names", "home"),
    [
        (methods.ADAPTATIONS, ddnewton, ddnewton.__all__, "ddnewton.optim.adaptation"),
        (methods.RULES, damping, makers(damping), "ddnewton.damping"),
        (methods.SELECTIONS, ddnewton, ddnewton.__all__, "ddnewton.select"),
    ],
    ids=["adaptations", "rules", "selections"],
)
def test_all_that_is_public_is_in_the_table(table, module, names, home):
    expected = functions_of(module, names, home)
    assert expected
    assert entered(table) == expected


def test_all_losses_are_in_the_tables():
    """A loss takes a reduction, and what makes one of another's takes a criterion and is public."""
    losses, wrappers = set(), set()
    for name in criteria.__all__:
        function = getattr(criteria, name)
        arguments = inspect.signature(function).parameters if inspect.isfunction(function) else ()
        if "reduction" in arguments:
            losses.add(function)
        elif "criterion" in arguments and function is not criteria.as_loss:
            wrappers.add(function)
    of_torch = {loss.record for loss in methods.TORCH_LOSSES.values()}
    assert of_torch | set(methods.OWN_LOSSES) == losses
    assert entered(methods.CURVATURES | methods.OF_RESIDUALS) == wrappers


def test_all_losses_have_cases_of_their_options():
    functions = {loss.function for loss in methods.TORCH_LOSSES.values()}
    assert {case.function for case in test_losses.CASES.values()} == functions
    drawn = {name for name, loss in methods.TORCH_LOSSES.items() if loss.draws}
    assert drawn <= set(test_monte_carlo.LIKELIHOODS)
    assert set(methods.TORCH_LOSSES) <= set(test_monte_carlo.FISHERS)
