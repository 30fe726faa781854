"""Checks that a sample's output depends on no other sample, nor on chance, nor on earlier calls.

Where it does, per-sample derivatives are wrong and nothing shows it, so it is checked twice. While
the model runs for the first time, a `TorchFunctionMode` stops the calls that are known to break
the rule, before they change a buffer or the random state, and names the module. Whatever else
mixes samples is found by comparing the outputs and derivatives of the batch with those of its
samples, each evaluated as a batch of one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.checks import TERMS_REMEDY, check_outputs, check_place
from ddnewton.inputs.memory import CHUNK_BYTES
from ddnewton.linearize.calls import called, with_dense_samples
from ddnewton.linearize.model import Model
from ddnewton.linearize.module_state import kept
from ddnewton.linearize.widening import cast_rounding
from ddnewton.transforms import any_known, unwrapped
from ddnewton.trees import batches, real_outputs, sample_count, take
from ddnewton.types import ModelFn, PyTree

RANDOM_FUNCTIONS = {
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
    *("normal", "bernoulli", "multinomial", "poisson", "gumbel_softmax"),
    *("normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_"),
    *("cauchy_", "geometric_"),
}

Argument: TypeAlias = tuple[int, str, object]
_PROBABILITY, _TRAINING = (1, "p", 0.5), (2, "training", True)
_RECURRENT = ((5, "dropout", 0.0), (6, "train", False))
DROPOUTS: dict[str, tuple[Argument, Argument]] = {
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), (_PROBABILITY, _TRAINING)),
    **dict.fromkeys(
        ("alpha_dropout", "feature_alpha_dropout"), (_PROBABILITY, (2, "training", False))
    ),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _RECURRENT),
    "rrelu": ((2, "upper", 1 / 3), (3, "training", False)),
    "scaled_dot_product_attention": ((4, "dropout_p", 0.0), (4, "dropout_p", 0.0)),
    "multi_head_attention_forward": ((10, "dropout_p", 0.0), (13, "training", True)),
}
"""The arguments of a function that hold its probability and its train flag: position, name and
default of each. It is random where both are true."""

CANCELLATION_ROUNDINGS = 1024.0
"""The error of a derivative that cancels to zero, in roundings of the terms that cancel."""

WATCHED_SAMPLES, RESULTS_SHARE = 1024, 16
"""On how many samples at least a model is run at a time, and which part of a chunk its results
are to fill where there are more."""

BATCH_NORM = "batch normalisation (batch_norm) in train mode, which mixes the samples,"
INDEPENDENCE_RULE = (
    "one sample's output must not depend on another's, on chance, or on the call before"
)


class Watch(TorchFunctionMode):
    """Refuse, inside a model, the calls that break the rule of independence, before they run.

    ``rounding`` is the eps of the narrowest dtype that a call has cast to, 0 without casts, and
    ``result_bytes`` the size of all that calls have returned.
    """

    def __init__(self, rule: str = INDEPENDENCE_RULE) -> None:
        super().__init__()
        self.rule = rule
        self.rounding = 0.0
        self.result_bytes = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        got = _violation(func, args, kwargs)
        if got:
            got += _running_module()
            raise BadValue(sentence(self.rule, got, "Call .eval() on the module first."))
        result = func(*args, **kwargs)
        # What an assignment writes to is its first argument.
        written = args[0] if result is None and args else result
        self.rounding = max(self.rounding, cast_rounding(written, (*args, *kwargs.values())))
        if type(result) is Tensor:
            self.result_bytes += unwrapped(result).nbytes
        return result


def _violation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Describe how a call breaks the rule; the empty string if it does not."""
    name = getattr(func, "__name__", "")

    def argument(position: int, key: str, default: object = False) -> Any:
        return args[position] if len(args) > position else kwargs.get(key, default)

    # Normalisation in train mode: over the batch, or with statistics that it updates.
    if name == "batch_norm" and argument(5, "training"):
        return BATCH_NORM
    running = argument(1, "running_mean", None) is not None
    if name == "instance_norm" and argument(5, "use_input_stats") and running:
        return "instance normalisation in train mode, which updates its running statistics,"
    # Chance: dropout in train mode, and random numbers without a generator of their own.
    if name in DROPOUTS and all(argument(*flag) for flag in DROPOUTS[name]):
        return f"{name} in train mode, which is random,"
    if name in RANDOM_FUNCTIONS and kwargs.get("generator") is None:
        return f"the random function {name}"
    # Writing in place to a buffer, by a method such as add_.
    if name.endswith("_") and not name.endswith("__") and args and _is_buffer(args[0]):
        # Batch normalisation counts its batches before it looks at them.
        counting = isinstance(_modules_on_the_stack()[0], nn.modules.batchnorm._BatchNorm)
        return BATCH_NORM if counting else "a buffer that the model writes to"
    return ""


