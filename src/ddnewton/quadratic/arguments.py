"""What a call asks for, checked: its terms, blocks and losses, before any model is run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor

from ddnewton.criteria.expand import as_loss, on_complex
from ddnewton.criteria.loss import name_of
from ddnewton.criteria.monte_carlo import Criteria
from ddnewton.criteria.trained import without_params
from ddnewton.distributed.agreement import Processes, agreeing, team_of
from ddnewton.distributed.fingerprints import options_told, params_told
from ddnewton.distributed.service import Leader
from ddnewton.distributed.team import Team
from ddnewton.errors import BadValue, sentence
from ddnewton.inputs.checks import check_functions, check_params
from ddnewton.inputs.dtensor_arguments import (
    any_dtensor,
    check_places,
    check_same_on_ranks,
    on_whole,
    ways_of,
    whole_tree,
)
from ddnewton.inputs.groups import Block, Group, blocks_of
from ddnewton.inputs.module_function import check_not_fully_sharded
from ddnewton.inputs.samples import Samples
from ddnewton.inputs.scale import Scale, scale_of
from ddnewton.inputs.step_options import check_options
from ddnewton.inputs.term_names import about_term, one_or_several
from ddnewton.inputs.terms import TermArguments, TermIndices, terms_of
from ddnewton.linearize.references import modules_of
from ddnewton.linearize.structured.traced_model import Prepared
from ddnewton.quadratic.term import Objective
from ddnewton.transforms import check_not_transformed
from ddnewton.trees import device_to_go_to, moved_to, moving, on_pairs
from ddnewton.types import AnyModelFn, DampingRule, GramWays, ModelFn, Precision, PyTree, Select

T = TypeVar("T")


class Scaling(NamedTuple):
    """The units of the parameters: columns, steps and dampings are those of θ / scale.

    With ``by_columns`` the scale follows from the sizes of the columns, the largest so far.
    """

    by_columns: bool
    scale: Float[Tensor, " d"] | None = None
    sizes: Float[Tensor, " d"] | None = None


class Arguments(NamedTuple):
    """The arguments of a call, checked as far as that goes without the outputs of the model."""

    params: PyTree
    terms: Sequence[TermArguments]
    objectives: Sequence[Objective]
    blocks: Sequence[Block]
    scaling: Scaling
    complement: float | None
    chunk_size: int | None
    precision: Precision
    tol: float
    has_dtensors: bool = False  # in the model, as parameters, which are whole here
    team: Team | None = None  # the ranks that hold the samples, None for this process alone
    leader: Leader | None = None  # of these, where it leads

    @property
    def in_batches(self) -> bool:
        """Whether samples of a term come in batches."""
        return any(term.in_batches for term in self.terms)

    @property
    def is_free(self) -> bool:
        """Whether the matrix is never to be formed."""
        return any(term.gram == "free" for term in self.terms)


def arguments_of(
    model_fn: AnyModelFn,
    params: PyTree,
    X: PyTree,
    y: PyTree,
    criterion: Criteria,
    *,
    damping: float | Tensor | DampingRule = 0.0,  # without one, every curvature counts
    select: Select | None = None,
    complement: float | None = None,
    groups: Sequence[Group] | None = None,
    subsampling_grad: TermIndices | None = None,
    subsampling_ggn: TermIndices | None = None,
    subsampling_curvature: TermIndices | None = None,
    gram: GramWays = "auto",
    tol: float = 1e-2,
    chunk_size: int | None = None,
    precision: Precision = "auto",
    scale: Scale = None,
    process_group: Processes | Team = None,
    gradient: bool = True,
    by_sample: bool = True,
    takes_batches: bool = True,
) -> Arguments:
    """Refuse what breaks a rule, before any work; return the rest.

    Columns of the gradient alone are left out where nobody asks for the ``gradient``, and may be
    summed up where nobody but rules asks for its slopes ``by_sample``. A function that needs all
    samples at once ``takes_batches`` by no means. Where several processes hold the samples, what
    breaks a rule on one is refused on all.
    """
    subsampling = {
        "subsampling_grad": subsampling_grad,
        "subsampling_ggn": subsampling_ggn,
        "subsampling_curvature": subsampling_curvature,
    }
    options = {
        "criterion": criterion,
        "damping": damping,
        "select": select,
        "groups": groups,
        "complement": complement,
        "gram": gram,
        "tol": tol,
        "precision": precision,
        "scale": scale,
        **subsampling,
    }
    if process_group is not None:
        check_not_transformed("process_group")
    team = team_of(process_group, params)
    # Where ranks hold the samples, models are of plain tensors; what is passed is not written to.
    passed, params, scale = params, whole_tree(params), whole_tree(scale)
    has_dtensors = team is None and any_dtensor(passed)
    with agreeing(team, lambda: params_told(params) | options_told(options)):
        # Everything that the values of params and X do not matter for.
        check_functions(model_fn, select)
        check_options(damping, complement, gram, chunk_size, tol, precision)
        check_params(params)
        ways = ways_of(gram, passed) if has_dtensors else gram
        terms = terms_of(
            *(model_fn, X, y, criterion, ways, subsampling), takes_batches=takes_batches, team=team
        )
        # Among DTensors; ranks agree on the size of chunks only without measuring.
        _check_callable(terms, passed, has_dtensors=has_dtensors)
        if has_dtensors:
            terms = [on_whole(term, passed) for term in terms]
            chunk_size = chunk_size or sys.maxsize
            parts = ({term.name: (term.X, term.y)[i] for term in terms} for i in range(2))
            given = dict(zip("Xy", map(one_or_several, parts), strict=True))
            told = params_told(params) | options_told(options | given | {"scale": scale})
            check_same_on_ranks(passed, told)
        check_places(terms)
        terms = [_with_targets_moved(term, params) for term in terms]
        blocks = _where_params_are(blocks_of(groups, params, select, damping), params)
        by_sample |= any(callable(b.damping) for b in blocks) or any(t.in_batches for t in terms)
        return Arguments(
            params=params,
            terms=terms,
            objectives=[_objective(term, passed, gradient, by_sample) for term in terms],
            blocks=blocks,
            scaling=Scaling(isinstance(scale, str), scale_of(scale, params)),
            complement=_moved(complement, params),
            chunk_size=chunk_size,
            precision=precision,
            tol=tol,
            has_dtensors=has_dtensors,
            team=team,
        )


def _check_callable(terms: Sequence[TermArguments], params: PyTree, *, has_dtensors: bool) -> None:
    """Refuse models that take no DTensors: prepared ones, and modules of FSDP."""
    if not any_dtensor(params):
        return
    for term in terms:
        if has_dtensors and isinstance(term.model_fn, Prepared):
            rule, got = "model_fn must not be prepared where params are DTensors", "a prepared one"
            raise BadValue(sentence(rule, got, "Pass the function that it was made from."))
        check_not_fully_sharded("model_fn", modules_of(term.model_fn))


def leaves_of(arguments: Arguments) -> list[Sequence[int]]:
    """Return the numbers of the parameters in every block."""
    return [block.leaves for block in arguments.blocks]


def _objective(term: TermArguments, params: PyTree, gradient: bool, by_sample: bool) -> Objective:
    """Return the loss of a term, which reads no parameters."""
    with about_term(term.name):
        loss = without_params(as_loss(term.criterion), params)
    name = name_of(term.criterion)
    return Objective(term.name, name, loss, term.y, term.samples, gradient, by_sample)


def _where_params_are(blocks: Sequence[Block], params: PyTree) -> list[Block]:
    """Return blocks with dampings on the device of the parameters, where they are tensors."""
    return [block._replace(damping=_moved(block.damping, params)) for block in blocks]


def _moved(number: T, params: PyTree) -> T:
    """Return a number on the device of the parameters, where it is a tensor."""
    if not isinstance(number, Tensor):
        return number
    moved: T = moved_to(number, device_to_go_to(number, params))
    return moved


def _with_targets_moved(term: TermArguments, params: PyTree) -> TermArguments:
    """Return a term with targets and indices where the parameters are, as its outputs will be.

    Inputs stay where they are, to be moved a chunk of samples at a time.
    """
    if term.in_batches:
        return term
    y = moved_to(term.y, device_to_go_to(term.y, params))
    device = device_to_go_to(term.X, params)
    if device is not None:
        samples = (some if some is None else some.to(device) for some in term.samples)
        term = term._replace(samples=Samples(*samples))
    return term._replace(y=y)


def function_of(term: TermArguments, params: PyTree) -> ModelFn:
    """Return the model of a term as a function of reals, wherever the samples are."""
    function: ModelFn = term.model_fn
    if isinstance(function, Prepared):  # which moves them by itself
        return function
    return moving(on_pairs(function, params), device_to_go_to(term.X, params))


def of_complex_outputs(objective: Objective, term: TermArguments, params: PyTree) -> Objective:
    """Return the loss of a term as a function of the real and imaginary parts of its outputs."""
    loss = without_params(as_loss(on_complex(term.criterion)), params)
    return objective._replace(loss=loss)
