"""Data sets on disk, annotation files, the class index, image selection, loading and transforms."""
