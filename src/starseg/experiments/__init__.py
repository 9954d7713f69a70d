"""Experiments: a run with its tables, a comparison of methods, the demo."""
