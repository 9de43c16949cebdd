"""Quantiles of the durations in a histogram of pipeline.observe.metrics."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.observe.metrics import BUCKETS_PER_DOUBLING


def bound_of(bucket: float) -> float:
    """Return the upper bound of a bucket in seconds."""
    return float(2 ** (bucket / BUCKETS_PER_DOUBLING))


def quantile(histogram: Mapping[str, int], share: float) -> float:
    """Return the duration that a share of the durations in a non-empty histogram does not exceed.

    Within a bucket, durations are assumed to be evenly distributed on the logarithmic scale.
    """
    missing = share * sum(histogram.values())
    for bucket, n in sorted((int(bucket), n) for bucket, n in histogram.items() if n):
        if n >= missing:
            return bound_of(bucket - 1 + missing / n)
        missing -= n
    raise ValueError("the histogram is empty")
