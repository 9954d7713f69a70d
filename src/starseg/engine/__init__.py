"""The training engine: setup, the training loop of a step, evaluation, checkpoints and run directories."""
