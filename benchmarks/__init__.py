"""Measurements of what the pipeline claims; run them with `python -m benchmarks`."""
