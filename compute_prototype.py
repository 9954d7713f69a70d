"""Derive the prototypes of STAR-Lite before a step, with the published system's flags (docs/published.md)."""

from starseg.compat.commands import derive

if __name__ == "__main__":
    derive()
