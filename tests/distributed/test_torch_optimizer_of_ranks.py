"""The optimizer for modules on several ranks: steps, wrapped modules, refusals, checkpoints."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ddnewton import as_function, held_out, levenberg_marquardt, monte_carlo, spring
from ddnewton.optim import DirectionalNewton
from tests.distributed.split_problems import (
    assert_all_raise,
    assert_close,
    assert_same_bits,
    group_of,
    inputs,
    labels,
    net,
    own,
    targets,
)

STEPS = 3


def drawn():
    return monte_carlo(nn.CrossEntropyLoss(), 2, torch.Generator().manual_seed(4))


def groups(module):
    return [
        {"params": module[0].parameters(), "lr": 0.5},
        {"params": module[2].parameters(), "weight_decay": 0.1, "damping": 0.2},
    ]


CASES = {
    "trust region": lambda module: {"criterion": nn.MSELoss()},
    "layers": lambda module: {
        "criterion": nn.MSELoss(),
        "damping": levenberg_marquardt(),
        "gram": "structured",
    },
    "held out and drawn": lambda module: {"criterion": drawn(), "damping": held_out(every=2)},
    "momentum": lambda module: {
        "criterion": nn.CrossEntropyLoss(),
        "damping": spring(),
        "momentum": 0.5,
    },
    "groups": lambda module: {
        "criterion": nn.MSELoss(),
        "damping": 0.01,
        "params": groups(module),
    },
}


def optimizer_of(name, module, size):
    return DirectionalNewton(module, process_group=group_of(size), **CASES[name](module))


def batch_of(name, rank, size):
    y = labels() if name in ("held out and drawn", "momentum") else targets()
    return own(inputs(), rank, size), own(y, rank, size)


def everything(module, optimizer):
    """All that a step changes, as it is now."""
    saved = module.state_dict(), optimizer.state_dict()
    return copy.deepcopy(saved)


def stepped(rank, name, size, count=STEPS):
    """Some steps: all that there is after each of them, and their losses."""
    module = net()
    optimizer, (X, y) = optimizer_of(name, module, size), batch_of(name, rank, size)
    losses, after = [], []
    for _ in range(count):
        losses.append(optimizer.step(X, y))
        after.append(everything(module, optimizer))
    assert all(p.grad is None for p in module.parameters())
    return losses, after


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_whole_batch(name, four):
    results = four.results(stepped, name, 4)
    assert_same_bits(results)
    assert_close(results[0], stepped(0, name, 1), 1e-9)


class Calls:
    """What torch calls where gradients are accumulated or exchanged."""

    def __init__(self):
        self.count = 0

    def of_gradient(self, p):
        self.count += 1

    def of_bucket(self, state, bucket):
        self.count += 1
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def wrapped(rank, size):
    """Steps of a module in DistributedDataParallel, and how many of its hooks were called."""
    module, calls = net(), Calls()
    parallel = nn.parallel.DistributedDataParallel(module)
    parallel.register_comm_hook(None, calls.of_bucket)
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(calls.of_gradient)
    optimizer = DirectionalNewton(parallel, nn.MSELoss(), process_group=parallel.process_group)
    X, y = own(inputs(), rank, size), own(targets(), rank, size)
    losses = [optimizer.step(X, y) for _ in range(STEPS)]
    outputs = parallel(X)
    count = calls.count
    # The hooks are called where they are to be.
    outputs.sum().backward()
    return losses, module.state_dict(), count, calls.count > count


def test_a_wrapped_module_is_trained_and_its_hooks_are_not_called(two):
    outcomes = two.run(wrapped, 2)
    assert [(outcome.error, outcome.warnings) for outcome in outcomes] == [(None, ())] * 2
    assert_same_bits([outcome.value for outcome in outcomes])
    losses, parameters, during, after = outcomes[0].value
    assert (during, after) == (0, True)
    expected, states = stepped(0, "trust region", 1)
    assert_close(losses, expected)
    assert_close(parameters, states[-1][0], 1e-10)


def without_group(rank):
    parallel = nn.parallel.DistributedDataParallel(net())
    as_function(parallel)
    DirectionalNewton(parallel, nn.MSELoss())


def test_a_wrapped_module_without_a_group_is_warned_of(two):
    for outcome in two.run(without_group):
        assert outcome.error is None
        assert len(outcome.warnings) == 2
        for warning in outcome.warnings:
            assert "nothing is exchanged with other processes by the module" in warning


class Counted(nn.Module):
    """A module that fails on nothing, and whose layers some ranks cannot find."""

    def __init__(self, branching_ranks=()):
        super().__init__()
        self.inner = net()
        self.branches = distributed.is_initialized() and distributed.get_rank() in branching_ranks

    def forward(self, X):
        if len(X) == 0:
            raise AssertionError("called on nothing")
        outputs = self.inner(X)
        return -outputs if self.branches and float(outputs.detach().sum()) > 1e9 else outputs


def looked_through(rank, size, gram, branching_ranks=()):
    """Steps of a module whose layers are searched for in the first of them."""
    module = Counted(branching_ranks)
    options = {"gram": gram, "process_group": group_of(size)}
    optimizer = DirectionalNewton(module, nn.MSELoss(), 0.01, **options)
    X, y = own(inputs(), rank, size), own(targets(), rank, size)
    with mock.patch("ddnewton.optim.modules.is_tiny", return_value=False):
        losses = [optimizer.step(X, y) for _ in range(STEPS)]
    return losses, module.state_dict()


@pytest.mark.parametrize("gram", ["auto", "structured", "dense"])
def test_a_rank_without_samples_does_not_call_the_module(gram, four):
    results = four.results(looked_through, 4, gram)
    assert_same_bits(results)
    assert_close(results[0], looked_through(0, 1, gram), 1e-11)


def test_layers_that_one_rank_has_not_found_are_used_by_none(two):
    outcomes = two.run(looked_through, 2, "auto", (1,))
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert_same_bits([outcome.value for outcome in outcomes])
    assert_close(outcomes[0].value, looked_through(0, 1, "auto"), 1e-11)
    (warning,) = outcomes[0].warnings
    assert warning.startswith("UserWarning: the layers of the model are not found")
    assert outcomes[1].warnings == ()


def moving_samples(rank, size):
    """Steps on batches that are all on the one rank, and then all on the other."""
    module = net()
    options = {"gram": "structured", "process_group": group_of(size)}
    optimizer = DirectionalNewton(module, nn.MSELoss(), 0.01, **options)
    losses = []
    for t in range(4):
        X, y = inputs()[t:], targets()[t:]
        if size > 1 and rank != t % size:
            X, y = X[:0], y[:0]
        losses.append(optimizer.step(X, y))
    return losses, module.state_dict()


def test_every_rank_may_have_all_samples(two):
    results = two.results(moving_samples, 2)
    assert_same_bits(results)
    assert_close(results[0], moving_samples(0, 1), 1e-11)


def no_batch():
    raise LookupError("no batch")


def refused(rank, kind):
    """What a refused step has changed, and its error."""
    module = net()
    optimizer = optimizer_of("held out and drawn", module, 2)
    X, y = own(inputs(), rank, 2), own(labels(), rank, 2)
    optimizer.step(X, y)
    before = everything(module, optimizer)
    if rank == 1:
        X, y = {"targets": (X, y[1:]), "nan": (X * torch.nan, y), "closure": (no_batch, None)}[kind]
    with pytest.raises((RuntimeError, ValueError)) as refusal:
        optimizer.step(X, y)
    assert_same_bits([before, everything(module, optimizer)])
    # All ranks are ready for the next step.
    optimizer.step(own(inputs(), rank, 2), own(labels(), rank, 2))
    return refusal.type.__name__, str(refusal.value), everything(module, optimizer)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("targets", "BadValue", "rank 1: X and y must hold the same number"),
        ("nan", "NotFinite", "rank 1: the outputs of model_fn must be finite"),
        ("closure", "RankError", "rank 1: LookupError: no batch"),
    ],
)
def test_what_fails_on_one_rank_changes_nothing_on_any(kind, name, message, two):
    results = two.results(refused, kind)
    assert_same_bits(results)
    assert results[0][0] == name
    assert message in results[0][1]
    # The next step is the second one, as if there had been no other.
    assert_close(results[0][2], stepped(0, "held out and drawn", 1, 2)[1][-1], 1e-9)


def of_other_parameters(rank):
    module = net(rank)
    optimizer = optimizer_of("trust region", module, 2)
    optimizer.step(own(inputs(), rank, 2), own(targets(), rank, 2))


def test_modules_that_differ_are_refused(two):
    rule = "params['0.weight'] must be the same on all ranks; got other values on rank 1"
    assert_all_raise(two.run(of_other_parameters), "BadValue", rule, "Broadcast from rank 0")


def copied(rank):
    """Steps of a copy; and how a pickle is refused."""
    module = net()
    optimizer = optimizer_of("trust region", module, 2)
    twin, copy_of_optimizer = copy.deepcopy((module, optimizer))
    batch = own(inputs(), rank, 2), own(targets(), rank, 2)
    losses = optimizer.step(*batch), copy_of_optimizer.step(*batch)
    assert_same_bits([module.state_dict(), twin.state_dict()])
    assert torch.equal(*losses)
    pickle.dumps(optimizer)


def test_copies_share_the_group_and_a_pickle_refuses_it(two):
    rule = "an optimizer that is pickled must have no process_group; got ProcessGroup"
    assert_all_raise(two.run(copied), "BadType", rule)


# --- checkpoints ------------------------------------------------------------------------------


def saved_by_the_first(rank, module, optimizer, folder):
    if rank == 0:
        torch.save((module.state_dict(), optimizer.state_dict()), f"{folder}/checkpoint")


def loaded_from_a_file(module, optimizer, folder):
    of_module, of_optimizer = torch.load(f"{folder}/checkpoint")
    module.load_state_dict(of_module)
    optimizer.load_state_dict(of_optimizer)


def saved_together(rank, module, optimizer, folder):
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=f"{folder}/checkpoint")


def loaded_together(module, optimizer, folder):
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])


def saved_by_names(rank, module, optimizer, folder):
    state = {"optimizer": get_optimizer_state_dict(module, optimizer)}
    state |= {"module": module.state_dict()}
    dcp.save(state, checkpoint_id=f"{folder}/checkpoint")


def loaded_by_names(module, optimizer, folder):
    state = {"optimizer": get_optimizer_state_dict(module, optimizer)}
    state |= {"module": module.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    module.load_state_dict(state["module"])
    set_optimizer_state_dict(module, optimizer, state["optimizer"])


WAYS = {
    "a file": (saved_by_the_first, loaded_from_a_file),
    "together": (saved_together, loaded_together),
    "by names": (saved_by_names, loaded_by_names),
}


def part_of_run(rank, name, way, size, folder, first):
    """Two steps of a run, from its start or from where it was saved."""
    save, load = WAYS[way]
    module = net(7 if first else 8)
    optimizer, (X, y) = optimizer_of(name, module, size), batch_of(name, rank, size)
    if not first:
        load(module, optimizer, folder)
    for _ in range(2):
        optimizer.step(X, y)
    save(rank, module, optimizer, folder)
    return everything(module, optimizer)


RUNS = [
    ("trust region", "a file"),
    ("trust region", "together"),
    ("held out and drawn", "a file"),
    ("held out and drawn", "together"),
    ("groups", "together"),
    ("momentum", "by names"),
]


@pytest.mark.parametrize(("name", "way"), RUNS)
def test_a_saved_run_goes_on_with_fewer_ranks(name, way, one, two, four, tmp_path):
    folder = str(tmp_path)
    four.results(part_of_run, name, way, 4, folder, True)
    assert_same_bits(two.results(part_of_run, name, way, 2, folder, False))
    (last,) = one.results(part_of_run, name, way, 1, folder, False)
    assert_close(last, stepped(0, name, 1, 6)[1][-1], 1e-8)
