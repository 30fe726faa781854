"""A model at a batch: outputs, independent samples, precision, and columns of the Jacobian."""
