"""Synthetic datasets with real JPEGs."""

from pipeline.sample.writer import write_sample

__all__ = ["write_sample"]
