"""Every refusal: before any work, by name, with the rule, what was got and what to do."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ddnewton import (
    Group,
    above,
    covariance,
    directional_newton,
    energy,
    fit,
    ggn_eigvalsh,
    held_out,
    newton_step,
    newton_step_and_info,
    per_layer,
    per_parameter,
    prepare,
    top_k,
)
from ddnewton.criteria import cross_entropy, mse
from ddnewton.damping import relative, signal_to_noise

X = torch.linspace(-1, 1, 12).reshape(4, 3)
Y = torch.linspace(0, 1, 8).reshape(4, 2)
CLASSES = torch.tensor([0, 1, 1, 0])
PARAMS = {"W": torch.linspace(-0.5, 0.7, 6).reshape(2, 3), "b": torch.tensor([0.1, -0.2])}


def linear(p, x):
    return x @ p["W"].T + p["b"]


def step(**changes):
    """Take a step that works, but for the changes."""
    arguments = {"model_fn": linear, "params": PARAMS, "X": X, "y": Y}
    arguments |= {"criterion": F.mse_loss, "damping": 1.0}
    return newton_step(**arguments | changes)


def test_without_changes_the_step_is_taken():
    assert step()["W"].shape == (2, 3)


NUMBER = (
    r"params must hold floating-point tensors only; got params\['c'\]: float 1\.0\. Pass a tensor "
    r"for every number .*: torch\.tensor\(1\.0\), or torch\.tensor\(1\.0, dtype=torch\.float64\)"
)

# Each case: the changed arguments, the error, and what its message must say.
CASES = {
    # the batch
    "counts differ": ({"y": Y[:3]}, ValueError, r"newton_step: X and y .* X: 4, y: 3\. Slice"),
    "counts differ inside X": ({"X": {"a": X, "b": X[:2]}}, ValueError, r"X\['b'\]: 2"),
    "empty batch": ({"X": X[:0], "y": Y[:0]}, ValueError, "at least one sample"),
    "empty tree": ({"X": {}}, ValueError, "X must hold at least one tensor"),
    "no tensor in X": ({"X": [X, None]}, TypeError, r"X\[1\]: NoneType"),
    "no tensor in y": ({"y": 3.0}, TypeError, "y: float. Convert it with torch.as_tensor"),
    "y and criterion swapped": (
        {"y": nn.MSELoss(), "criterion": Y},
        TypeError,
        "X and y must be tensors .*; got y: MSELoss. If it is the criterion, pass it after y: the",
    ),
    "a record for y": ({"y": mse()}, TypeError, "got y: Loss. If it is the criterion, pass it aft"),
    "a function for y": (
        {"y": lambda t: Y},
        TypeError,
        "got y: <lambda>. Pass what it returns, or",
    ),
    "targets for criterion": (
        {"criterion": Y},
        TypeError,
        r"criterion must be a loss function; got a tensor of shape \[4, 2\]. If it is y, pass",
    ),
    "no axes in X": ({"X": torch.tensor(1.0)}, ValueError, "samples on axis 0; got X: a tensor"),
    # the parameters
    "no parameters": ({"params": {}}, ValueError, "params must hold at least one tensor"),
    "integers": (
        {"params": PARAMS | {"b": torch.tensor([1, 2])}},
        TypeError,
        r"floating-point tensors only; got params\['b'\]: torch.int64. Convert it with .double",
    ),
    "no tensor": ({"params": PARAMS | {"c": 1.0}}, TypeError, NUMBER),
    "one number": ({"params": 2}, TypeError, r"params: int 2\.0\. .*: torch\.tensor\(2\.0\), or"),
    "an array": ({"params": [X.numpy()]}, TypeError, r"params\[0\]: ndarray\. Convert .*as_tensor"),
    "a boolean": ({"params": {"a": True}}, TypeError, r"got params\['a'\]: bool\. Pass floating"),
    # targets
    "mse shape": ({"y": Y[:, :1]}, ValueError, r"outputs: \[4, 2\], y: \[4, 1\]\. Reshape"),
    "mse integers": ({"y": Y.long()}, TypeError, "y must be floating-point"),
    "mse nan": ({"y": Y * math.nan}, ValueError, "y must be finite"),
    "mse tree": ({"y": {"a": Y}}, TypeError, "y must be a tensor for this loss; got dict"),
    "class too large": (
        {"criterion": nn.CrossEntropyLoss(), "y": CLASSES + 1},
        ValueError,
        "must lie in 0 to 1 for 2 outputs; got indices from 1 to 2",
    ),
    "class negative": (
        {"criterion": nn.CrossEntropyLoss(), "y": CLASSES - 1},
        ValueError,
        "indices from -1 to 0",
    ),
    "all ignored": (
        {"criterion": nn.CrossEntropyLoss(ignore_index=1), "y": torch.ones_like(CLASSES)},
        ValueError,
        "newton_step: a weighted mean needs a target of positive weight",
    ),
    "class weights": (
        {"criterion": nn.CrossEntropyLoss(weight=torch.tensor([1.0, -3.0])), "y": CLASSES},
        ValueError,
        "newton_step: weight must hold finite numbers ≥ 0; got numbers from -3 to 1",
    ),
    "no variance": (
        {"criterion": nn.GaussianNLLLoss()},
        TypeError,
        r"newton_step: y must be a tuple \(target, var\)",
    ),
    "class column": (
        {"criterion": nn.CrossEntropyLoss(), "y": CLASSES[:, None]},
        ValueError,
        r"class indices in y must have shape \[N\]",
    ),
    "class int32": (
        {"criterion": nn.CrossEntropyLoss(), "y": CLASSES.int()},
        TypeError,
        "must be int64.*int32",
    ),
    "probabilities shape": (
        {"criterion": nn.CrossEntropyLoss(), "y": Y[:, :1]},
        ValueError,
        "shape of the model's outputs",
    ),
    "probabilities negative": (
        {"criterion": nn.CrossEntropyLoss(), "y": Y - 1},
        ValueError,
        "must not be negative",
    ),
    "cross-entropy outputs": (
        {"model_fn": lambda p, x: linear(p, x)[:, 0], "criterion": cross_entropy(), "y": CLASSES},
        ValueError,
        r"needs outputs of shape \[N, C\] or \[N, C, …\]; got outputs: \[4\]",
    ),
    "bce range": ({"criterion": nn.BCEWithLogitsLoss(), "y": 2 * Y}, ValueError, r"\[0, 1\]"),
    "bce shape": ({"criterion": nn.BCEWithLogitsLoss(), "y": Y[:, 0]}, ValueError, "shape"),
    # the criterion
    "a class": ({"criterion": nn.MSELoss}, TypeError, "criterion must be a loss function.*MSELoss"),
    "a weight": (
        {"criterion": 10.0},
        TypeError,
        r"got 10.0. A number is no loss: .* write ddnewton.weighted\(torch.nn.MSELoss\(\), 10.0\)",
    ),
    "a string": ({"criterion": "mse"}, TypeError, "criterion must be a loss function; got 'mse'"),
    "reduction none": ({"criterion": nn.MSELoss(reduction="none")}, ValueError, "reduction='none'"),
    "partial none": (
        {"criterion": partial(F.mse_loss, reduction="none")},
        ValueError,
        "reduction='none'",
    ),
    "other loss, none": (
        {"criterion": nn.SoftMarginLoss(reduction="none")},
        ValueError,
        "reduction='none'",
    ),
    "record none": (
        {"criterion": lambda f, y: (f - y) ** 2},
        ValueError,
        r"one number; got a tensor of shape \[4, 2\]. Return its .mean\(\) or .sum\(\)",
    ),
    "no tensor from it": ({"criterion": lambda f, y: 1.0}, TypeError, "scalar tensor; got float"),
    "root of a sum": (
        {"criterion": lambda f, y: (f - y).square().sum().sqrt()},
        ValueError,
        "Hessian without entries between samples; got a criterion in which samples interact",
    ),
    "samples mixed in the loss": (
        {"criterion": lambda f, y: (f - y).mean().square()},
        ValueError,
        "samples interact.*classes on axis 1 and ignore_index",
    ),
    "concave": (
        {"criterion": lambda f, y: -(f - y).square().mean()},
        ValueError,
        "convex in the outputs; got a Hessian eigenvalue of -1",
    ),
    "saddle": (
        {"criterion": lambda f, y: (f[:, 0] * f[:, 1]).mean()},
        ValueError,
        "must be convex",
    ),
    "loss nan": ({"criterion": lambda f, y: (f * math.nan).mean()}, ValueError, "loss must be fin"),
    # damping, complement and the other options
    "damping negative": ({"damping": -1.0}, ValueError, "damping must be a number ≥ 0; got -1.0"),
    "damping nan": ({"damping": math.nan}, ValueError, "damping must be a number ≥ 0; got nan"),
    "damping None": ({"damping": None}, TypeError, "damping must be a number ≥ 0; got None"),
    "damping string": ({"damping": "1"}, TypeError, "damping must be a number"),
    "damping vector": ({"damping": torch.ones(3)}, TypeError, r"a tensor of shape \[3\]"),
    "rule's shape": (
        {"damping": lambda evals, *_: torch.ones(3)},
        ValueError,
        r"for each of the K = 4 directions; got shape \[3\]",
    ),
    "rule's sign": (
        {"damping": lambda evals, *_: -torch.ones_like(evals)},
        ValueError,
        "must not be negative or nan; got -1.0",
    ),
    "rule's nan": (
        {"damping": lambda evals, *_: math.nan * evals},
        ValueError,
        "must not be negative or nan; got nan",
    ),
    "rule's type": ({"damping": lambda *_: 1.0}, TypeError, "return a tensor.*got float"),
    "rule's dtype": ({"damping": lambda evals, *_: evals > 0}, TypeError, "real numbers.*bool"),
    "a factory of rules": (
        {"damping": signal_to_noise},
        TypeError,
        r"damping must be .*; got signal_to_noise\. If it makes .* call it: signal_to_noise\(",
    ),
    "a rule of two": ({"damping": lambda evals, evecs: evals}, TypeError, "damping must be"),
    "a group's factory": (
        {"groups": [Group("W", damping=relative)]},
        TypeError,
        r"groups\[0\]\.damping must be .*; got relative",
    ),
    "what adapts": (
        {"damping": held_out()},
        TypeError,
        "a number or a rule for a single step; got a record Adaptation. What adapts is for fit",
    ),
    "a module for a function": (
        {"model_fn": nn.Linear(3, 2)},
        TypeError,
        "must take params and X; got the module Linear. .*functional_call",
    ),
    "parameters and data swapped": (
        {"params": torch.arange(4000), "X": PARAMS["W"]},
        TypeError,
        "floating-point tensors only; got params: torch.int64",
    ),
    "complement zero": ({"complement": 0.0}, ValueError, "complement must be positive"),
    "complement negative": ({"complement": -1.0}, ValueError, "complement must be a number"),
    "complement nan": ({"complement": math.nan}, ValueError, "complement must be a number"),
    "complement string": ({"complement": "1"}, TypeError, "complement must be a number"),
    "gram": ({"gram": "sparse"}, ValueError, "gram must be one of .auto., .structured., .dense."),
    "chunk zero": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1; got 0"),
    "chunk float": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer"),
    # select
    "repeats": ({"select": lambda evals: [7, 7]}, ValueError, r"distinct.*repeats in \[7, 7\]"),
    "repeats from the end": ({"select": lambda evals: [7, -1]}, ValueError, "repeats"),
    "no indices": ({"select": lambda evals: [0.5]}, TypeError, "numbers of torch.float32"),
    "a string for indices": ({"select": lambda evals: "all"}, TypeError, "select must return"),
    "too large": ({"select": lambda evals: [8]}, ValueError, "indices from 8 to 8. There are 8"),
    "too small": ({"select": lambda evals: [-9]}, ValueError, "indices from -9"),
    "mask": ({"select": lambda evals: evals[1:] > 0}, ValueError, "a mask of length 7"),
    "matrix": ({"select": lambda evals: [[0, 1]]}, ValueError, r"shape \[1, 2\]"),
    "a number": ({"select": lambda evals: 3}, ValueError, r"shape \[\]"),
    "not callable": ({"select": 3}, TypeError, "select must be a function"),
    # the outputs
    "outputs nan": ({"model_fn": lambda p, x: linear(p, x) / 0}, ValueError, "must be finite"),
    "outputs without samples": (
        {"model_fn": lambda p, x: linear(p, x).sum()},
        ValueError,
        r"samples on axis 0; got outputs: \[\] for a batch of 4",
    ),
    "outputs transposed": (
        {"model_fn": lambda p, x: linear(p, x).T},
        ValueError,
        r"outputs: \[2, 4\] for a batch of 4",
    ),
    "outputs squeezed": (
        {"model_fn": lambda p, x: linear(p, x)[:, :1].squeeze(), "y": Y[:, 0]},
        ValueError,
        r"outputs: \[\] for a batch of 1\. Keep the sample axis",
    ),
    "outputs of integers": ({"model_fn": lambda p, x: linear(p, x).long()}, TypeError, "int64"),
    "outputs in a tuple": ({"model_fn": lambda p, x: (x, x)}, TypeError, "one tensor; got tuple"),
    "no outputs": ({"model_fn": lambda p, x: linear(p, x)[:, :0]}, ValueError, "at least one"),
    "derivatives nan": (
        {"model_fn": lambda p, x: (0 * linear(p, x)).abs().sqrt(), "y": Y + 1},
        ValueError,
        "derivatives of model_fn must be finite",
    ),
    "no function": ({"model_fn": "linear"}, TypeError, "model_fn must be a function"),
}


@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_refusals_say_what_and_why(case):
    changes, error, message = CASES[case]
    with pytest.raises(error, match=message):
        step(**changes)


@pytest.mark.parametrize("case", ["counts differ", "damping negative", "repeats"])
def test_refusals_name_the_function_that_was_called(case):
    changes, error, _ = CASES[case]
    arguments = [linear, PARAMS, X, changes.get("y", Y), F.mse_loss, changes.get("damping", 1.0)]
    with pytest.raises(error, match=r"^newton_step_and_info: "):
        newton_step_and_info(*arguments, select=changes.get("select"))


NUMBERS = {
    "fit": lambda params: fit(linear, params, X, Y),
    "newton_step": lambda params: newton_step(linear, params, X, Y, F.mse_loss, 1.0),
    "prepare": lambda params: prepare(linear, params, X),
    "init": lambda params: directional_newton(linear, F.mse_loss).init(params),
    "update": lambda params: directional_newton(linear, F.mse_loss).update(params, None, X, Y),
    "covariance": lambda params: covariance(linear, params, X, Y, F.mse_loss),
    "ggn_eigvalsh": lambda params: ggn_eigvalsh(linear, params, X, Y, F.mse_loss),
}


@pytest.mark.parametrize("function", NUMBERS)
def test_numbers_among_the_parameters_are_refused_everywhere_with_the_tensor_to_pass(function):
    with pytest.raises(TypeError, match=f"^{function}: {NUMBER}"):
        NUMBERS[function](PARAMS | {"c": 1.0})


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize(
    "model_fn",
    [
        lambda p, x: linear(p, x - x.mean(0)),
        lambda p, x: linear(p, x).softmax(0),
        lambda p, x: linear(p, x) + linear(p, x).flip(0),
        lambda p, x: linear(p, x).cumsum(0),
        # The samples mix through a weight that is zero: their values agree, their slopes do not.
        lambda p, x: linear(p, x) + (p["b"] - p["b"].detach()) * x.mean(),
    ],
    ids=["centred", "softmax", "flip", "cumsum", "derivative"],
)
def test_models_that_mix_samples_are_refused(model_fn, chunk_size):
    with pytest.raises(ValueError, match=r"must not depend on another's.*samples alone"):
        step(model_fn=model_fn, chunk_size=chunk_size)


def network(*layers):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 6), *layers, nn.Linear(6, 2))
    return module, lambda p, x: functional_call(module, p, (x,))


STATEFUL = {
    "batch norm": (nn.BatchNorm1d(6), r"batch normalisation \(batch_norm\) in train mode"),
    "no running statistics": (
        nn.BatchNorm1d(6, track_running_stats=False).eval(),
        r"batch normalisation \(batch_norm\) in train mode",
    ),
    "nested": (nn.Sequential(nn.Tanh(), nn.BatchNorm1d(6)), r"in BatchNorm1d '2\.1'"),
    "lazily named": (nn.BatchNorm1d(6), "in BatchNorm1d '2'. Call .eval"),
    "dropout": (nn.Dropout(0.5), "dropout in train mode.* in Dropout '2'"),
    "alpha dropout": (nn.AlphaDropout(0.5), "alpha_dropout in train mode"),
    "rrelu": (nn.RReLU(), "rrelu in train mode"),
}


@pytest.mark.parametrize("case", STATEFUL, ids=STATEFUL)
def test_modules_in_train_mode_are_refused_by_name_and_left_as_they_were(case):
    layer, message = STATEFUL[case]
    module, model_fn = network(layer)
    before, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        step(model_fn=model_fn, params=dict(module.named_parameters()))
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_same_modules_in_eval_mode_are_fine():
    for layer, _ in STATEFUL.values():
        module, model_fn = network(layer)
        if getattr(layer, "track_running_stats", True):
            module.eval()
            assert step(model_fn=model_fn, params=dict(module.named_parameters()))


def test_dropout_of_nothing_is_fine():
    module, model_fn = network(nn.Dropout(0.0))
    assert step(model_fn=model_fn, params=dict(module.named_parameters()))


def test_a_module_that_counts_its_calls_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x

    module, model_fn = network(Counting())
    with pytest.raises(ValueError, match="a buffer that the model writes to in Counting '2'"):
        step(model_fn=model_fn, params=dict(module.named_parameters()))
    assert module[2].calls == 0


def add_to_a_view(self, x):
    self.seen[0].add_(1)
    return x


def set_an_item(self, x):
    self.seen[1] = 2.0
    return x


def put_another_in_its_place(self, x):
    self.seen = self.seen + 1
    return x


def write_by_out(self, x):
    torch.add(self.seen, 1, out=self.seen)
    return x


@pytest.mark.parametrize(
    "forward", [add_to_a_view, set_an_item, put_another_in_its_place, write_by_out]
)
def test_buffers_that_change_any_other_way_are_put_back(forward):
    """The module may be in the closure, a partial, a method or an attribute."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.tensor([0.0, math.nan]))

    Writing.forward = forward
    module, model_fn = network(Writing())
    params = dict(module.named_parameters())

    class Callable:
        def __init__(self):
            self.module = module

        def call(self, p, x):
            return functional_call(self.module, p, (x,))

        __call__ = call

    def with_module(module, p, x):
        return functional_call(module, p, (x,))

    ways = [model_fn, partial(with_module, module), Callable(), Callable().call]
    before = module[2].seen
    for way in ways:
        with pytest.raises(ValueError, match="a change of the buffer 'seen' of Writing"):
            step(model_fn=way, params=params)
        assert module[2].seen is before
        assert before[0] == 0
        assert before[1].isnan()


