"""The published system's commands, configuration files and checkpoints, on our engine (docs/published.md)."""
