"""Measurements: `make bench` prints them, each beside a peer or a limit of the same run; nothing passes or fails."""
