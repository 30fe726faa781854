"""The curvature by products alone: the matrix of a block is never formed."""
