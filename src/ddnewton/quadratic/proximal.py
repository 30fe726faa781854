r"""Steps whose damping pulls them to a centre c instead of to zero: momentum and weight decay.

With momentum μ (Goldshlager, Abrahamsen, Lin, 2024, arXiv 2401.10190) and weight decay w a step is
the minimum over s of

    gᵀs + ½ sᵀG s + ½ δ ‖s − μ s'‖² + ½ w ‖θ + s‖²,        s' the step before,

so that damping by δ + w pulls it to c = (δ μ s' − w θ) / (δ + w). In general, with c_k = e_kᵀc,

    gᵀs + ½ sᵀG s + ½ Σ_k δ_k (e_kᵀ(s − c))²,    s = c − Σ_k (γ_k + λ_k c_k) / (λ_k + δ_k) e_k:

so that s − c is the step without a centre for the gradient g + G c, G c = A₁ (h / N ∘ A₁ᵀc).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddnewton.columns.gram import rmatmat
from ddnewton.inputs.groups import is_whole
from ddnewton.quadratic.kept import Directions
from ddnewton.quadratic.quadratic_model import QuadraticModel
from ddnewton.transforms import concatenated
from ddnewton.trees import along_block


class Proximal(NamedTuple):
    """What pulls a step besides the gradient: the step before, and the parameters if they decay.

    A vector that does not pull is left out. All are in the units of the quadratic model.
    """

    previous: Float[Tensor, "_ d"]
    params: Float[Tensor, "_ d"]
    decays: Sequence[float | Tensor]  # of every leaf, in the units of the parameters
    decay: float | Tensor  # of all parameters, or of every one


class ProximalBlock(NamedTuple):
    """The vectors that pull on the parameters of one block, and the columns' slopes along them."""

    vectors: Float[Tensor, "v d"]
    column_slopes: Float[Tensor, "i v"]
    counts: tuple[int, int]  # of vectors: of the step before, of the parameters
    decay: float | Tensor  # one number, or one of every parameter


class Centre(NamedTuple):
    """Where the damping δ of all directions pulls the step of a block, c, and A₁ᵀc of its columns.

    ``decay`` is the part of A₁ᵀc that weight decay makes. A rule adds to δ without it: the rule
    pulls to where the centre was before the decay.
    """

    vector: Float[Tensor, " d"]
    column_slopes: Float[Tensor, " i"]
    decay: Float[Tensor, " i"]
    delta: Float[Tensor, ""]


def proximal_blocks(
    proximal: Proximal, model: QuadraticModel, *, scaled: bool
) -> list[ProximalBlock]:
    """Return the vectors that pull, cut to the parameters of every block.

    A block has one weight decay where that of its leaves is one, in the parameters' own units.
    """
    counts, sizes = (len(proximal.previous), len(proximal.params)), model.sizes
    pulls = [vectors for vectors in (proximal.previous, proximal.params) if len(vectors)]
    every = concatenated(pulls)
    blocks = []
    for block in model.leaves:
        vectors = every
        if not is_whole(model.leaves, len(sizes)):
            vectors = torch.stack([along_block(vector, block, sizes) for vector in every])
        slopes = rmatmat(model.curvature_jacobians, block, vectors.mT)
        # One weight decay of the block, or one of every parameter.
        decays = different([proximal.decays[leaf] for leaf in block])
        decay = decays[0] if decays else 0.0
        if isinstance(proximal.decay, Tensor) and proximal.decay.ndim:
            of_leaves = proximal.decay.split(list(sizes))
            if scaled or len(decays) > 1:
                decay = torch.cat([of_leaves[leaf] for leaf in block])
        blocks.append(ProximalBlock(vectors, slopes, counts, decay))
    return blocks


def different(decays: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Return the different ones of some decays; a tensor is the same for all leaves."""
    return list(dict.fromkeys(decays))


def centre_of(
    block: ProximalBlock, delta: Tensor, decay: float | Tensor, momentum: float | Tensor
) -> Centre:
    """Return the centre of a block for a damping δ of all directions, w included."""
    weights = _weights(block.counts, delta, decay, momentum)
    without_decay = _weights(block.counts, delta, 0.0, momentum)
    slopes = block.column_slopes
    return Centre(
        vector=weights @ block.vectors,
        column_slopes=slopes @ weights,
        decay=slopes @ (weights - without_decay),
        delta=delta,
    )


def _weights(
    counts: tuple[int, int], delta: Tensor, decay: float | Tensor, momentum: float | Tensor
) -> Float[Tensor, " v"]:
    """Return the centre as weights of the step before, δ μ / (δ + w), and of θ, −w / (δ + w)."""
    decayed = isinstance(decay, Tensor) or decay > 0
    of_previous = momentum * (delta - decay) / delta if decayed else delta * 0 + momentum
    of_params = -decay / delta if decayed else delta * 0
    pairs = zip((of_previous, of_params), counts, strict=True)
    return torch.stack([weight for weight, count in pairs for _ in range(count)])


def centred_gradient_weights(
    gradient_weights: Float[Tensor, " a"],
    curvature_weights: Float[Tensor, " i"],
    centre: Centre | None,
) -> Float[Tensor, " a"]:
    """Return the weights of g + G c."""
    if centre is None:
        return gradient_weights
    further = curvature_weights * centre.column_slopes[: len(curvature_weights)]
    return gradient_weights + F.pad(further, (0, len(gradient_weights) - len(further)))


def along_directions(
    kept: Directions,
    curvature_weights: Float[Tensor, " i"],
    column_slopes: Float[Tensor, " a"],
) -> Float[Tensor, " k"]:
    """Return e_kᵀc from Aᵀc, by e_k = A √w u_k / √λ_k."""
    count = len(curvature_weights)
    inner = kept.evecs.mT @ (curvature_weights.sqrt() * column_slopes[:count])
    return torch.where(kept.live, inner / torch.where(kept.live, kept.evals, 1).sqrt(), 0)
