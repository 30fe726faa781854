"""NIST's nonlinear regressions: the data with certified answers, and the 27 models in torch."""
