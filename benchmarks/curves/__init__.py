"""Curves of cost against the size of the work; every point is measured in its own process."""
