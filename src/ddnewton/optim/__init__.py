"""Training with damped Newton steps: a pair of pure functions, and an optimizer for modules."""

from ddnewton.optim.torch_optimizer import DirectionalNewton

__all__ = ["DirectionalNewton"]
