"""Benchmarks of the time and memory of training and evaluation (`starseg bench`)."""
