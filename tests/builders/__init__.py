"""Tiny models, what they read, and settings of small runs, for all tests."""
