"""What goes wrong on one rank of several, and what all of them come to."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import ddnewton
from ddnewton import Group, monte_carlo, top_k
from ddnewton.damping import constant, relative
from tests.distributed.exact_cases import Case, digest, flat, mlp, of_rank, perceptron, terms

COUNTS = [2, 4, 1, 4]
TERM_COUNTS = {"inside": [2, 2, 2, 2], "edge": [1, 1, 0, 3]}


class Told(NamedTuple):
    """An error as a rank has raised it, and the hash of a step that was made afterwards."""

    kind: str
    message: str
    cause: str
    seconds: float
    step: str | None


class Failure(NamedTuple):
    """What is passed on a rank, and what all ranks raise: its kind, and words of its message."""

    passed: Callable[[Case, int], Case]
    kind: str
    words: str
    culprit: int | None = 2  # None for all ranks: none is named
    of_terms: bool = False


def step_of(case: Case, group: Any) -> str:
    """A hash of a step."""
    step = ddnewton.newton_step(*case[:6], **case.options, process_group=group)
    return digest({"step": flat(step)})


def whole_step(rank: int) -> str:
    return step_of(of_rank(perceptron(), rank, COUNTS), distributed.group.WORLD)


def failed_then_right(rank: int, name: str) -> Told:
    """What a rank raises, and the right step that the same group makes after that."""
    failure = FAILURES[name]
    case, counts = (terms(), TERM_COUNTS) if failure.of_terms else (perceptron(), COUNTS)
    case = of_rank(case, rank, counts)
    if failure.culprit in (None, rank):
        case = failure.passed(case, rank)
    started = time.perf_counter()
    try:
        step_of(case, distributed.group.WORLD)
    except BaseException as error:  # noqa: BLE001 - whatever it is, ranks are to agree
        seconds = time.perf_counter() - started
        cause = "".join(traceback.format_exception(error.__cause__)) if error.__cause__ else ""
        return Told(type(error).__name__, str(error), cause, seconds, whole_step(rank))
    raise AssertionError("nothing was raised")


# --- models and rules that fail -----------------------------------------------------------------


class Backward(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("no way back")


def forward(params: Any, X: Tensor) -> Tensor:
    raise LookupError("no way on")


def backward(params: Any, X: Tensor) -> Tensor:
    return Backward.apply(mlp(params, X))


class InLaterVisits:
    """A model that fails from a number of calls on, as one that has run out of memory does."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, params: Any, X: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise MemoryError("no more")
        return mlp(params, X)


def interrupted(*arguments: Tensor) -> Tensor:
    raise KeyboardInterrupt


def interrupted_model(params: Any, X: Tensor) -> Tensor:
    raise KeyboardInterrupt


def no_rule(*arguments: Tensor) -> Tensor:
    raise ZeroDivisionError("no damping")


def of_another_shape(*arguments: Tensor) -> Tensor:
    return torch.ones(3)


def moved(case: Case, leaf: str) -> Case:
    return case._replace(params=case.params | {leaf: case.params[leaf] + 1e-9})


def option(**options: Any) -> Callable[[Case, int], Case]:
    return lambda case, _: case._replace(options={**case.options, **options})


def field(**fields: Any) -> Callable[[Case, int], Case]:
    return lambda case, _: case._replace(**fields)


def drawn(case: Case, rank: int) -> Case:
    generator = torch.Generator().manual_seed(rank)
    return case._replace(criterion=monte_carlo(nn.CrossEntropyLoss(), 1, generator))


def relative_to_rank(case: Case, rank: int) -> Case:
    return case._replace(damping=relative(0.2 if rank == 2 else 0.1))


def not_finite(case: Case, rank: int) -> Case:
    return case._replace(X=case.X * torch.nan)


def nothing(case: Case, rank: int) -> Case:
    return case._replace(X=case.X[:0], y=case.y[:0])


def two_outputs(params: Any, X: Tensor) -> Tensor:
    return mlp(params, X)[:, :2]


def without_edge(case: Case, rank: int) -> Case:
    parts = ({"inside": tree["inside"]} for tree in (case.model_fn, case.X, case.y))
    model_fn, X, y = parts
    return case._replace(model_fn=model_fn, X=X, y=y, criterion=nn.MSELoss())


def without_key(case: Case, rank: int) -> Case:
    return case._replace(X={"inside": case.X["inside"]})


def in_one_chunk(case: Case, model_fn: Any) -> Case:
    return case._replace(model_fn=model_fn, options={"gram": "dense", "chunk_size": 1})


