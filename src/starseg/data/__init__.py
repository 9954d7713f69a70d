"""Data sets on disk, the class index, step selection and transforms."""
