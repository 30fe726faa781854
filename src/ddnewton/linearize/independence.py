"""One sample's output must not depend on another's, nor on chance, nor leave a trace.

Per-sample derivatives are wrong without a sign where this fails, so it is checked twice. While
the model runs for the first time, a `TorchFunctionMode` stops the calls that are known to break
it, before they touch a buffer or the random state, and names the module. Whatever else mixes
samples is found by comparing the batch with its samples taken alone, in value and in derivative.
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
from ddnewton.inputs.checks import check_outputs
from ddnewton.linearize.model import Model
from ddnewton.transforms import unwrapped
from ddnewton.trees import batches, on_copies, sample_count
from ddnewton.types import ModelFn, PyTree

RANDOM = {
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
    *("normal", "bernoulli", "multinomial", "poisson", "gumbel_softmax"),
    *("normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_"),
    *("cauchy_", "geometric_"),
}

Option: TypeAlias = tuple[int, str, object]
_P, _TRAINING = (1, "p", 0.5), (2, "training", True)
_RECURRENT = ((5, "dropout", 0.0), (6, "train", False))
DROPOUTS: dict[str, tuple[Option, Option]] = {
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), (_P, _TRAINING)),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), (_P, (2, "training", False))),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _RECURRENT),
    "rrelu": ((2, "upper", 1 / 3), (3, "training", False)),
    "scaled_dot_product_attention": ((4, "dropout_p", 0.0), (4, "dropout_p", 0.0)),
    "multi_head_attention_forward": ((10, "dropout_p", 0.0), (13, "training", True)),
}
"""Where a function takes its probability and its train flag: position, name, default."""

CANCELLATION_ROUNDINGS = 1024.0
"""How many roundings of what cancels may be left of a derivative that vanishes."""

BATCH_NORM = "batch normalisation (batch_norm) in train mode, which mixes the samples,"
INDEPENDENCE_RULE = (
    "one sample's output must not depend on another's, on chance, or on the call before"
)


class Watch(TorchFunctionMode):
    """Refuse the calls inside a model that break the rule, before they run."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        got = _offence(func, args, kwargs)
        if got:
            raise BadValue(
                sentence(INDEPENDENCE_RULE, f"{got}{_place()}", "Call .eval() on the module first.")
            )
        return func(*args, **kwargs)


def _offence(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return what is wrong with a call, or nothing."""
    name = getattr(func, "__name__", "")

    def option(position: int, key: str, default: object = False) -> Any:
        return args[position] if len(args) > position else kwargs.get(key, default)

    if name == "batch_norm" and option(5, "training"):
        return BATCH_NORM
    running = option(1, "running_mean", None) is not None
    if name == "instance_norm" and option(5, "use_input_stats") and running:
        return "instance normalisation in train mode, which updates its running statistics,"
    if name in DROPOUTS and all(option(*flag) for flag in DROPOUTS[name]):
        return f"{name} in train mode, which is random,"
    if name in RANDOM and kwargs.get("generator") is None:
        return f"the random function {name}"
    if name.endswith("_") and not name.endswith("__") and args and _is_buffer(args[0]):
        # Batch normalisation counts its batches before it looks at them.
        counting = isinstance(_modules_on_the_stack()[0], nn.modules.batchnorm._BatchNorm)
        return BATCH_NORM if counting else "a buffer that the model writes to"
    return ""


def _modules_on_the_stack() -> list[nn.Module]:
    """Return the modules whose methods are running, innermost first."""
    found: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (not found or found[-1] is not owner):
            found.append(owner)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _is_buffer(tensor: Any) -> bool:
    """Return whether a tensor is a buffer of the module that is running."""
    modules = _modules_on_the_stack()[:1]
    return any(buffer is tensor for module in modules for buffer in module.buffers(recurse=False))


def _place() -> str:
    """Return the name of the module that is running, as its outermost parent knows it."""
    modules = _modules_on_the_stack()
    if not modules:
        return ""
    culprit, root = modules[0], modules[-1]
    names = [name for name, module in root.named_modules() if module is culprit and name]
    return f" in {type(culprit).__name__}" + (f" {names[0]!r}" if names else "")


def evaluate(model_fn: ModelFn, params: PyTree, X: PyTree, chunk_size: int | None) -> Model:
    """Run the model on a batch, watched for what would make its outputs no use."""
    model_fn = on_copies(model_fn)
    outputs = []
    for batch in batches(X, chunk_size):
        with Watch():
            part = model_fn(params, batch)
        check_outputs(part, sample_count(batch))
        outputs.append(part)
    return Model(model_fn, params, X, torch.cat(outputs))


class SamplesMix(BadValue):
    """A batch is not what its samples are alone."""


def check_independent(
    together: Float[Tensor, "..."],
    alone: Float[Tensor, "..."],
    scale: Float[Tensor, ""],
    floor: Float[Tensor, ""],
    what: str,
) -> None:
    """Require that a batch and its samples taken alone agree, up to rounding.

    Rounding is √eps of their own scale, and eps of the floor: of what cancelled on the way.
    """
    error = unwrapped((together - alone).abs().amax())
    eps = _rounding(together)
    if not (
        error <= unwrapped(math.sqrt(eps) * scale + CANCELLATION_ROUNDINGS * eps * floor)
    ).all():
        got = f"{what} of the batch and of its samples alone, {float(error.max()):.2g} apart"
        remedy = (
            "Something in model_fn mixes the samples: put normalisation layers in eval mode and "
            "compute nothing across axis 0."
        )
        raise SamplesMix(sentence(INDEPENDENCE_RULE, got, remedy))


def _rounding(tensor: Tensor) -> float:
    """Return the eps that two ways of computing the same are subject to."""
    # CUDA may compute float32 convolutions in TF32, with 10 bits.
    coarse = tensor.is_cuda and tensor.dtype == torch.float32
    return 2.0**-10 if coarse else torch.finfo(tensor.dtype).eps
