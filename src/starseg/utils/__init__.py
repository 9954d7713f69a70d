"""Utilities that every layer may import."""
