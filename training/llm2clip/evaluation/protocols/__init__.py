"""Protocols: how the data of a benchmark is measured."""
