"""Evaluate a checkpoint on PASCAL VOC 2012, with the published system's flags (docs/published.md)."""

from starseg.compat.commands import evaluate

if __name__ == "__main__":
    evaluate("voc")
