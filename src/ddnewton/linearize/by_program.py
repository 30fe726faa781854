"""A model linearized by its program: columns of layers as outer products, in one visit of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ddnewton.columns.column_sums import sum_of_columns
from ddnewton.columns.factors import Factor, Jacobian, for_exact_sums, written_out
from ddnewton.columns.kept_factors import keeping
from ddnewton.columns.positions import shortest
from ddnewton.inputs.checks import check_outputs
from ddnewton.linearize.basis import Basis, basis_at
from ddnewton.linearize.model import Linearization
from ddnewton.linearize.structured.costs import samples_of_chunk, sums_pay
from ddnewton.linearize.structured.program import Program
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.linearize.structured.visit import Visit, run, visit
from ddnewton.trees import chunks


def by_program(
    prepared: Prepared,
    program: Program,
    leaves: Sequence[Tensor],
    samples: Sequence[Tensor],
    chunk_size: int | None,
    whole: int,
    *,
    exact_sums: bool = False,
) -> Linearization:
    """Linearize a model by a program; where all samples are one chunk it is run only once.

    With ``exact_sums`` products of its columns are in float64, whatever these are in.
    """
    n, d = samples[0].shape[0], sum(leaf.numel() for leaf in leaves)

    def size_of(n: int, m: int) -> int:
        return chunk_size or samples_of_chunk(program, leaves, n, m)

    def visit_of(indices: Int[Tensor, " n"] | slice) -> Visit:
        return visit(program, leaves, prepared.at(samples, indices))

    # Run it on all samples for the outputs; a single chunk stays ready to be pulled back.
    first_chunk, *further_chunks = chunks(n, size_of(n, 1))
    first = [visit_of(first_chunk)] if len(further_chunks) == 0 else []
    parts = [prepared.at(samples, chunk) for chunk in (first_chunk, *further_chunks)]
    outputs = (
        first[0].outputs if first else torch.cat([run(program, leaves, part) for part in parts])
    )
    check_outputs(outputs, n)
    eps = max(program.rounding, *(torch.finfo(x.dtype).eps for x in (outputs, *leaves)))

    sums = 0.0 if exact_sums or outputs.dtype == torch.float64 else torch.finfo(outputs.dtype).eps

    def pulled(visited: Visit, basis: Basis, *, formed: bool) -> Sequence[Factor]:
        factors = visited.pullback(basis)
        if formed:  # once, for all products and sums that follow
            factors = [*map(shortest, factors)]
        return [*map(for_exact_sums, factors)] if exact_sums else factors

    def jacobian(
        basis: Basis, indices: Int[Tensor, " n"] | None, *, formed: bool = True
    ) -> Jacobian:
        parts = chunks(basis.shape[0], size_of(basis.shape[0], basis.shape[2]))
        factors: Sequence[Factor] = []

        def of_chunk(chunk: slice) -> Sequence[Factor]:
            visited = visit_of(chunk if indices is None else indices[chunk])
            return pulled(visited, basis_at(basis, chunk), formed=formed)

        # The factors of a single chunk are kept; those of several as far as they are not too large,
        # where products of all with all visit them again and again.
        if len(parts) == 1:
            kept = len(first) > 0 and indices is None
            factors = pulled(first[0], basis, formed=formed) if kept else of_chunk(parts[0])
        else:
            first.clear()
        columns = Jacobian(
            visit=lambda chunk: factors or of_chunk(chunk),
            chunks=parts,
            samples=basis.shape[0],
            columns=basis.shape[2],
            sizes=[leaf.numel() for leaf in leaves],
            pieces=program.pieces,
            order=program.order,
            device=basis.device,
            eps=eps,
            sums=sums,
        )
        if factors:
            return written_out(columns, factors, whole)
        return keeping(columns) if basis.shape[0] * basis.shape[2] <= d else columns

    def summed(basis: Basis, indices: Int[Tensor, " n"] | None) -> Jacobian:
        return sum_of_columns(jacobian(basis, indices, formed=False))

    return Linearization(
        outputs=outputs.to(prepared.dtype),
        precise=outputs,
        jacobian=jacobian,
        function=lambda leaves, indices: run(program, leaves, prepared.at(samples, indices)),
        leaves=leaves,
        in_float64=None,
        complex_outputs=prepared.complex_outputs,
        summed=summed if sums_pay(program, n) and not exact_sums else None,
    )
