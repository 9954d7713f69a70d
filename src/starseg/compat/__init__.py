"""Commands, configuration files and checkpoints of the published code, on starseg's engine (docs/published.md)."""
