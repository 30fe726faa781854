"""What goes wrong on one rank is raised on all, at once, and the group goes on."""

import re

import pytest

import ddnewton
from tests.distributed.exact_cases import perceptron
from tests.distributed.failing_cases import (
    FAILURES,
    by_groups,
    constant_rules,
    ends,
    failed_then_right,
    interrupt,
    of_two,
    one_asks_for_more,
    refused,
    whole_step,
)


@pytest.fixture(scope="module")
def right_step(four):
    (step,) = set(four.results(whole_step))
    return step


def at_once(told, pool):
    """Whether ranks have raised without waiting until a transfer is given up."""
    return max(of_rank.seconds for of_rank in told) < pool.group_seconds / 4


@pytest.mark.parametrize("name", list(FAILURES))
def test_all_ranks_raise_what_one_does(four, right_step, name):
    told = four.results(failed_then_right, name)
    kinds = {(of_rank.kind, of_rank.message) for of_rank in told}
    assert len(kinds) == 1, kinds
    ((kind, message),) = kinds
    assert kind == FAILURES[name].kind, message
    assert re.search(FAILURES[name].words, message), message
    assert at_once(told, four)
    assert {of_rank.step for of_rank in told} == {right_step}


@pytest.mark.parametrize(
    ("name", "culprit", "words"),
    [("forward", 2, "LookupError: no way on"), ("in the ring", 1, "columns/ring.py")],
    ids=["forward", "ring"],
)
def test_the_rank_that_fails_has_the_cause(four, name, culprit, words):
    causes = [of_rank.cause for of_rank in four.results(failed_then_right, name)]
    assert words in causes[culprit]
    assert [cause for rank, cause in enumerate(causes) if rank != culprit] == [""] * 3


@pytest.mark.parametrize("culprit", [0, 3])
def test_an_interrupt_of_a_model_ends_the_call_everywhere(four, right_step, culprit):
    told = four.results(interrupt, culprit, "model")
    kinds = ["RankError"] * 4
    kinds[culprit] = "KeyboardInterrupt"
    assert [of_rank.kind for of_rank in told] == kinds
    messages = {of_rank.message for of_rank in told if of_rank.kind == "RankError"}
    assert messages == {f"rank {culprit}: KeyboardInterrupt: "}
    assert at_once(told, four)
    assert {of_rank.step for of_rank in told} == {right_step}


def test_an_interrupt_of_a_rule_ends_the_call_everywhere(four, right_step):
    told = four.results(interrupt, 0, "rule")
    assert [of_rank.kind for of_rank in told] == ["KeyboardInterrupt", *["RankError"] * 3]
    assert {of_rank.message for of_rank in told[1:]} == {"rank 0: KeyboardInterrupt: "}
    assert at_once(told, four)
    assert {of_rank.step for of_rank in told} == {right_step}


def test_all_ranks_must_call_the_same_function(four, right_step):
    told = four.results(one_asks_for_more)
    rule = "rank 3: all ranks must call the same function; got steps on rank 0, steps_and_infos"
    assert all(rule in of_rank.message for of_rank in told)
    assert at_once(told, four)
    assert {of_rank.step for of_rank in told} == {right_step}


@pytest.mark.parametrize("culprit", [0, 1])
def test_no_step_is_returned_where_a_rank_ends(disposable, culprit):
    pool = disposable(4, group_seconds=2.0)
    outcomes = pool.run(ends, culprit)
    assert outcomes[culprit].error[0] == "Dead"
    assert all(outcome.error is not None for outcome in outcomes)
    assert all(outcome.error[0] != "Timeout" for outcome in outcomes)


def test_groups_that_are_none_are_refused_by_name(four):
    for messages in four.results(refused):
        number, mesh, outside, mapped, compiled = messages
        assert number.startswith("BadType: newton_step: process_group must be a ProcessGroup"), (
            number
        )
        assert "got int" in number
        assert "a mesh of 2 axes" in mesh
        assert "mesh['dp']" in mesh
        assert "a group that this rank is not in" in outside
        assert "process_group must be outside of torch.func and torch.compile" in mapped
        assert "process_group must be outside of torch.func and torch.compile" in compiled


def test_a_process_without_a_group_is_told_how_to_make_one():
    with pytest.raises(
        ValueError,
        match=r"^newton_step: process_group needs torch.distributed; got no init.* torchrun",
    ):
        ddnewton.newton_step(*perceptron()[:6], process_group=3)


def test_parts_of_the_ranks_make_steps_of_their_own(four, two, right_step):
    (of_half,) = set(two.results(of_two))
    by_rank = four.results(by_groups)
    assert [steps["group"] for steps in by_rank] == [None, of_half, None, of_half]
    assert {steps["axis"] for steps in by_rank} == {of_half}
    assert {steps["mesh"] for steps in by_rank} == {right_step}
    assert {steps["world"] for steps in by_rank} == {right_step}
    assert len({steps["none"] for steps in by_rank}) == 1


def test_functions_are_compared_by_their_names(four):
    assert len(set(four.results(constant_rules))) == 1
