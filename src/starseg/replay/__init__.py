"""Replay: what is stored of the old classes, and how much of it is replayed."""
