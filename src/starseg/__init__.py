"""starseg: class-incremental semantic segmentation by prototype replay (STAR, NeurIPS 2023)."""

__version__ = "0.1.0"
