"""Packaged recipes: YAML files of a stage's settings."""
