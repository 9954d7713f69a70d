"""Train one step of STAR-Basic or STAR-Lite on Cityscapes, with the published system's flags (docs/published.md)."""

from starseg.compat.commands import train

if __name__ == "__main__":
    train("city")
