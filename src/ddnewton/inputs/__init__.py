"""Checks of what a caller passes, and what groups and sub-samples name."""
