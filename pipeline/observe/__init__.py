"""What a run reports while it works: log lines, metrics, progress, and the Prometheus file."""
