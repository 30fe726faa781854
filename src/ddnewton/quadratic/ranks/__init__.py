"""The loss to second order where several processes hold the samples."""
