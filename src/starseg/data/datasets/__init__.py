"""Data sets: the registry of specs, and the layouts on disk.

The modules of this package register the built-in data sets. Other packages add theirs through entry points of the group
``starseg.datasets``, each of which names a module (or an object in it) that registers data sets when it is imported.
Single files are listed in an environment variable: ``STARSEG_DATASETS=cityscapes.py``, several separated by ``:``
(docs/new-dataset.md).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starseg.config import DataConfig
from starseg.data.datasets import (  # noqa: F401 - they register their data sets
    ade20k,
    ade20k_full,
    camvid,
    cityscapes,
    coco_stuff,
    folder,
    pascal_context,
    voc,
)
from starseg.data.datasets.base import NO_FILES, Dataset, Split, read_lines, refuse_missing
from starseg.data.datasets.spec import DATASETS, DatasetSpec, register_dataset
from starseg.errors import UserError
from starseg.utils.plugins import load_entry_points, load_files

ENTRY_POINTS, FILES = "starseg.datasets", "STARSEG_DATASETS"

__all__ = [
    "DATASETS",
    "NO_FILES",
    "Dataset",
    "DatasetSpec",
    "Split",
    "data_root",
    "find_dataset",
    "list_dataset",
    "load_plugins",
    "open_dataset",
    "read_lines",
    "register_dataset",
]


@cache
def load_plugins() -> None:
    """Import the packages and files that register further data sets; later calls do nothing.

    Raises:
        UserError: one of them cannot be imported.
    """
    load_entry_points(ENTRY_POINTS, "data set")
    load_files(FILES)


def find_dataset(key: str) -> DatasetSpec:
    """Return the spec of a registered data set.

    Raises:
        UserError: the key is unknown; the message lists the known ones.
    """
    # Not when this module is imported, so that plug-ins can import anything without a circular import.
    load_plugins()
    if key not in DATASETS:
        raise UserError(
            f"data.dataset: unknown data set {key!r}; known: {', '.join(sorted(DATASETS))}; one of your own is "
            f"named by {FILES}=its_file.py, or by its package (docs/new-dataset.md)"
        )
    return DATASETS[key]


def data_root(config: DataConfig) -> Path:
    """Return the folder of the configured data set: `data.root`, or the default of its spec.

    Raises:
        UserError: an unknown data set.
    """
    default = find_dataset(config.dataset).root
    return config.root or default


def list_dataset(config: DataConfig) -> Dataset:
    """Open the configured data set without checking that the listed files exist.

    Raises:
        UserError: the data set is unknown, or the folder has another layout.
    """
    return find_dataset(config.dataset).open(data_root(config))


def open_dataset(config: DataConfig) -> Dataset:
    """Open the configured data set and check that all its files exist.

    Raises:
        UserError: the data set is unknown, the folder has another layout, or a file is missing.
    """
    dataset = list_dataset(config)
    refuse_missing(dataset)
    return dataset
