"""Whole experiments: one run, a comparison, the demo."""
