"""Steps to be made by one process and by several: models, batches and options, by name.

Every process makes the same problem of a name; the ranks take their parts of its samples.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import ddnewton
from ddnewton import Group, above, empirical_fisher, monte_carlo, top_k, weighted
from ddnewton.columns import ring
from ddnewton.damping import bootstrap, relative, signal_to_noise
from ddnewton.distributed import service, wire
from ddnewton.quadratic import arguments
from ddnewton.quadratic.ranks import shard
from ddnewton.quadratic.ranks.messages import form_of

FLOAT64 = torch.float64


class Case(NamedTuple):
    """The arguments of a call, and its options."""

    model_fn: Any
    params: Any
    X: Any
    y: Any
    criterion: Any
    damping: Any
    options: Mapping[str, Any] = {}


def step_alone(case: Case, process_group: Any = None) -> dict[str, Tensor]:
    """The step of the function that returns nothing else."""
    step = ddnewton.newton_step(*case[:6], **case.options, process_group=process_group)
    return {"step": flat(step)}


def step_and_info(case: Case, process_group: Any = None) -> dict[str, Tensor]:
    """The other function's step, and all numbers of the records, by name."""
    # Directions of hardly any curvature are not determined to many digits.
    options = {"select": above(1e-3), **case.options, "process_group": process_group}
    step, info = ddnewton.newton_step_and_info(*case[:6], **options)
    result = {"step": flat(step)}
    for number, record in enumerate([info] if hasattr(info, "loss") else info):
        for name, value in record._asdict().items():
            result[f"{name} {number}"] = flat(value)
    return result


FUNCTIONS = (step_alone, step_and_info)


def flat(tree: Any) -> Tensor:
    """All leaves of a tree as one vector of reals."""
    leaves = [torch.view_as_real(x) if x.is_complex() else x for x in tree_leaves(tree)]
    return torch.cat([leaf.detach().to(FLOAT64).reshape(-1) for leaf in leaves])


def part(tree: Any, samples: slice) -> Any:
    """The samples of a rank."""
    return tree_map(lambda x: x[samples], tree)


