"""The pools that the other tests of several processes are run in do what those tests rely on."""

import os
import signal
import sys
import threading
import time
import warnings

import pytest
import torch
from torch import distributed

from tests.distributed.pool import Pool


def summed(rank, factor=1.0):
    """Sum what differs from rank to rank."""
    total = torch.tensor([rank + 1.0, 10.0 * rank], dtype=torch.float64) * factor
    distributed.all_reduce(total)
    return total


def of_rank(rank, *args):
    return (rank, *args)


def tensors(rank):
    generator = torch.Generator().manual_seed(rank)
    return {
        "double": torch.randn(3, 2, dtype=torch.float64, generator=generator),
        "column": torch.randn(300, 2, generator=generator)[:, 1],
        "complex": torch.randn(2, dtype=torch.complex64, generator=generator),
        "integers": torch.arange(4),
    }


def shapes_of(rank, tensor):
    return tensor.mean(), tensor.shape, tensor.dtype


def random_numbers(rank):
    return torch.rand(2)


def raises_on(rank, culprit):
    if rank == culprit:
        raise ValueError(f"nothing on rank {rank}")
    return rank


def raises_before_sum(rank, culprit):
    if rank == culprit:
        raise KeyError("absent")
    return summed(rank)


def ends_on(rank, culprit, code):
    if rank == culprit:
        os.write(1, b"last words, ")
        os.write(2, b"and an error")
        os._exit(code)
    return rank


def crashes_on(rank, culprit):
    if rank == culprit:
        os.kill(os.getpid(), signal.SIGSEGV)
    return rank


def hangs_on(rank, culprit):
    if rank == culprit:
        # Nothing but SIGKILL ends it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    return rank


def exits(rank):
    sys.exit(f"rank {rank} leaves")


def not_pickled(rank):
    return threading.Lock()


def warns(rank):
    warnings.warn(f"beware of {rank}", UserWarning, stacklevel=1)
    return rank


def surroundings(rank):
    group = distributed.group.WORLD
    return (
        distributed.get_rank(),
        distributed.get_world_size(),
        distributed.get_backend(group),
        torch.get_num_threads(),
        os.environ["OMP_NUM_THREADS"],
        os.getpid(),
    )


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("name", ["one", "two", "four"])
def test_ranks_sum_together(name, request):
    pool = request.getfixturevalue(name)
    size = pool.size
    total = torch.tensor([size * (size + 1) / 2, 10 * size * (size - 1) / 2], dtype=torch.float64)
    totals = pool.results(summed, 0.5)
    assert len(totals) == size
    assert all(torch.equal(computed, 0.5 * total) for computed in totals)


def test_ranks_are_long_lived_processes_of_one_thread(four):
    first, second = four.results(surroundings), four.results(surroundings)
    assert first == second
    assert [row[:5] for row in first] == [(rank, 4, "gloo", 1, "1") for rank in range(4)]
    processes = [row[5] for row in first]
    assert processes == four.processes
    assert len({os.getpid(), *processes}) == 5


def test_each_rank_has_arguments_of_its_own(two):
    assert two.results(of_rank) == [(0,), (1,)]
    assert two.results(of_rank, "a", each=[("b", 1), ()]) == [(0, "a", "b", 1), (1, "a")]
    with pytest.raises(ValueError, match="each has 3 entries for 2 ranks"):
        two.run(of_rank, each=[(), (), ()])


def test_tensors_come_back_the_same(two):
    for rank, values in enumerate(two.results(tensors)):
        references = tensors(rank)
        assert values.keys() == references.keys()
        for name, reference in references.items():
            assert values[name].dtype == reference.dtype
            assert torch.equal(values[name], reference)


def test_tensors_arrive_the_same(two):
    samples = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)
    values = two.results(shapes_of, each=[(samples[:2],), (samples[2:],)])
    assert values == [(1.5, (2, 2), torch.float64), (6.5, (3, 2), torch.float64)]


def test_many_bytes_go_both_ways(two):
    large = torch.arange(1_000_000.0)
    for rank, (number, copy) in enumerate(two.results(of_rank, large)):
        assert number == rank
        assert torch.equal(copy, large)


def test_tasks_start_from_the_same_random_numbers(two):
    values = [*two.results(random_numbers), *two.results(random_numbers)]
    assert all(torch.equal(value, values[0]) for value in values)


