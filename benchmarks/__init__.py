"""Benchmarks against other tools: ratios of time and memory, measured side by side in one run."""
