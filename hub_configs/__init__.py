"""Configurations of the models that this project publishes, one folder per model."""
