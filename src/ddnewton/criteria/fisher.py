"""The Fisher information of a likelihood as curvature: natural gradients, Fisher scoring."""

from __future__ import annotations

from ddnewton.criteria.gaussian import LIKELIHOOD_RULE
from ddnewton.criteria.loss import Loss
from ddnewton.criteria.monte_carlo import AnyCriterion, kind_of, undrawn
from ddnewton.errors import BadValue, public, sentence
from ddnewton.records import pickled_as_call


@pickled_as_call
@public
def fisher(criterion: AnyCriterion) -> Loss:
    r"""Return a criterion whose curvature is the Fisher information; its gradient is exact.

    .. math:: \nabla^2\ell_n \to F_n = \mathbb{E}_{\hat y \sim p(\cdot \mid f_n)}
              \nabla\ell(f_n, \hat y) \, \nabla\ell(f_n, \hat y)^\top

    for a loss ℓ = −log p(y | f). F is never negative, whatever the loss, and does not depend on y.
    A weight that a loss gives a sample or a class multiplies its F.

    - It is the Hessian for `torch.nn.MSELoss`, CrossEntropyLoss, BCEWithLogitsLoss, PoissonNLLLoss
      of log-rates and GaussianNLLLoss with given variances: they come back as they are.
    - It is another matrix, in closed form, for `heteroscedastic_nll` (a predicted mean and
      log-variance), PoissonNLLLoss of rates (1 / f), NLLLoss of log-probabilities (diag(eᶠ)) and
      BCELoss of probabilities (1 / f (1 − f)). The last two make the step that CrossEntropyLoss and
      BCEWithLogitsLoss make of the logits.
    - Of a function by torch.func, where it is quadratic in y: a Gaussian likelihood with a mean
      and variances, or a covariance, in any parameters, such as
      ``lambda f, y: gaussian_nll_loss(f[:, :1], y, softplus(f[:, 1:]))``.

    Parameters
    ----------
    criterion
        Loss with a likelihood, as above; or a `Loss` with ``fisher`` or ``scores``.

    Returns
    -------
    Loss
        The criterion.

    Raises
    ------
    ValueError, TypeError
        Where the criterion has none of these, or is already drawn by `monte_carlo`.

    Notes
    -----
    Source: Martens, "New insights and perspectives on the natural gradient method", Journal of
    Machine Learning Research 21, 2020, arXiv 1412.1193.

    Examples
    --------
    >>> import torch
    >>> log_p = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    >>> fisher(torch.nn.NLLLoss()).expand(log_p, torch.tensor([0])).h.tolist()
    [[0.25, 0.75]]
    """
    loss = undrawn(criterion, "Pass the loss itself: nothing is drawn here.")
    if loss.fisher is not None:
        return loss._replace(expand=loss.fisher, root=loss.fisher_root)
    if loss.scores is not None:
        return loss  # its Hessian is what the scores have as their mean square
    remedy = (
        "MSELoss, CrossEntropyLoss, NLLLoss, BCEWithLogitsLoss, BCELoss, PoissonNLLLoss and "
        "GaussianNLLLoss have one, as have heteroscedastic_nll() for a predicted mean and "
        "log-variance, functions that are quadratic in y, and a Loss with fisher or scores."
    )
    raise BadValue(sentence(LIKELIHOOD_RULE, kind_of(criterion), remedy))
