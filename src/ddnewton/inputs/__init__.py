"""Checks of the arguments, and from groups and sub-samples to numbers of leaves and of samples."""
