"""Measurements of at_fused: `python -m benchmarks --help`."""
