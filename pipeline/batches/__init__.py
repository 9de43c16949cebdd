"""What is on record of a batch: its state, which one is meant, its lock and its numbers."""
