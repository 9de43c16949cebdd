"""What a power failure leaves of the embedded services: recorded changes, a model of the disk, a check of states."""
