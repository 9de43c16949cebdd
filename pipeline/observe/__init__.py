"""What a run shows of itself: log lines, metrics, progress."""
