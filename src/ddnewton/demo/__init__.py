"""The examples of ``python -m ddnewton``: one checks a step, one fits a net, one trains another."""

from ddnewton.demo.demo_figure import draw_demo
from ddnewton.demo.digits_training import digits_example
from ddnewton.demo.poisson_fits import poisson_example
from ddnewton.demo.vivit_example import reference_example

__all__ = ["digits_example", "draw_demo", "poisson_example", "reference_example"]