def make_it_anew(self, x):
    self.table = torch.arange(6.0).cos().to(x.dtype)
    self.cache = x * 0
    return x * self.table


def test_buffers_made_anew_to_the_same_values_are_fine_and_put_back():
    class Table(nn.Module):
        forward = make_it_anew

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(6.0).cos())
            self.register_buffer("cache", None)

    module, model_fn = network(Table())
    table = module[2].table
    assert step(model_fn=model_fn, params=dict(module.named_parameters()))
    assert module[2].table is table
    assert module[2].cache is None


def test_buffers_that_cannot_be_copied_are_left_alone():
    module, _ = network(nn.BatchNorm1d(6).eval())
    params = {name: p.detach() for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    skeleton = copy.deepcopy(module).to("meta")
    skeleton.register_buffer("sparse", torch.eye(2).to_sparse())
    skeleton.append(nn.LazyBatchNorm1d().eval())

    def model_fn(p, x):
        if x.ndim > 9:
            return later
        return functional_call(module, (p, buffers), (x,)) + 0 * len(skeleton)

    assert step(model_fn=model_fn, params=params)
    later = None


def test_spectral_norm_in_train_mode_is_refused_and_put_back():
    module, model_fn = network(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"a change of the buffer '_[uv]' of _SpectralNorm"):
        step(model_fn=model_fn, params=dict(module.named_parameters()))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    module.eval()
    assert step(model_fn=model_fn, params=dict(module.named_parameters()))


def test_random_functions_are_refused_before_they_draw():
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match="the random function randn_like"):
        step(model_fn=lambda p, x: linear(p, x + torch.randn_like(x)))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_dropout_inside_attention_and_recurrent_layers_is_refused():
    attention = nn.MultiheadAttention(3, 1, dropout=0.5, batch_first=True)
    recurrent = nn.LSTM(3, 3, num_layers=2, dropout=0.5, batch_first=True)
    sequences = torch.linspace(-1, 1, 24).reshape(4, 2, 3)
    for module, call in (
        (attention, lambda p, x: functional_call(attention, p, (x, x, x))[0]),
        (recurrent, lambda p, x: functional_call(recurrent, p, (x,))[0]),
    ):
        with pytest.raises(
            ValueError, match=f"in train mode, which is .* in {type(module).__name__}"
        ):
            step(
                model_fn=call, params=dict(module.named_parameters()), X=sequences, y=sequences
            )  # fmt: skip


