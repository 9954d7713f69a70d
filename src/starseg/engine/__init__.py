"""The training engine: one step, the sequence, evaluation, files."""
