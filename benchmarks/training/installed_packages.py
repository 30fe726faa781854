"""Methods of packages that are taken where they are installed: SOAP, and Levenberg-Marquardt.

SOAP is pytorch-optimizer's: Vyas et al. 2024, arXiv 2409.11321, here with its rate falling to zero,
no decay and new eigenvectors every other step, as Wang et al. 2025, arXiv 2502.00604, train
physics-informed nets. torch-levenberg-marquardt is by Fabio Di Marco.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

from torch import Tensor, nn

from benchmarks.problem import Problem
from benchmarks.training.instances import Instance, Params
from benchmarks.training.updates import Finished, Start, Update, first_order


def start_soap(instance: Instance, *, lr: float, cosine: bool = True) -> Update:
    """Start SOAP."""
    from pytorch_optimizer import SOAP  # noqa: PLC0415  # where it is installed

    settings = {"weight_decay": 0.0, "betas": (0.99, 0.99), "precondition_frequency": 2}
    return first_order(SOAP, cosine=cosine)(instance, lr=lr, **settings)


class FunctionModule(nn.Module):
    """A problem's function as a module."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.names = {name.replace(".", "_"): name for name in problem.params}
        for name, original in self.names.items():
            self.register_parameter(name, nn.Parameter(problem.params[original].clone()))
        self.function = problem.model_fn

    def forward(self, X: Tensor) -> Tensor:
        """Return the outputs."""
        return self.function(self.params(), X)

    def params(self) -> Params:
        """Return the parameters by their names in the problem."""
        return {original: getattr(self, name) for name, original in self.names.items()}


def start_torch_lm(instance: Instance, *, start: float = 1e-3, mode: str = "standard") -> Update:
    """Start torch-levenberg-marquardt, its least damping within float64's reach."""
    from torch_levenberg_marquardt.damping import StandardDampingStrategy  # noqa: PLC0415
    from torch_levenberg_marquardt.training import LevenbergMarquardtModule  # noqa: PLC0415

    logging.getLogger("torch_levenberg_marquardt").setLevel(logging.ERROR)
    module = FunctionModule(instance.problem)
    damping = StandardDampingStrategy(
        starting_value=start, min_value=1e-16, max_value=1e16, damping_mode=mode
    )
    trainer = LevenbergMarquardtModule(
        module, damping_strategy=damping, solve_method="cholesky", attempts_per_step=40
    )

    def update(X: Tensor, y: Tensor, progress: float) -> tuple[Params, int]:
        _, _, ended, _ = trainer.training_step(X, y)
        if ended:
            trainer.restore_parameters()
            raise Finished
        return {name: p.detach() for name, p in module.params().items()}, 1

    return update


PACKAGES = {
    "SOAP": ("pytorch_optimizer",),
    "torch-LM": ("torch_levenberg_marquardt", "pytorch_lightning"),
}
"""The modules that a method needs."""
INSTALLED: dict[str, Start] = {"SOAP": start_soap, "torch-LM": start_torch_lm}


def is_missing(method: str) -> bool:
    """Tell whether a method's package is not installed."""
    return any(find_spec(module) is None for module in PACKAGES.get(method, ()))