@pytest.mark.parametrize(
    ("factory", "argument", "error", "message"),
    [
        (top_k, 0, ValueError, "top_k: k must be at least 1; got 0"),
        (top_k, 2.5, TypeError, "top_k: k must be an integer; got float"),
        (top_k, True, TypeError, "top_k: k must be an integer; got bool"),
        (above, -1.0, ValueError, "above: threshold must be a number ≥ 0"),
        (above, "1", TypeError, "above: threshold must be a number ≥ 0"),
        (energy, 1.5, ValueError, "energy: fraction must lie in 0 to 1; got 1.5"),
        (energy, math.nan, ValueError, "energy: fraction must be a number"),
        (cross_entropy, "none", ValueError, "reduction='none'"),
        (cross_entropy, "average", ValueError, "reduction='average'"),
    ],
)
def test_factories_refuse_at_once(factory, argument, error, message):
    with pytest.raises(error, match=message):
        factory(argument)


@pytest.mark.parametrize("groups", [per_layer, per_parameter])
@pytest.mark.parametrize("params", [nn.Linear(3, 2), {}, nn.Linear(3, 2).parameters()])
def test_blocks_are_made_of_parameters_alone(groups, params):
    with pytest.raises((TypeError, ValueError), match=f"{groups.__name__}: params must hold"):
        groups(params)


def test_a_message_shows_the_beginning_of_what_is_long():
    with pytest.raises(TypeError, match=r"select must be a function.*…") as caught:
        step(select=list(range(1000)))
    assert len(str(caught.value)) < 600
