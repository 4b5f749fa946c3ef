"""The worker: one process per rank that applies step plans and runs the model."""
