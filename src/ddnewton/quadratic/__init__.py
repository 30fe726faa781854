"""The loss to second order: its curvature, directions, derivatives along them, and steps."""
