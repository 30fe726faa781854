"""Linear algebra of a symmetric positive semidefinite matrix of which only products are had."""
