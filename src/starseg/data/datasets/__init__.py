"""Data set layouts on disk."""
