"""Measurements of the library, run from the repository's root: ``python -m benchmarks.bench``."""
