"""Benchmarks of the time and memory of training and evaluation (`starseg bench`)."""

from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)
