"""Class lists and annotation files of other tools."""
