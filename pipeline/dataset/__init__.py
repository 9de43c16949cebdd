"""The dataset on disk: pure functions, without a database or a network."""