def fails_in_visit(case: Case, rank: int) -> Case:
    """Chunks of one sample; on the culprit those fail that others wait for in the ring."""
    return in_one_chunk(case, InLaterVisits(LATER) if rank == 1 else mlp)


LATER = 7

FAILURES = {
    "X of another width": Failure(
        lambda case, _: case._replace(X=case.X[:, :2]),
        "RankError",
        "rank 2: RuntimeError: .*mat1 and mat2",
    ),
    "X of another dtype": Failure(
        lambda case, _: case._replace(X=case.X.float()),
        "RankError",
        "rank 2: RuntimeError: .*dtype",
    ),
    "nan in X": Failure(not_finite, "NotFinite", "rank 2: the outputs of model_fn must be finite"),
    "nan in X of the leader": Failure(
        not_finite, "NotFinite", "newton_step: rank 0: the outputs", culprit=0
    ),
    "more targets than inputs": Failure(
        lambda case, _: case._replace(X=case.X[:0]),
        "BadValue",
        "newton_step: rank 2: X and y must hold the same number",
    ),
    "no tensor": Failure(field(X=3), "BadType", "rank 2: X and y must be tensors"),
    "targets of another dtype": Failure(
        lambda case, _: case._replace(y=case.y.int()),
        "BadValue",
        "targets of a sample must .*; got rank 0: y .. torch.int64; rank 2: y .. torch.int32",
    ),
    "targets of another shape": Failure(
        lambda case, _: case._replace(y=case.y[:, None]),
        "BadValue",
        "the targets of a sample .*rank 2: y .1.",
    ),
    "no such class": Failure(
        lambda case, _: case._replace(y=case.y + 9), "BadValue", "newton_step: .*class"
    ),
    "no samples": Failure(
        nothing,
        "BadValue",
        "X and y must hold at least one sample on one of the ranks; got none",
        culprit=None,
    ),
    "forward": Failure(field(model_fn=forward), "RankError", "rank 2: LookupError: no way on"),
    "forward of the leader": Failure(
        field(model_fn=forward), "RankError", "rank 0: LookupError: no way on", culprit=0
    ),
    "forward everywhere": Failure(
        field(model_fn=forward), "RankError", "^LookupError: no way on", culprit=None
    ),
    "backward": Failure(
        field(model_fn=backward),
        "BadValue",
        "rank 2: model_fn must be differentiable .*ArithmeticError no way back",
    ),
    "other outputs": Failure(
        field(model_fn=two_outputs),
        "BadValue",
        "the outputs of a sample must have .*; got rank 0: .4. .*rank 2: .2.",
    ),
    "in the ring": Failure(
        fails_in_visit, "RankError", "rank 1: MemoryError: no more", culprit=None
    ),
    "other params": Failure(
        lambda case, _: moved(case, "bias1"),
        "BadValue",
        "params.'bias1'. must be the same .*; got other values on rank 2",
    ),
    "other damping": Failure(
        field(damping=0.2),
        "BadValue",
        "newton_step: damping must be the same .*; got 0.1 on rank 0, 0.2 on rank 2",
    ),
    "damping of another kind": Failure(
        field(damping=relative(0.1)), "BadValue", "damping must be the same on all ranks"
    ),
    "another rule": Failure(
        relative_to_rank,
        "BadValue",
        "damping.args must be the same .*; got .0.1,. on rank 0, .0.2,. on rank 2",
        culprit=None,
    ),
    "a bad damping": Failure(
        field(damping=-1.0), "BadValue", "newton_step: rank 2: damping must be"
    ),
    "bad everywhere": Failure(
        field(damping=-1.0), "BadValue", "newton_step: damping must be", culprit=None
    ),
    "other select": Failure(
        option(select=top_k(2)),
        "BadValue",
        "select must be the same on all ranks; got None on rank 0",
    ),
    "other groups": Failure(
        option(groups=[Group(["bias1"])]), "BadValue", "groups must be the same on all ranks"
    ),
    "other criterion": Failure(
        field(criterion=nn.CrossEntropyLoss(label_smoothing=0.1)),
        "BadValue",
        "criterion.label_smoothing must .*; got 0.0 on rank 0, 0.1 on rank 2",
    ),
    "other indices": Failure(
        option(subsampling_ggn=[1, 2]), "BadValue", "subsampling_ggn must be the same on all ranks"
    ),
    "too large an index": Failure(
        option(subsampling_ggn=[11]),
        "BadValue",
        "subsampling_ggn must hold distinct .*has 11 samples",
        culprit=None,
    ),
    "other seeds": Failure(
        drawn,
        "BadValue",
        "criterion.generator must be the same .*; got a generator at .* on rank 0",
        culprit=None,
    ),
    "a term less": Failure(
        without_edge,
        "BadValue",
        "the terms of the loss must be the same .*; got rank 0: .'inside', 'edge'.; rank 2: ",
        of_terms=True,
    ),
    "a key less": Failure(
        without_key, "BadValue", "newton_step: rank 2: .*missing 'edge'", of_terms=True
    ),
    "a rule that raises": Failure(
        field(damping=no_rule), "RankError", "rank 0: ZeroDivisionError: no damping", culprit=None
    ),
    "a rule of another shape": Failure(
        field(damping=of_another_shape), "BadValue", "newton_step: damping", culprit=None
    ),
}
"""What goes wrong, by name."""


