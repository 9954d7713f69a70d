"""Train one step of STAR on PASCAL VOC 2012, with the published system's flags (docs/published.md)."""

from starseg.compat.commands import train

if __name__ == "__main__":
    train("voc")
