"""Evaluate a checkpoint on Cityscapes, with the published system's flags (docs/published.md)."""

from starseg.compat.commands import evaluate

if __name__ == "__main__":
    evaluate("city")