def ends(counts: Sequence[int]) -> list[slice]:
    """The samples of all ranks, which have so many each."""
    stops = torch.tensor(counts).cumsum(0).tolist()
    return [slice(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]


def of_rank(case: Case, rank: int, counts: Any) -> Case:
    """The case with the samples of a rank alone; of terms, counts are by their names."""
    if isinstance(case.X, dict) and isinstance(case.model_fn, dict):
        X, y = (
            {name: part(tree[name], ends(counts[name])[rank]) for name in tree}
            for tree in (case.X, case.y)
        )
        return case._replace(X=X, y=y)
    samples = ends(counts)[rank]
    return case._replace(X=part(case.X, samples), y=part(case.y, samples))


def digest(result: Mapping[str, Tensor]) -> str:
    """A hash of all bytes of a result."""
    hashed = hashlib.sha256()
    for name, value in result.items():
        hashed.update(name.encode() + value.numpy().tobytes())
    return hashed.hexdigest()


def on_rank(rank: int, name: str, splits: Sequence[Any], first: int) -> list[Any]:
    """A rank's results, one function after the other: a hash, and on the first rank all numbers."""
    results = []
    for number, counts in enumerate(splits):
        case = of_rank(CASES[name](), rank, counts)
        before, random_state = digest(everything(case)), torch.get_rng_state()
        result = FUNCTIONS[(first + number) % 2](case, distributed.group.WORLD)
        assert digest(everything(case)) == before, "arguments are changed"
        assert torch.equal(torch.get_rng_state(), random_state), "random numbers are drawn"
        results.append((digest(result), result if rank == 0 else None))
    return results


def everything(case: Case) -> dict[str, Tensor]:
    """All tensors among the arguments."""
    leaves, _ = tree_flatten((case.params, case.X, case.y))
    return {str(number): leaf for number, leaf in enumerate(leaves)}


# --- models and batches --------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=FLOAT64).to(dtype)


def params_of(*sizes: int, dtype: torch.dtype = FLOAT64) -> dict[str, Tensor]:
    """Parameters of a perceptron."""
    params = {}
    for number, (p, o) in enumerate(itertools.pairwise(sizes)):
        params[f"weight{number}"] = normal(o, p, seed=number, dtype=dtype) / p**0.5
        params[f"bias{number}"] = 0.1 * normal(o, seed=number, dtype=dtype)
    return params


def mlp(params: Any, X: Tensor) -> Tensor:
    for number in range(len(params) // 2):
        X = F.linear(
            torch.tanh(X) if number else X, params[f"weight{number}"], params[f"bias{number}"]
        )
    return X


def classes(n: int, c: int, *positions: int) -> Tensor:
    return (torch.arange(n * torch.Size(positions).numel()) * 7 % 11 % c).reshape(n, *positions)


def perceptron(
    n: int = 11, sizes: Sequence[int] = (3, 5, 4), damping: Any = 0.1, criterion: Any = None,
    dtype: torch.dtype = FLOAT64, **options: Any,
) -> Case:  # fmt: skip
    """A classifier: N·M = 33 columns and 44 parameters, unless asked for others."""
    X, y = normal(n, sizes[0], dtype=dtype), classes(n, sizes[-1])
    criterion = criterion or nn.CrossEntropyLoss()
    return Case(mlp, params_of(*sizes, dtype=dtype), X, y, criterion, damping, options)


def regression(n: int = 9, damping: Any = 0.1, criterion: Any = None, **options: Any) -> Case:
    y = normal(n, 2, seed=3)
    criterion = criterion or nn.MSELoss()
    return Case(mlp, params_of(3, 4, 2), normal(n, 3), y, criterion, damping, options)


def convolutions(gram: str = "structured", chunk_size: int | None = 2, **options: Any) -> Case:
    module = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    params = {
        name: normal(*p.shape, seed=number) / p[0].numel() ** 0.5
        for number, (name, p) in enumerate(module.named_parameters())
    }
    options = {"gram": gram, "chunk_size": chunk_size, **options}
    X, y = normal(9, 2, 4, 4), classes(9, 3)
    return Case(
        lambda p, x: functional_call(module, p, (x,)),
        params,
        X,
        y,
        nn.CrossEntropyLoss(),
        0.1,
        options,
    )


def prepared() -> Case:
    case = convolutions("auto")
    model_fn = ddnewton.prepare(case.model_fn, case.params, case.X[:2])
    return case._replace(model_fn=model_fn, options={})


def terms(**options: Any) -> Case:
    """Residuals of two kinds, with samples of their own."""
    shared = params_of(2, 4, 1)
    model_fn = {"inside": mlp, "edge": lambda p, x: 2 * mlp(p, x) - 1}
    X = {"inside": normal(8, 2), "edge": normal(5, 2, seed=4)}
    y = {"inside": normal(8, 1), "edge": normal(5, 1, seed=9)}
    criterion = {"inside": nn.MSELoss(), "edge": weighted(nn.MSELoss(), 3.0)}
    return Case(model_fn, shared, X, y, criterion, options.pop("damping", 0.1), options)


def tokens(**options: Any) -> Case:
    """A loss of several positions, labels that do not count among them."""
    params = {"embedding": normal(7, 4), **params_of(4, 5, 6)}

    def model_fn(params: Any, X: Any) -> Tensor:
        hidden = F.embedding(X["tokens"], params["embedding"]) + X["offset"][:, None]
        layers = {name: leaf for name, leaf in params.items() if name != "embedding"}
        return mlp(layers, hidden).transpose(1, 2)

    X = {"tokens": classes(7, 7, 3), "offset": normal(7, 4)}
    y = classes(7, 6, 3).index_fill(1, torch.tensor([1]), -100)
    criterion = nn.CrossEntropyLoss(ignore_index=-100)
    return Case(model_fn, params, X, y, criterion, 0.1, options)


def normalised(outputs: Tensor, target: Tensor) -> Tensor:
    """Σwℓ / Σw."""
    w = target[:, 0].abs()
    return (w * (outputs - target).square().sum(1)).sum() / w.sum()


def complex_parameters(**options: Any) -> Case:
    params = {"w": torch.complex(normal(3, 2), normal(3, 2, seed=1)), "b": normal(2)}
    y = torch.complex(normal(6, 2), normal(6, 2, seed=5))

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).abs().square().mean()

    return Case(
        lambda p, x: torch.tanh(x.to(p["w"].dtype) @ p["w"]) + p["b"],
        params,
        normal(6, 3),
        y,
        loss,
        0.1,
        options,
    )


def drawn(samples: int = 2) -> Any:
    return monte_carlo(nn.CrossEntropyLoss(), samples, torch.Generator().manual_seed(1))


UNITS = {"weight0": 2.0, "bias0": 0.5, "weight1": 3.0, "bias1": 1.0}


def sizes_of_leaves() -> dict[str, Any]:
    return {name: 0.5 + leaf.abs() for name, leaf in params_of(3, 5, 4).items()}


HALVES = [Group(["weight0", "bias0"]), Group(["weight1"], select=top_k(3), damping=relative(0.1))]
SMALL_AND_LARGE = [Group(["weight0", "weight1"]), Group(["bias1"], damping=0.3)]
WEIGHTS = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=FLOAT64))

