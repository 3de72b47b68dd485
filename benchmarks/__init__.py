"""Ratios against the tools that people use now, each measured beside its peer in one run."""
