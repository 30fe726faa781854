"""The two examples of ``python -m ddnewton``: one that checks a step, and one that trains a net."""

from ddnewton.demo.digits_training import digits_example
from ddnewton.demo.vivit_example import reference_example

__all__ = ["digits_example", "reference_example"]
