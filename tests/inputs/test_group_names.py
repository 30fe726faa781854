"""Which parameters a group names, and the groups that are refused."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
)
from tests.models import Layers, normal
from tests.reference import dense, solve
from tests.whole.blocks import agree, cut, every_problem, of_leaves, paths_of, problem

# --- names ----------------------------------------------------------------------------------


def tensors(count: int) -> list[Tensor]:
    return list(normal(count, 2).double())


def summing(params, X):
    """A model to which every parameter matters."""
    return X @ torch.cat([leaf.reshape(-1) for leaf in tree_leaves(params)])[:, None]


TREES = {
    "dict": lambda t: {
        "a": t[0],
        "a.b": t[1],
        "c": {"d": t[2], "e": [t[3], t[4]]},
        "f": Layers(t[5], t[6]),
        "ab": t[7],
        "a b": t[8],
        7: t[9],
    },
    "list": lambda t: [t[0], (t[1], {"w": t[2]}), *t[3:12]],
    "fields": lambda t: Layers(t[0], Layers(t[1], [t[2], t[3]])),
    "tensor": lambda t: t[0],
}
NAMES = [
    ("dict", "a", [0]),
    ("dict", "a.b", [1]),
    ("dict", "ab", [7]),
    ("dict", "a b", [8]),
    ("dict", "7", [9]),
    ("dict", "c", [2, 3, 4]),
    ("dict", "c.d", [2]),
    ("dict", "c.e", [3, 4]),
    ("dict", "c.e.1", [4]),
    ("dict", "f", [5, 6]),
    ("dict", "f.shift", [6]),
    ("dict", ["f.code", "c.e", "a"], [0, 3, 4, 5]),
    ("dict", ("c", "c.d", "c.d"), [2, 3, 4]),
    ("dict", "", list(range(10))),
    ("dict", "['a']", [0]),
    ("dict", "['a.b']", [1]),
    ("dict", "['c']['d']", [2]),
    ("dict", "['c']['e'][1]", [4]),
    ("dict", "['c']['e']", [3, 4]),
    ("dict", "['c']", [2, 3, 4]),
    ("dict", "['f'].shift", [6]),
    ("dict", "['f']", [5, 6]),
    ("dict", "[7]", [9]),
    ("dict", lambda path: path.startswith("c.e"), [3, 4]),
    ("dict", lambda path: "a" in path, [0, 1, 7, 8]),
    ("list", "0", [0]),
    ("list", "1", [1, 2]),
    ("list", "1.1", [2]),
    ("list", "1.1.w", [2]),
    ("list", "[1][1]['w']", [2]),
    ("list", "[1]", [1, 2]),
    ("list", "10", [11]),
    ("fields", "code", [0]),
    ("fields", "shift", [1, 2, 3]),
    ("fields", "shift.shift.1", [3]),
    ("fields", ".code", [0]),
    ("fields", ".shift.shift[1]", [3]),
    ("fields", ".shift.shift", [2, 3]),
    ("fields", ".shift", [1, 2, 3]),
    ("tensor", "", [0]),
    ("tensor", lambda path: not path, [0]),
]


@pytest.mark.parametrize(
    ("tree", "name", "leaves"), NAMES, ids=lambda x: "predicate" if callable(x) else str(x)
)
def test_a_name_names(tree, name, leaves):
    params = TREES[tree](tensors(14))
    X = normal(3, sum(leaf.numel() for leaf in tree_leaves(params))).double()
    s = newton_step(summing, params, X, X[:, :1], nn.MSELoss(), 1.0, groups=[Group(name)])
    assert [i for i, leaf in enumerate(tree_leaves(s)) if leaf.any()] == leaves


@pytest.mark.parametrize("tree", TREES)
def test_predicates_are_asked_about_dotted_paths(tree):
    params, seen = TREES[tree](tensors(14)), []
    X = normal(3, sum(leaf.numel() for leaf in tree_leaves(params))).double()

    def asked(path):
        seen.append(path)
        return True

    ggn_eigvalsh(summing, params, X, X[:, :1], nn.MSELoss(), groups=[Group(asked)])
    assert seen == paths_of(params)


AMBIGUOUS = {
    "a dot in a key": lambda t: {"a": {"b": t[0]}, "a.b": t[1]},
    "a number and its digits": lambda t: {0: t[0], "0": t[1]},
    "a prefix": lambda t: {"a": t[0], "a.b": t[1], "a.b.c": t[2]},
    "a key like a path": lambda t: {"a": t[0], "['a']": t[1]},
    "an empty key": lambda t: {"": t[0], "a": t[1], "b": {"": t[2]}},
    "an empty key above": lambda t: {"a": t[0], "": {"a": t[1], "": t[2]}},
}


@pytest.mark.parametrize("make", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_every_parameter_has_a_block_however_its_path_reads(make):
    params = make(tensors(3))
    X = normal(3, sum(leaf.numel() for leaf in tree_leaves(params))).double()
    arguments = (summing, params, X, X[:, :1], nn.MSELoss())
    s = newton_step(*arguments, 1.0, groups=per_parameter(params))
    whole = dense(*arguments)
    for i in range(len(tree_leaves(params))):
        agree(of_leaves(s, [i]), solve(cut(whole, params, [i]), 1.0))
    assert newton_step(*arguments, 1.0, groups=per_layer(params))


@every_problem
def test_ready_made_groups_hold_every_parameter_once(name):
    params, paths = problem(name).params, paths_of(problem(name).params)
    assert [group.params for group in per_parameter(params)] == [[path] for path in paths]
    layers = [list(group.params) for group in per_layer(params)]
    assert sorted(path for layer in layers for path in layer) == sorted(paths)
    for layer in layers:
        assert len({path.rpartition(".")[0] for path in layer}) == 1
    assert len({layer[0].rpartition(".")[0] for layer in layers}) == len(layers)
    for group in (*per_parameter(params), *per_layer(params)):
        assert group.select is group.damping is None


# --- refusals -------------------------------------------------------------------------------


PARAMS = {"W": torch.linspace(-0.5, 0.7, 6).reshape(2, 3), "b": {"c": torch.tensor([0.1, -0.2])}}
MANY = {f"p{i}": torch.ones(1) for i in range(12)}

REFUSALS = {
    "a group alone": (
        Group("W"),
        TypeError,
        r"groups must be a sequence of Group, or None; got Gr",
    ),
    "a path": ("W", TypeError, "groups must be a sequence of Group, or None; got 'W'"),
    "a function": (lambda path: True, TypeError, "groups must be a sequence of Group"),
    "a generator": (
        (Group("W") for _ in range(1)),
        TypeError,
        "groups must be a sequence of Group",
    ),
    "a dict": ({"a": Group("W")}, TypeError, "groups must be a sequence of Group"),
    "a set": ({"W"}, TypeError, "groups must be a sequence of Group"),
    "a number": (1, TypeError, "sequence of Group, or None; got 1. Pass .Group"),
    "none of them": ([], ValueError, "sequence of Group, or None; got an empty one"),
    "an empty tuple": ((), ValueError, "got an empty one"),
    "paths": (["W"], TypeError, "got 'W' in it"),
    "None inside": ([Group("W"), None], TypeError, "got None in it"),
    "a tuple inside": ([("W", None, None)], TypeError, r"got \('W', None, None\) in it"),
    "unknown": (
        [Group("weight")],
        ValueError,
        r"a group must name parameters that there are; got 'weight'.*'W', 'b.c'\.",
    ),
    "unknown, second": ([Group("W"), Group(["b", "nothing"])], ValueError, "got 'nothing'"),
    "part of a key": ([Group("b.")], ValueError, r"got 'b\.'"),
    "below a leaf": ([Group("W.weight")], ValueError, r"got 'W\.weight'"),
    "by its shown name": ([Group("params['W']")], ValueError, "got .params"),
    "nothing matches": (
        [Group("W"), Group(lambda path: False)],
        ValueError,
        r"got groups\[1\]\.params, which is false for every path,?.*'W', 'b.c'",
    ),
    "twice": (
        [Group("W"), Group("b"), Group(["W"])],
        ValueError,
        r"a parameter must be in one group only; got 'W' in groups 0 and 2\. Take it out",
    ),
    "twice by a prefix": ([Group("b.c"), Group("b")], ValueError, "'b.c' in groups 0 and 1"),
    "twice by a function": (
        [Group(lambda path: True), Group("W")],
        ValueError,
        "'W' in groups 0 and 1",
    ),
    "twice by another name": ([Group("W"), Group("['W']")], ValueError, "'W' in groups 0 and 1"),
    "params None": ([Group(None)], TypeError, r"groups\[0\].params must be a path, a sequence of"),
    "params a number": ([Group("W"), Group(1)], TypeError, r"groups\[1\].params must be .*; got 1"),
    "params of numbers": ([Group([0])], TypeError, r"got \[0\]\. Name parameters as in"),
    "params nested": ([Group([["W"]])], TypeError, r"groups\[0\].params must be a path"),
    "params a set": ([Group({"W"})], TypeError, r"groups\[0\].params must be a path"),
    "params tensors": ([Group([PARAMS["W"]])], TypeError, r"groups\[0\].params must be a path"),
    "params a tensor": ([Group(PARAMS["W"])], TypeError, r"groups\[0\].params must be a path"),
    "params none": ([Group([])], ValueError, r"groups\[0\].params .* got none\. Name at least one"),
    "select": (
        [Group("W", select=3)],
        TypeError,
        r"groups\[0\].select must be a function or None; got 3\. Pass a rule such as top_k",
    ),
    "select indices": ([Group("W", select=[0])], TypeError, r"groups\[0\].select must be a fun"),
}
DAMPINGS = {
    "negative": (
        [Group("W", damping=-1.0)],
        ValueError,
        r"groups\[0\].damping must be a .*got -1.0",
    ),
    "nan": (
        [Group("W"), Group("b", damping=math.nan)],
        ValueError,
        r"groups\[1\].damping must .*nan",
    ),
    "string": ([Group("W", damping="1")], TypeError, r"groups\[0\].damping must be a .*; got '1'"),
    "boolean": ([Group("W", damping=True)], TypeError, r"groups\[0\].damping must be a number"),
    "vector": ([Group("W", damping=torch.ones(2))], TypeError, r"got a tensor of shape \[2\]"),
    "negative tensor": ([Group("W", damping=-torch.ones(()))], ValueError, r"\[0\].damping"),
    "rule's shape": (
        [Group("b", damping=lambda evals, *_: torch.ones(7))],
        ValueError,
        r"for each of the K = 2 directions; got shape \[7\]",
    ),
    "rule's sign": (
        [Group("b", damping=lambda evals, *_: -evals)],
        ValueError,
        "must not be negative or nan",
    ),
    "select's answer": ([Group("b", select=lambda evals: [99])], ValueError, "from 99 to 99"),
    "select's mask": (
        [Group("b", select=lambda evals: evals[1:] > 0)],
        ValueError,
        "a mask of length",
    ),
}


def linear(p, x):
    return x @ p["W"].T + p["b"]["c"]


def call(function, groups, model_fn=linear):
    X, y = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(0, 1, 8).reshape(4, 2)
    given = {"damping": 1.0} if "damping" in inspect.signature(function).parameters else {}
    return function(model_fn, PARAMS, X, y, F.mse_loss, groups=groups, **given)


PUBLIC = (
    newton_step,
    newton_step_and_info,
    ggn_eigvalsh,
    ggn_eigh,
    directional_derivatives,
    gram_matrix,
)


@pytest.mark.parametrize("case", REFUSALS, ids=REFUSALS)
def test_refusals_come_before_any_work_and_say_where(case):
    groups, kind, message = REFUSALS[case]

    def untouched(p, x):
        raise AssertionError("work was done")

    for function in PUBLIC:
        with pytest.raises(kind, match=f"(?s)^{function.__name__}: .*{message}"):
            call(function, groups, untouched)


@pytest.mark.parametrize("case", DAMPINGS, ids=DAMPINGS)
def test_refusals_of_dampings_and_selections(case):
    groups, kind, message = DAMPINGS[case]
    for function in (newton_step, newton_step_and_info):
        with pytest.raises(kind, match=f"(?s)^{function.__name__}: .*{message}"):
            call(function, groups)


def test_a_message_names_a_few_parameters_of_many():
    X = torch.ones(2, 12)
    known = r"got 'q' in groups\[0\]. The parameters are 'p0', .*'p7', …\.$"
    with pytest.raises(ValueError, match=known):
        newton_step(summing, MANY, X, X[:, :1], F.mse_loss, 1.0, groups=[Group("q")])


def test_what_a_predicate_raises_is_passed_on():
    with pytest.raises(ZeroDivisionError):
        call(newton_step, [Group(lambda path: 1 / 0)])
