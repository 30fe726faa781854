"""The result of `prepare`: a model with its layers, and the arguments that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.fx import GraphModule

from ddnewton.errors import BadType, BadValue, sentence
from ddnewton.linearize.precision import fewest_digits, narrowest
from ddnewton.linearize.structured.compilation import (
    compile_program,
    simplified_program,
    widened_program,
)
from ddnewton.linearize.structured.program import Program
from ddnewton.linearize.widening import plain_copy
from ddnewton.transforms import vmap
from ddnewton.trees import (
    TreeSpec,
    as_real,
    moved_to,
    named_leaves,
    take,
    tree_flatten,
    tree_structure,
    tree_unflatten,
)
from ddnewton.types import PyTree


class Signature(NamedTuple):
    """The structure, shapes, dtypes and devices that an argument of a prepared model must have."""

    name: str
    structure: TreeSpec
    skip: int  # the number of axes in front that are not compared: that of the samples
    leaves: Sequence[tuple[str, torch.Size, torch.dtype, torch.device]]

    def __reduce__(self) -> tuple[Any, ...]:
        # As a tree of numbers, for a structure is pickled with a warning of torch's.
        tree = tree_unflatten(range(len(self.leaves)), self.structure)
        return _signature_like, (self.name, tree, self.skip, self.leaves)


@dataclass(frozen=True, eq=False, repr=False)
class Prepared:
    """A model with its layers: called, it is the model; printed, it shows the path of every leaf.

    It holds for any number of samples and any values; what the model referred to besides its
    arguments is frozen as it was, as under `jax.jit`.
    """

    sample: GraphModule  # the trace, of one sample
    narrow: Program  # in the model's own dtype
    wide: Program | None  # in float64, where that is another dtype and the same function
    params: Signature
    X: Signature
    width: int  # how many outputs a sample has
    dtype: torch.dtype  # of the outputs
    complex_outputs: bool  # which are pairs of reals in the trace

    @property
    def narrowest(self) -> torch.dtype:
        """The dtype with the fewest digits among parameters, samples and outputs."""
        dtypes = [dtype for part in (self.params, self.X) for _, _, dtype, _ in part.leaves]
        return fewest_digits([*dtypes, self.dtype])

    @property
    def is_narrow(self) -> bool:
        """Whether there are fewer digits than those of float64 in it, and no version in float64."""
        narrow = self.narrow.rounding > 0 or self.narrowest != torch.float64
        return self.wide is None and narrow

    def __call__(self, params: PyTree, X: PyTree) -> Inexact[Tensor, "n ..."]:
        """Return the model's outputs."""
        leaves, samples = self.leaves(params, X)
        samples = self.at(samples, slice(None))
        mapped = (*(None for _ in leaves), *(0 for _ in samples))
        outputs: Tensor = vmap(self.sample, mapped)(*leaves, *samples)
        return torch.view_as_complex(outputs) if self.complex_outputs else outputs

    def leaves(self, params: PyTree, X: PyTree) -> tuple[list[Tensor], list[Tensor]]:
        """Return the leaves of both arguments; raise where they do not fit their signatures.

        Samples may be on another device than the model, to be moved there some at a time.
        """
        leaves = _checked(self.params, as_real(params))
        samples = _checked(self.X, X, anywhere=True)
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            # What was made in inference mode, autograd refuses outside.
            leaves = [leaf.clone() if leaf.is_inference() else leaf for leaf in leaves]
            samples = [leaf.clone() if leaf.is_inference() else leaf for leaf in samples]
        return leaves, samples

    def at(self, samples: Sequence[Tensor], indices: Tensor | slice) -> list[Tensor]:
        """Return some of the samples, where the model is."""
        taken: list[Tensor] = take(list(samples), indices)
        devices = [device for *_, device in self.X.leaves]
        pairs = zip(taken, devices, strict=True)
        return [x if x.device == device else moved_to(x, device) for x, device in pairs]

    def __reduce__(self) -> tuple[Any, ...]:
        # The trace says all: the programs, which hold functions, are compiled of it anew.
        trace, widened = plain_copy(self.sample), self.wide is not None
        shapes = (self.params, self.X, self.width, self.dtype, self.complex_outputs)
        return _compiled_anew, (trace, widened, *shapes)

    def __repr__(self) -> str:
        rows = [
            f"  {name or 'params'}: {path}"
            for (name, *_), path in zip(self.params.leaves, self.narrow.paths, strict=True)
        ]
        return "\n".join(["Prepared(", *rows, ")"])


def signature(name: str, tree: PyTree, skip: int) -> Signature:
    """Return the signature of a tree, its leaves without some axes in front."""
    leaves = [
        (path, leaf.shape[skip:], leaf.dtype, leaf.device) for path, leaf in named_leaves(tree)
    ]
    return Signature(name, tree_structure(tree), skip, leaves)


def kept(prepared: Prepared) -> Prepared:
    """Return a model with simpler programs, which are worth their making if used many times."""
    narrow, wide = prepared.narrow, prepared.wide
    return replace(
        prepared,
        narrow=simplified_program(narrow),
        wide=None if wide is None else simplified_program(wide),
    )


def _compiled_anew(
    sample: GraphModule, widened: bool, params: Signature, X: Signature, *shapes: Any
) -> Prepared:
    """Return a model with its layers from the trace of one sample, whatever its values were."""
    leaves, samples = _any_leaves(params), _any_leaves(X)
    narrow, wide = compile_program(sample, leaves, samples), None
    if widened:
        wide, _ = widened_program(narrow, narrowest([*leaves, *samples]))
    return kept(Prepared(sample, narrow, wide, params, X, *shapes))


def _any_leaves(expected: Signature) -> list[Tensor]:
    """Return tensors of a signature, for one sample: random numbers, or zeros of what counts."""
    generator = torch.Generator().manual_seed(0)

    def any_leaf(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.zeros(shape, dtype=dtype, device=device)
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        return numbers.to(device=device, dtype=dtype)

    return [any_leaf(shape, dtype, device) for _, shape, dtype, device in expected.leaves]


def _signature_like(name: str, tree: PyTree, skip: int, leaves: Sequence[Any]) -> Signature:
    """Return the signature with the structure of a tree."""
    return Signature(name, tree_structure(tree), skip, leaves)


def _checked(expected: Signature, tree: PyTree, *, anywhere: bool = False) -> list[Tensor]:
    """Return the leaves of an argument; raise where it does not fit its signature.

    With ``anywhere`` it may be on any device.
    """
    # The structure of the tree, then its leaves one by one.
    leaves, structure = tree_flatten(tree)
    name, remedy = expected.name, "Prepare the model anew for these."
    if structure != expected.structure:
        rule = f"{name} must have the structure that the model was prepared with"
        got = "other keys, lengths or types: " + " ".join(str(structure).split())
        raise BadType(sentence(rule, got, remedy))
    for leaf, (path, shape, dtype, device) in zip(leaves, expected.leaves, strict=True):
        if not isinstance(leaf, Tensor):
            rule = f"{name} must hold tensors"
            raise BadType(sentence(rule, f"{name}{path}: {type(leaf).__name__}", remedy))
        actual = (leaf.shape[expected.skip :], leaf.dtype, device if anywhere else leaf.device)
        if actual != (shape, dtype, device) or leaf.ndim < expected.skip:
            per = " a sample" if expected.skip else ""
            rule = f"{name}{path} must be {dtype}{list(shape)}{per} on {device}, as prepared"
            raise BadValue(sentence(rule, f"{actual[1]}{list(actual[0])} on {actual[2]}", remedy))
    return leaves
