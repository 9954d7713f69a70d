"""Print the IoU per class of several models on the same photos, from the masks that `starseg predict` wrote.

python story_table.py held-out before after      held-out contains masks/ and classes.txt, the other folders masks

Classes that a model has not learnt yet are scored, too: each of their pixels is a miss, and an error of the class that
is predicted instead.
"""

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from starseg.data.annotations.classlist import read_classes
from starseg.data.images import read_mask
from starseg.engine.metrics import summarize
from starseg.report.tables import percent
from starseg.tasks import IGNORE


def main(truth: Path, *predicted: Path) -> None:
    names, masks = read_classes(str(truth / "classes.txt")).names, sorted((truth / "masks").glob("*.png"))
    columns = []
    for folder in predicted:
        confusion = np.zeros(len(names) ** 2, np.int64)
        for mask in masks:
            labels, found = read_mask(mask), read_mask(folder / mask.name)
            pairs = labels.astype(int) * len(names) + found
            confusion += np.bincount(pairs[labels != IGNORE], minlength=confusion.size)
        columns.append(summarize(confusion.reshape(len(names), -1), names, base=len(names) - 1))
    table = Table("IoU in percent", *(folder.name for folder in predicted))
    for name in names:
        table.add_row(name, *(percent(column["iou"][name]) for column in columns))
    table.add_row("mean", *(percent(column["miou"]["all"]) for column in columns))
    Console().print(table)
    Console().print(f"{len(masks)} photos, whole", highlight=False)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
