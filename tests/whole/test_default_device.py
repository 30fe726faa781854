"""Tensors are made where the parameters are, whatever torch's default device is.

Without a GPU the default is the meta device: what is made there has no values, so that a step that
meets it fails. Models with parameters of an own device are refused by name.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

import ddnewton
from ddnewton import (
    Group,
    covariance,
    damping,
    directional_derivatives,
    directional_newton,
    empirical_fisher,
    fit,
    ggn_eigh,
    ggn_eigvalsh,
    gram_matrix,
    held_out,
    levenberg_marquardt,
    monte_carlo,
    newton_step,
    newton_step_and_info,
    prepare,
    spring,
    standard_errors,
    top_k,
)
from ddnewton.inputs.memory import free_bytes, memory_bytes
from tests.methods import seeded
from tests.models import problem

SOURCE = Path(ddnewton.__file__).parent
META = torch.device("meta")
FACTORIES = {function.__name__ for function in _device_constructors()}
OWN_DEVICE = ("demo", "plotting")
"""Where tensors are examples, or are drawn."""


def homeless(path: Path) -> list[str]:
    """The calls of torch's factories that do not say on which device."""
    return [
        f"{path.relative_to(SOURCE)}:{node.lineno} torch.{node.func.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


def test_every_tensor_is_made_on_a_device_that_is_said():
    paths = [p for p in SOURCE.rglob("*.py") if p.relative_to(SOURCE).parts[0] not in OWN_DEVICE]
    assert len(paths) > 100
    assert [found for path in sorted(paths) for found in homeless(path)] == []


def test_a_factory_without_a_device_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    (tmp_path / "made.py").write_text("a = torch.zeros(3)\nb = torch.zeros(3, device=c)\n")
    assert homeless(tmp_path / "made.py") == ["made.py:1 torch.zeros"]


def updated(given, rule, **options):
    """The parameters after two updates."""
    optimizer = directional_newton(given.model_fn, given.criterion, rule, **options)
    params, state = given.params, optimizer.init(given.params)
    for _ in range(2):
        params, state, _ = optimizer.update(params, state, given.X, given.y)
    return params


def with_criterion(given, criterion, **options):
    return newton_step(given.model_fn, given.params, given.X, given.y, criterion, 0.1, **options)


def in_groups(given, **options):
    groups = [Group(lambda path: "0" in path, damping=0.2), Group(lambda path: "2" in path)]
    return newton_step(*given, 0.1, groups=groups, **options)


CALLS = {
    "a number": lambda given, **o: newton_step(*given, 0.1, **o),
    "info": lambda given, **o: newton_step_and_info(*given, 0.1, **o),
    "a rule": lambda given, **o: newton_step(*given, damping.relative(0.1), **o),
    "top 2": lambda given, **o: newton_step(*given, 0.1, select=top_k(2), complement=0.3, **o),
    "samples": lambda given, **o: newton_step(
        *given, 0.1, subsampling_grad=[0, 1], subsampling_ggn=[1, 2], subsampling_curvature=[0], **o
    ),
    "directions": lambda given, **o: ggn_eigh(*given, select=top_k(2), **o)[0],
    "derivatives": lambda given, **o: directional_derivatives(*given, select=top_k(1), **o)[1],
    "groups": in_groups,
    "monte_carlo": lambda given, **o: with_criterion(
        given, monte_carlo(given.criterion, 2, seeded()), **o
    ),
    "empirical_fisher": lambda given, **o: with_criterion(
        given, empirical_fisher(given.criterion), **o
    ),
    "trust_region": lambda given, **o: updated(given, None, **o),
    "levenberg_marquardt": lambda given, **o: updated(given, levenberg_marquardt(), **o),
    "spring": lambda given, **o: updated(given, spring(), **o),
    "held_out": lambda given, **o: updated(given, held_out(), **o),
    "fit": lambda given, **o: fit(*given, max_updates=2, **o).params,
}
OF_MATRICES = {
    "scale": lambda given: newton_step(*given, 0.1, scale="jac"),
    "eigenvalues": lambda given: ggn_eigvalsh(*given),
    "gram_matrix": lambda given: gram_matrix(*given),
    "covariance": lambda given: covariance(*given),
    "standard_errors": lambda given: standard_errors(*given),
    "prepare": lambda given: prepare(*given[:3])(*given[1:3]),
}
CASES = {
    f"{name}, {gram}": (call, {"gram": gram})
    for name, call in CALLS.items()
    for gram in ("dense", "structured", "free")
} | {name: (call, {}) for name, call in OF_MATRICES.items()}


@pytest.mark.filterwarnings("ignore:the covariance is infinite")
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_made_on_the_default_device(case):
    call, options = CASES[case]
    given = problem("relu_mlp")
    expected = call(given, **options)
    with META:
        result = call(given, **options)
    for leaf, expected_leaf in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        assert torch.equal(torch.as_tensor(leaf), torch.as_tensor(expected_leaf))


# --- what is on other devices ---------------------------------------------------------------


def on_meta(tree):
    return tree_map(lambda leaf: leaf.to(META), tree)


def test_parameters_on_two_devices_are_refused():
    given = problem("relu_mlp")
    names = list(given.params)
    params = given.params | {names[1]: on_meta(given.params[names[1]])}
    match = rf"newton_step: params must be on one device; got params\['{names[0]}'\] on cpu, "
    match += rf"params\['{names[1]}'\] on meta\. Move them"
    with pytest.raises(ValueError, match=match):
        newton_step(given.model_fn, params, *given[2:], 0.1)


@pytest.mark.parametrize("gram", ["auto", "dense", "structured", "free"])
def test_outputs_on_another_device_are_refused(gram):
    given = problem("relu_mlp")
    match = (
        r"newton_step: model_fn must return outputs on the device of params; got outputs on meta"
    )
    with pytest.raises(ValueError, match=match):
        newton_step(lambda p, x: on_meta(given.model_fn(p, x)), *given[1:], 0.1, gram=gram)


@pytest.fixture
def moved(monkeypatch):
    """The numbers of entries that are asked to be moved to the device of the parameters."""
    counts = []

    def moved_to(tree, device):
        if device is not None:
            counts.extend(leaf.numel() for leaf in tree_leaves(tree))
        return tree

    monkeypatch.setattr("ddnewton.quadratic.arguments.moved_to", moved_to)
    monkeypatch.setattr(
        "ddnewton.quadratic.arguments.device_to_go_to", lambda *_: torch.device("cpu")
    )
    return counts


def test_dampings_go_where_the_parameters_are(moved):
    given = problem("relu_mlp")
    newton_step(*given, 0.1, complement=0.2)
    targets = len(moved)
    step = newton_step(*given, torch.tensor(0.1), complement=torch.tensor(0.2))
    assert moved[targets:].count(1) == moved[:targets].count(1) + 2
    assert tree_leaves(step)[0].isfinite().all()


@pytest.mark.parametrize("gram", ["dense", "free"])
def test_a_rule_may_answer_from_another_device(gram, monkeypatch):
    """Where there is one device alone, moves are counted: from the CPU to itself."""
    counts = []

    class Elsewhere(torch.Tensor):
        def to(self, *args, **kwargs):
            counts.append(args)
            return super().to(*args, **kwargs)

    given = problem("relu_mlp")

    def rule(evals, evecs, gammas, lambdas):
        return torch.full((len(evals),), 0.1, dtype=evals.dtype).as_subclass(Elsewhere)

    step = newton_step(*given, rule, select=top_k(2), gram=gram)
    assert (torch.device("cpu"),) in counts
    assert tree_leaves(step)[0].isfinite().all()


# --- memory ------------------------------------------------------------------------------------


def test_what_torch_keeps_for_the_next_tensors_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 70}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    device = torch.device("cuda", 0)
    assert free_bytes(device) == memory_bytes(device) == 100 + 70 - 30