# --- interrupts, ranks that end, and groups -----------------------------------------------------


def interrupt(rank: int, culprit: int, where: str) -> Told:
    """What ranks raise where one is interrupted, and their step after that."""
    case = of_rank(perceptron(), rank, COUNTS)
    if where == "rule":
        case = case._replace(damping=interrupted)
    elif rank == culprit:
        case = case._replace(model_fn=interrupted_model)
    started = time.perf_counter()
    try:
        step_of(case, distributed.group.WORLD)
    except BaseException as error:  # noqa: BLE001 - whatever it is, ranks are to agree
        seconds = time.perf_counter() - started
        return Told(type(error).__name__, str(error), "", seconds, whole_step(rank))
    raise AssertionError("nothing was raised")


def ends(rank: int, culprit: int) -> str:
    """A step of which a rank leaves its process."""
    case = of_rank(perceptron(), rank, COUNTS)
    if rank == culprit:
        case = case._replace(model_fn=lambda params, X: os._exit(3))
    return step_of(case, distributed.group.WORLD)


def refused(rank: int) -> list[str]:
    """The messages of groups that are none, raised on every rank by itself."""
    case, messages = of_rank(perceptron(), rank, COUNTS), []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    outside = distributed.new_group([1])
    for group in [3, mesh, outside if rank != 1 else distributed.GroupMember.NON_GROUP_MEMBER]:
        try:
            step_of(case, group)
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    # Inside of a transform.
    vectors = torch.stack([case.params["bias1"]] * 2)

    def of_member(bias: Tensor) -> Any:
        params = case.params | {"bias1": bias}
        return ddnewton.newton_step(
            *case._replace(params=params)[:6], process_group=distributed.group.WORLD
        )

    for call in (torch.func.vmap(of_member), torch.compile(of_member, backend="eager")):
        try:
            call(vectors if not messages[3:] else vectors[0])
        except Exception as error:  # noqa: BLE001 - which torch.compile may wrap
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def by_groups(rank: int) -> dict[str, str | None]:
    """Steps of parts of the ranks, by what these are passed as; None on a rank outside."""
    half, members = distributed.new_group([1, 3]), [1, 3]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,))
    steps: dict[str, str | None] = {"group": None}
    if rank in members:
        steps["group"] = step_of(of_rank(perceptron(), members.index(rank), [3, 8]), half)
    row = mesh["dp"].get_local_rank()
    steps["axis"] = step_of(of_rank(perceptron(), row, [3, 8]), mesh["dp"])
    steps["mesh"] = step_of(of_rank(perceptron(), rank, COUNTS), line)
    steps["world"] = whole_step(rank)
    steps["none"] = step_of(perceptron(), None)
    return steps


def one_asks_for_more(rank: int) -> Told:
    """What ranks raise where the last one calls another function, and a step of all after that."""
    case = of_rank(perceptron(), rank, COUNTS)
    call = ddnewton.newton_step_and_info if rank == 3 else ddnewton.newton_step
    started = time.perf_counter()
    try:
        call(*case[:6], process_group=distributed.group.WORLD)
    except ValueError as error:
        seconds = time.perf_counter() - started
        return Told(type(error).__name__, str(error), "", seconds, whole_step(rank))
    raise AssertionError("nothing was raised")


def of_two(rank: int) -> str:
    return step_of(of_rank(perceptron(), rank, [3, 8]), distributed.group.WORLD)


def constant_rules(rank: int) -> str:
    """Rules that are made anew on every rank, lambdas among them."""
    case = of_rank(perceptron(damping=constant(0.1)), rank, COUNTS)
    case = case._replace(options={"select": lambda evals: evals > 1e-3 * (1 + 0 * rank)})
    return step_of(case, distributed.group.WORLD)
