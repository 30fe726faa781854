"""Columns of the Jacobian: as factors, their inner products, and the matrices made of them."""
