"""The same nets trained by our methods and by others: ``python -m benchmarks.training.train``."""