CASES: dict[str, Callable[[], Case]] = {
    "columns": perceptron,
    "parameters": lambda: perceptron(31),
    "dense": lambda: perceptron(gram="dense"),
    "structured": lambda: perceptron(gram="structured"),
    "structured parameters": lambda: perceptron(31, gram="structured"),
    "convolutions": convolutions,
    "prepared": prepared,
    "rule": lambda: perceptron(damping=signal_to_noise(), select=above(1e-3)),
    "rule on parameters": lambda: perceptron(31, damping=relative(0.05)),
    "bootstrap": lambda: perceptron(
        damping=bootstrap([1e-3, 0.1, 10.0], torch.Generator().manual_seed(0))
    ),
    "top_k": lambda: perceptron(damping=0.0, select=top_k(4)),
    "above": lambda: perceptron(31, damping=0.0, select=above(1e-3)),
    "complement": lambda: perceptron(select=top_k(4), complement=0.7),
    "complement on parameters": lambda: perceptron(31, select=top_k(4), complement=0.7),
    "groups": lambda: perceptron(groups=HALVES),
    "groups on both sides": lambda: perceptron(groups=SMALL_AND_LARGE),
    "terms": terms,
    "terms by a rule": lambda: terms(damping=relative(0.1)),
    "terms with samples": lambda: terms(
        subsampling_ggn={"inside": [6, 1, 3]}, subsampling_grad={"edge": [4, 0]}
    ),
    "gradient's samples": lambda: perceptron(subsampling_grad=[10, 2, 7, 3]),
    "directions' samples": lambda: perceptron(subsampling_ggn=[9, 0, 4, 8]),
    "curvature's samples": lambda: perceptron(
        damping=relative(0.1), subsampling_ggn=[8, 1, 5], subsampling_curvature=[10, 0, 6, 2]
    ),
    "few directions' curvatures": lambda: perceptron(
        damping=0.1,
        select=top_k(1),
        sizes=(3, 5, 9),
        subsampling_ggn=[8, 1, 5],
        subsampling_curvature=[10, 0, 6, 2],
    ),
    "samples of every kind": lambda: perceptron(
        31,
        damping=relative(0.1),
        subsampling_grad=slice(3, 30, 2),
        subsampling_ggn=slice(20, 0, -1),
        subsampling_curvature=slice(15, None),
    ),
    "monte_carlo": lambda: perceptron(criterion=drawn()),
    "monte_carlo by a rule": lambda: perceptron(31, criterion=drawn(1), damping=relative(0.1)),
    "empirical_fisher": lambda: perceptron(criterion=empirical_fisher(nn.CrossEntropyLoss())),
    "weighted": lambda: regression(criterion=weighted(nn.MSELoss(reduction="sum"), 0.3)),
    "joint": lambda: regression(criterion=normalised),
    "joint with samples": lambda: regression(
        criterion=normalised, subsampling_grad=[7, 2], subsampling_ggn=[1, 8, 3]
    ),
    "class weights": lambda: perceptron(criterion=WEIGHTS),
    "label smoothing": lambda: perceptron(criterion=nn.CrossEntropyLoss(label_smoothing=0.2)),
    "positions": tokens,
    "positions in layers": lambda: tokens(gram="structured", chunk_size=2),
    "positions of samples": lambda: tokens(
        gram="structured", chunk_size=1, subsampling_ggn=[5, 1, 4]
    ),
    "scale": lambda: perceptron(scale=sizes_of_leaves()),
    "scale in layers": lambda: perceptron(scale=sizes_of_leaves(), gram="structured", chunk_size=2),
    "scale of leaves": lambda: perceptron(scale=UNITS, gram="structured", chunk_size=2),
    "jac": lambda: perceptron(31, scale="jac"),
    "jac in groups": lambda: perceptron(13, scale="jac", groups=SMALL_AND_LARGE),
    "complex": complex_parameters,
    "float32": lambda: perceptron(dtype=torch.float32, gram="structured", damping=1e-6),
    "chunks": lambda: perceptron(gram="structured", chunk_size=2),
    "chunks of dense columns": lambda: perceptron(
        gram="dense", chunk_size=1, damping=relative(0.1)
    ),
    "chunks on parameters": lambda: perceptron(31, gram="structured", chunk_size=2),
    "chunks of samples": lambda: perceptron(
        gram="structured",
        chunk_size=2,
        subsampling_ggn=[9, 0, 4, 8, 3, 2, 10],
        subsampling_grad=[1, 9, 5],
    ),
}
"""What is asked for, by name."""
CASES |= {
    "split": lambda: perceptron(6, chunk_size=2),
    "split in layers": lambda: perceptron(6, gram="structured", subsampling_ggn=[5, 1, 2]),
    "split by a rule": lambda: perceptron(13, (2, 3, 3), damping=relative(0.1), complement=1.0),
}


