"""Train one step of STAR on ADE20K, with the published system's flags (docs/published.md)."""

from starseg.compat.commands import train

if __name__ == "__main__":
    train("ade")