def _modules_on_the_stack() -> list[nn.Module]:
    """Return the modules whose methods are running, innermost first."""
    modules: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (not modules or modules[-1] is not owner):
            modules.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    return modules


def _is_buffer(tensor: Any) -> bool:
    """Return whether a tensor is a buffer of the module that is running."""
    modules = _modules_on_the_stack()[:1]
    return any(buffer is tensor for module in modules for buffer in module.buffers(recurse=False))


def _running_module() -> str:
    """Return “ in” and the class and name of the running module, as in its outermost parent."""
    modules = _modules_on_the_stack()
    if not modules:
        return ""
    culprit, root = modules[0], modules[-1]
    names = [name for name, module in root.named_modules() if module is culprit and name]
    return f" in {type(culprit).__name__}" + (f" {names[0]!r}" if names else "")


def evaluate(
    model_fn: ModelFn, params: PyTree, X: PyTree, chunk_size: int | None, first: int | None = None
) -> Model:
    """Run the model on a batch, some samples at a time; refuse calls that break the rule.

    With ``first`` it is run on so many samples alone.
    """
    (checked, _), (unchecked, X) = (with_dense_samples(f, X) for f in kept(model_fn))
    samples = take(X, slice(0, first))
    n = sample_count(samples)
    first_size = chunk_size or (n if torch.compiler.is_compiling() else WATCHED_SAMPLES)

    # Watched call by call, and kept without the graph that a model with derivatives inside records.
    def evaluated(way: Callable[[ModelFn], ModelFn]) -> Model:
        outputs, watch, is_complex = [], Watch(), False
        function, watched = way(unchecked), way(checked)
        parts, size = batches(samples, first_size), first_size
        while parts:
            batch, *parts = parts
            with watch:
                part = watched(params, batch)
            # Complex outputs count as pairs of reals.
            if isinstance(part, Tensor) and part.is_complex() and part.ndim:
                part, is_complex = torch.view_as_real(part.resolve_conj()), True
            check_place(part, params)
            check_outputs(part, sample_count(batch))
            outputs.append(part.detach())
            # The first samples show how many more may be run at a time.
            if len(outputs) == 1 and parts and chunk_size is None:
                size = _samples_at_once(watch, size)
                parts = batches(take(samples, slice(first_size, None)), size)
        function = real_outputs(function) if is_complex else function
        whole = torch.cat(outputs)
        at_once = size if n > size else None
        return Model(function, params, samples, whole, is_complex, watch.rounding, None, at_once)

    whole_batch = first_size >= n == sample_count(X)
    return called(evaluated, unchecked, params, X, whole_batch)


def _samples_at_once(watch: Watch, count: int) -> int:
    """Return so many samples that their results fill a part of a chunk, given those of some.

    The results of a model with derivatives inside are as large as several of those that are seen.
    """
    return max(count, count * (CHUNK_BYTES // RESULTS_SHARE) // max(1, watch.result_bytes))


class SamplesMix(BadValue):
    """Outputs or derivatives of a batch are not those of its samples, each evaluated by itself."""


def check_independent(
    of_batch: Float[Tensor, "..."],
    of_samples: Float[Tensor, "..."],
    scale: Float[Tensor, "*_"],
    floor: Float[Tensor, ""],
    quantity: str,
    rounding: float = 0.0,
) -> None:
    """Require a quantity of a batch to be that of its samples by themselves, up to rounding.

    Rounding is √eps of the quantity's scale, one number or one for every entry, plus some eps of
    the floor: the scale of the terms that may have cancelled in it. eps is that of its dtype, or
    what the model rounds to inside.
    """
    error, eps = (of_batch - of_samples).abs(), max(torch.finfo(of_batch.dtype).eps, rounding)
    near = error <= math.sqrt(eps) * scale + CANCELLATION_ROUNDINGS * eps * floor
    if any_known(~near):
        apart = float(unwrapped(error).amax())
        got = f"{quantity} of the batch and of its samples alone, {apart:.2g} apart"
        remedy = (
            "Something in model_fn mixes the samples: put normalisation layers in eval mode and "
            f"compute nothing across axis 0. {TERMS_REMEDY}"
        )
        raise SamplesMix(sentence(INDEPENDENCE_RULE, got, remedy))
