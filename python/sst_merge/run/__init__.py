"""What runs a model: one reading of the data, passes, ranks, checkpoints, memory."""