# --- generators, and ways of columns -----------------------------------------------------------


def drawing() -> Case:
    """A rule and a criterion that draw from the same generator."""
    generator = torch.Generator().manual_seed(5)
    criterion = monte_carlo(nn.CrossEntropyLoss(), 1, generator)
    return perceptron(damping=bootstrap([0.1, 1.0], generator), criterion=criterion)


def generator_states(case: Case) -> list[int]:
    return case.criterion.generator.get_state().tolist()


def drawn_twice(rank: int) -> list[int]:
    """The state of a rank's generator after two steps of all."""
    case = of_rank(drawing(), rank, [2, 4, 1, 4])
    step_alone(case, distributed.group.WORLD)
    step_alone(case, distributed.group.WORLD)
    return generator_states(case)


def forms_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The forms of columns that a rank tells of from now on."""
    forms: list[Any] = []

    def recorded(jacobian: Any) -> Any:
        factors = jacobian.visit(jacobian.chunks[0])
        forms.append(not all(isinstance(factor, Tensor) for factor in factors))
        return form_of(jacobian)

    monkeypatch.setattr(shard, "form_of", recorded)
    return forms


def ways(rank: int, counts: Sequence[int]) -> tuple[bool | None, bool | None]:
    """Whether a rank's columns are those of layers, and whether another step's are."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        forms = forms_of(monkeypatch)
        case = perceptron(220, (16, 40, 10))
        step_alone(of_rank(case, rank, counts), distributed.group.WORLD)
        step_alone(of_rank(case, rank, counts), distributed.group.WORLD)
    return tuple(forms) if forms else (None, None)


def of_other_forms(rank: int) -> tuple[Tensor, list[bool]]:
    """A step where the columns of one rank are dense, those of the others of layers."""
    case = convolutions("dense" if rank == 1 else "structured", chunk_size=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        forms = forms_of(monkeypatch)
        # Ranks that are asked for different ways are refused: let nobody see it.
        monkeypatch.setattr(arguments, "options_told", lambda options: {})
        result = step_alone(of_rank(case, rank, [2, 3, 0, 4]), distributed.group.WORLD)
    return result["step"], forms


def not_in_float64(params: Any, X: Tensor) -> Tensor:
    """A model that can be evaluated in its own dtype alone."""
    if torch.float64 in (X.dtype, params["bias1"].dtype):
        raise TypeError("no float64")
    return mlp(params, X)


def in_two_precisions(rank: int, gram: str, culprit: int) -> tuple[str, Tensor]:
    """A step where one rank's samples are evaluated in float32, those of the others in float64."""
    case = of_rank(perceptron(dtype=torch.float32, gram=gram, chunk_size=1), rank, [2, 4, 1, 4])
    if rank == culprit:
        case = case._replace(model_fn=not_in_float64)
    result = step_alone(case, distributed.group.WORLD)
    return digest(result), result["step"]


def with_shapeless_nothing(rank: int) -> str:
    """A step where the samples of one rank are none, of no shape and of another dtype."""
    case = of_rank(perceptron(), rank, [5, 0, 4, 2])
    if rank == 1:
        case = case._replace(X=torch.empty(0, dtype=torch.float32), y=torch.empty(0))
    return digest(step_alone(case, distributed.group.WORLD))


# --- what passes between ranks -------------------------------------------------------------------


def traffic(rank: int, name: str, counts: Sequence[int]) -> tuple[dict[str, int], int]:
    """The bytes that a rank says it has sent for a step, and how often all told each other all."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger(service.__name__)
    handler.emit = records.append
    exchanges = []
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            gather = distributed.all_gather
            monkeypatch.setattr(
                distributed, "all_gather", lambda *args: exchanges.append(gather(*args))
            )
            step_alone(of_rank(CASES[name](), rank, counts), distributed.group.WORLD)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    (record,) = records
    assert record.args is not None
    logged, size, sent = record.args
    assert (logged, size) == (rank, 4)
    return {kind: int(count) for kind, count in map(str.split, sent.split(", "))}, len(exchanges)


def held_in_ring(rank: int, name: str, counts: Sequence[int]) -> list[tuple[int, int]]:
    """For every turn, how many tensors of those before are still there, and how many arrive."""
    turns, references = [], []

    def swap(*args: Any) -> Any:
        alive = sum(reference() is not None for reference in references)
        arrived = wire.swap(*args)
        tensors = [leaf for leaf in tree_leaves(arrived) if isinstance(leaf, Tensor)]
        references.extend(map(weakref.ref, tensors))
        turns.append((alive, len(tensors)))
        return arrived

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ring, "swap", swap)
        step_alone(of_rank(CASES[name](), rank, counts), distributed.group.WORLD)
    return turns