def test_an_exception_is_told_and_the_ranks_work_on(four):
    four.results(of_rank)
    processes = four.processes
    outcomes = four.run(raises_on, 2)
    assert [outcome.value for outcome in outcomes] == [0, 1, None, 3]
    assert [outcome.error for outcome in outcomes] == [
        None,
        None,
        ("ValueError", "nothing on rank 2"),
        None,
    ]
    assert "in raises_on" in outcomes[2].traceback
    with pytest.raises(AssertionError, match=r"(?s)^rank 2 of 4: ValueError: .*in raises_on"):
        four.results(raises_on, 2)
    assert torch.equal(four.results(summed)[3], torch.tensor([10.0, 60.0], dtype=torch.float64))
    assert four.processes == processes


def test_a_pending_collective_is_given_up_and_concerns_no_other_task(disposable):
    pool = disposable(2, group_seconds=1.0)
    waiting, raising = pool.run(raises_before_sum, 1)
    assert raising.error == ("KeyError", "'absent'")
    assert waiting.error is not None
    assert "imeout" in waiting.error[1] or "imed out" in waiting.error[1]
    processes = pool.processes
    assert torch.equal(pool.results(summed)[0], torch.tensor([3.0, 10.0], dtype=torch.float64))
    assert pool.processes == processes


def test_an_exit_is_told_and_the_ranks_work_on(two):
    assert [outcome.error for outcome in two.run(exits)] == [
        ("SystemExit", "rank 0 leaves"),
        ("SystemExit", "rank 1 leaves"),
    ]
    assert two.results(of_rank) == [(0,), (1,)]


def test_what_cannot_be_pickled_is_told(two):
    assert [outcome.error[0] for outcome in two.run(not_pickled)] == ["TypeError", "TypeError"]
    with pytest.raises(TypeError, match="pickle"):
        two.run(of_rank, each=[(), (threading.Lock(),)])
    assert two.results(of_rank) == [(0,), (1,)]


def test_warnings_come_with_the_outcomes(two):
    outcomes = two.run(warns)
    assert [outcome.warnings for outcome in outcomes] == [
        ("UserWarning: beware of 0",),
        ("UserWarning: beware of 1",),
    ]
    assert two.run(of_rank)[0].warnings == ()


@pytest.mark.parametrize(
    ("function", "args", "code", "words"),
    [(ends_on, (7,), 7, "last words, and an error"), (crashes_on, (), -11, "in crashes_on")],
    ids=["exit", "crash"],
)
def test_a_process_that_ends_is_told_and_replaced(disposable, function, args, code, words):
    pool = disposable(2)
    survivor, dead = pool.run(function, 1, *args)
    assert survivor[:2] == (0, None)
    assert dead.error == ("Dead", f"the process ended with exit code {code}")
    assert words in dead.traceback
    assert torch.equal(pool.results(summed)[1], torch.tensor([3.0, 10.0], dtype=torch.float64))


def test_a_process_killed_between_tasks_is_replaced(disposable):
    pool = disposable(2)
    pool.results(of_rank)
    processes = pool.processes
    os.kill(processes[0], signal.SIGKILL)
    while is_running(processes[0]):
        time.sleep(0.01)
    assert torch.equal(pool.results(summed)[1], torch.tensor([3.0, 10.0], dtype=torch.float64))
    assert not set(processes) & set(pool.processes)
    assert not is_running(processes[1])


def test_a_process_that_does_not_answer_is_told_and_replaced(disposable):
    pool = disposable(2)
    pool.results(of_rank)
    processes = pool.processes
    answering, hanging = pool.run(hangs_on, 1, timeout=1.0)
    assert answering[:2] == (0, None)
    assert hanging.error[0] == "Timeout"
    assert "in hangs_on" in hanging.traceback
    assert not any(is_running(process) for process in processes)
    assert torch.equal(pool.results(summed)[1], torch.tensor([3.0, 10.0], dtype=torch.float64))


def test_processes_end_with_their_pool():
    with Pool(2) as pool:
        assert pool.processes == []
        pool.results(of_rank)
        processes = pool.processes
        assert all(is_running(process) for process in processes)
    assert pool.processes == []
    assert not any(is_running(process) for process in processes)
