"""Checks of the arguments of the public functions, made before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from ddnewton.errors import BadType, BadValue, NotFinite, sentence
from ddnewton.inputs.callables import accepts_arguments, not_samples
from ddnewton.transforms import any_known, any_not_finite, unwrapped
from ddnewton.trees import named_leaves, tree_leaves
from ddnewton.types import PyTree

TERMS_REMEDY = (
    "Residuals of several kinds, each with its own points, are terms of the loss: pass model_fn, X "
    'and y as dicts, such as model_fn={"inside": residual, "edge": trace}.'
)


def check_params(params: PyTree) -> None:
    """Require at least one leaf, and floating-point or complex tensors throughout."""
    leaves = tree_leaves(params)
    if not leaves:
        remedy = "Pass a pytree of tensors, such as dict(module.named_parameters())."
        raise BadValue(sentence("params must hold at least one tensor", repr(params), remedy))
    if all(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in leaves):
        rule, got = "params must hold at least one number", "empty tensors only"
        raise BadValue(sentence(rule, got, "Check how the parameters were made."))
    # Every leaf is differentiated, so a counter or a mask has no place here.
    if all(isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves):
        _check_one_device(params)
        return
    for path, leaf in named_leaves(params):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            raise BadType(_no_parameter(f"params{path}", leaf))


def _check_one_device(params: PyTree) -> None:
    """Require parameters on one device, as their columns are multiplied with each other."""
    devices: dict[torch.device, str] = {}
    for path, leaf in named_leaves(params):
        devices.setdefault(leaf.device, f"params{path}")
    if len(devices) > 1:
        got = ", ".join(f"{name} on {device}" for device, name in devices.items())
        remedy = "Move them with .to(device); X and y may be anywhere."
        raise BadValue(sentence("params must be on one device", got, remedy))


def check_place(outputs: object, params: PyTree) -> None:
    """Require outputs, where these are a tensor, on the device of the parameters."""
    leaves = tree_leaves(params)
    if isinstance(outputs, Tensor) and leaves and outputs.device != leaves[0].device:
        rule = "model_fn must return outputs on the device of params"
        got = f"outputs on {outputs.device}, params on {leaves[0].device}"
        raise BadValue(sentence(rule, got, "Move what model_fn refers to with .to(device)."))


def _no_parameter(name: str, leaf: object) -> str:
    """Return the message for a leaf of the parameters that is no floating-point tensor."""
    got = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
    remedy = (
        "Pass floating-point tensors, such as dict(module.named_parameters()), and keep what is "
        "not trained in model_fn."
    )
    # A number, or an array, is a tensor as soon as it is wrapped.
    if isinstance(leaf, Tensor):
        remedy = "Convert it with .double() if it is trained, or else keep it in model_fn."
    elif isinstance(leaf, Real) and not isinstance(leaf, bool):
        number = float(leaf)
        got = f"{got} {number}"
        remedy = (
            f"Pass a tensor for every number that is trained: torch.tensor({number}), or "
            f"torch.tensor({number}, dtype=torch.float64) for 16 digits. Keep others in model_fn."
        )
    elif hasattr(leaf, "__array__"):
        remedy = "Convert it with torch.as_tensor, to floating-point numbers."
    return sentence("params must hold floating-point tensors only", f"{name}: {got}", remedy)


def check_batch(*, least: int = 1, **trees: PyTree) -> None:
    """Require tensors that all hold the same number of samples on axis 0, at least so many."""
    # One tensor each, of as many samples, is most that is ever passed.
    tensors = [x for x in trees.values() if isinstance(x, Tensor) and x.ndim]
    n = tensors[0].shape[0] if tensors else 0
    if len(tensors) == len(trees) and n >= least and all(x.shape[0] == n for x in tensors):
        return
    # The number of samples of every leaf, by its name in the message.
    counts: dict[str, int] = {}
    names = " and ".join(trees)
    for name, tree in trees.items():
        leaves = named_leaves(tree)
        if not leaves:
            rule = f"{name} must hold at least one tensor"
            raise BadValue(sentence(rule, repr(tree), "Pass a tensor or a pytree of tensors."))
        for path, leaf in leaves:
            if not isinstance(leaf, Tensor):
                rule = "X and y must be tensors or pytrees of tensors"
                raise BadType(sentence(rule, *not_samples(name, tree, path, leaf)))
            counts[name + path] = _count_samples(name + path, leaf)
    # One number for all of them, and not zero.
    if min(counts.values()) != max(counts.values()):
        got = ", ".join(f"{name}: {count}" for name, count in counts.items())
        rule = f"{names} must hold the same number of samples"
        raise BadValue(sentence(rule, got, f"Slice them to a common axis 0. {TERMS_REMEDY}"))
    if min(counts.values()) < least:
        rule = f"{names} must hold at least one sample"
        raise BadValue(sentence(rule, "0", "Skip the empty batch."))


def _count_samples(name: str, leaf: Tensor) -> int:
    """Return the length of axis 0 of a leaf; raise if it has none."""
    if leaf.ndim == 0:
        rule = "every tensor in X and y must have the samples on axis 0"
        got = f"{name}: a tensor without axes"
        raise BadValue(sentence(rule, got, "Give it an axis, or keep constants in model_fn."))
    return int(leaf.shape[0])


def check_outputs(outputs: object, samples: int) -> None:
    """Require finite floating-point outputs with the samples on axis 0."""
    # A tensor of real numbers with a row a sample; only then can its values be looked at.
    if not isinstance(outputs, Tensor):
        rule = "model_fn must return one tensor"
        remedy = f"Pick or concatenate the outputs of a sample. {TERMS_REMEDY}"
        raise BadType(sentence(rule, type(outputs).__name__, remedy))
    if not outputs.is_floating_point():
        rule = "model_fn must return floating-point outputs"
        raise BadType(sentence(rule, outputs.dtype, "Return logits or real values."))
    check_sample_axis(outputs, samples)
    if outputs.numel() == 0:
        rule = "model_fn must return at least one output a sample"
        raise BadValue(sentence(rule, list(outputs.shape), "Check the model's last layer."))
    if any_not_finite(outputs):
        rule, got = "the outputs of model_fn must be finite", "nan or inf"
        raise NotFinite(sentence(rule, got, "Check params and X; lower the last step."))


class Independent(BadValue):
    """A model whose outputs depend on no parameter."""


def check_dependence(depends: bool) -> None:
    """Require an output to depend on a parameter."""
    if not depends:
        rule, got = "model_fn must use params", "outputs of which none depends on any parameter"
        remedy = (
            "No output depends on any parameter: let the model read params, by names that "
            "functional_call knows, and detach none on the way."
        )
        raise Independent(sentence(rule, got, remedy))


def check_sample_axis(outputs: Tensor, samples: int) -> None:
    """Require outputs with all samples on axis 0, for a single sample too."""
    if outputs.ndim == 0 or outputs.shape[0] != samples:
        rule = "the outputs of model_fn must have the samples on axis 0"
        got = f"outputs: {list(outputs.shape)} for a batch of {samples}"
        remedy = (
            "Keep the sample axis, also for one sample: squeeze(-1), not squeeze(). Points or "
            f"weights of samples are parts of X. {TERMS_REMEDY}"
        )
        raise BadValue(sentence(rule, got, remedy))


def check_derivatives(values: Tensor) -> None:
    """Require finite derivatives of the outputs."""
    if values.numel() and any_known(~(values.amax() - values.amin()).isfinite()):
        rule, got = "the derivatives of model_fn must be finite", "nan or inf"
        remedy = "Look for square roots, norms or logarithms at zero in model_fn."
        raise NotFinite(sentence(rule, got, remedy))


def check_functions(model_fn: object, select: object) -> None:
    """Require a function of two arguments, or one for every term, and a function or None."""
    # No module, unless its forward has two arguments.
    functions = model_fn.values() if isinstance(model_fn, Mapping) else [model_fn]
    for function in functions:
        if not callable(function):
            rule = "model_fn must be a function"
            remedy = "Pass model_fn(params, X) -> outputs, or a dict of such, one for every term."
            raise BadType(sentence(rule, repr(function), remedy))
        if isinstance(function, nn.Module) and not accepts_arguments(function.forward, 2):
            rule, got = "model_fn must take params and X", f"the module {type(function).__name__}"
            remedy = "Pass lambda p, x: torch.func.functional_call(module, p, (x,))."
            raise BadType(sentence(rule, got, remedy))
    check_select("select", select)


def check_select(name: str, select: object) -> None:
    """Require a rule that chooses directions, or None."""
    if select is not None and not callable(select):
        rule = f"{name} must be a function or None"
        remedy = "Pass a rule such as top_k(10), or lambda evals: [0, 1]."
        raise BadType(sentence(rule, repr(select), remedy))


def check_damping(name: str, damping: object) -> None:
    """Require a number ≥ 0, or a rule of four arguments: evals, evecs, gammas and lambdas."""
    if hasattr(damping, "_fields"):  # an `Adaptation`, whose functions tell a user nothing
        rule = f"{name} must be a number or a rule for a single step"
        remedy = "What adapts is for fit, directional_newton and optim.DirectionalNewton."
        raise BadType(sentence(rule, f"a record {type(damping).__name__}", remedy))
    if not callable(damping):
        check_nonnegative(name, damping)
    elif not (torch.compiler.is_compiling() or accepts_arguments(damping, 4)):
        what = getattr(damping, "__name__", repr(damping))
        must = f"{name} must be a number, or a function of evals, evecs, gammas and lambdas"
        remedy = f"If it makes such a function, call it: {what}(…)."
        raise BadType(sentence(must, what, remedy))


def check_nonnegative(name: str, value: object) -> None:
    """Require a real number or a 0-d tensor that is not negative and not nan."""
    scalar = isinstance(value, Tensor) and value.ndim == 0
    if isinstance(value, bool) or not (scalar or isinstance(value, Real)):
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        remedy = "Pass a number" + (", or a function." if name == "damping" else ".")
        raise BadType(sentence(f"{name} must be a number ≥ 0", got, remedy))
    # While torch compiles, a tensor has no value yet; under vmap it has that of every member.
    if isinstance(value, Tensor) and torch.compiler.is_compiling():
        return
    number = unwrapped(value) if isinstance(value, Tensor) else value
    low = float(number.min() if isinstance(number, Tensor) else number)  # type: ignore[arg-type]
    if math.isnan(low) or low < 0:
        rule = f"{name} must be a number ≥ 0"
        raise BadValue(sentence(rule, low, "Pass 0 or more."))


def check_positive(name: str, value: object) -> None:
    """Require a real number or a 0-d tensor above zero."""
    check_nonnegative(name, value)
    if any_known(value <= 0) if isinstance(value, Tensor) else not value:
        raise BadValue(sentence(f"{name} must be positive", value, "Pass a number above 0."))


def check_resampling(generator: object, resamples: int, quantile: float) -> None:
    """Require a bootstrap of a generator, at least one resample, and a quantile in 0 to 1."""
    # The type first, then the range: bool is an int, and is not meant.
    if not isinstance(generator, torch.Generator):
        rule, remedy = "bootstrap: generator must be a torch.Generator", "Make one from a seed."
        raise BadType(sentence(rule, repr(generator), remedy))
    whole = isinstance(resamples, int) and not isinstance(resamples, bool)
    if not whole or resamples < 1:
        rule = "bootstrap: resamples must be an integer ≥ 1"
        raise (BadValue if whole else BadType)(sentence(rule, repr(resamples), "Pass a count."))
    real = isinstance(quantile, Real) and not isinstance(quantile, bool)
    if not real or not 0 <= quantile <= 1:
        rule, remedy = "bootstrap: quantile must lie in 0 to 1", "Pass a share, such as 0.05."
        raise (BadValue if real else BadType)(sentence(rule, repr(quantile), remedy))
