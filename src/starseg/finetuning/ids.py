"""Dataset ids of the classes of a step from the user's folders, and their ids in predicted masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from starseg.data.annotations.classlist import ClassList
from starseg.errors import UserError
from starseg.tasks import BACKGROUND, IGNORE

if TYPE_CHECKING:
    from starseg.finetuning.prepare import SourceStep

_HIGHEST_ID = 254


def assign_ids(classes: ClassList, source: SourceStep | None) -> tuple[tuple[str, ...], list[int], np.ndarray]:
    """Assign a dataset id to every class.

    Known classes and a replaced one keep theirs, new ones follow the highest. In a first step, ids are the values in
    the masks, or these plus 1 if 0 is the value of a class.

    Returns:
        Names by dataset id, the new dataset ids, and [256] uint8 dataset ids by class index, with 255 for index 0 if
        there is no background.

    Raises:
        UserError: nothing is new, a replaced class is not listed, or there are too many classes.
    """
    known = dict(zip(source.info.dataset_ids, source.info.names, strict=True)) if source else {0: classes.names[0]}
    ids = {name.casefold(): number for number, name in known.items() if number}
    names, again = dict(known), source.replaced if source else None
    first = 1 + max([*known, *([again.dataset_id] if again else [])])
    table = np.arange(256, dtype=np.uint8)
    if not classes.background:
        table[BACKGROUND] = IGNORE
    values = {index: value for value, index in classes.labels.classes.items() if index}
    shift = 1 if BACKGROUND in values.values() else 0
    for index, name in enumerate(classes.names[1:], 1):
        number = ids.get(name.casefold())
        if number is None:
            number = max(first, *(n + 1 for n in names)) if source else values[index] + shift
            if again and name.casefold() == again.name.casefold():
                number, name = again.dataset_id, again.name
            names[number] = name
        if number > _HIGHEST_ID:
            raise UserError(f"--classes {classes.source}: more than {_HIGHEST_ID} classes in all; masks have 8 bits")
        table[index] = number
    new = [number for number in names if number not in known]
    if again and again.dataset_id not in new:
        raise UserError(
            f"--replace {again.name}: --classes {classes.source} does not name it; name it there, as the masks show it"
        )
    if source and not new:
        raise UserError(
            f"--classes {classes.source}: nothing to learn, {source.folder} knows all of "
            f"{', '.join(classes.names[1:])}; name a new class, or give --replace {classes.names[1]} to learn it again"
        )
    return tuple(names.get(i, f"unused-{i}") for i in range(max(names) + 1)), new, table


def assign_mask_ids(classes: ClassList, table: np.ndarray, source: SourceStep | None) -> dict[int, int]:
    """Assign an id in predicted masks to every dataset id, where they differ.

    In a first step it is the value in the user's masks. In a later step, known classes keep theirs, and new ones have
    the value in the new masks, or if it is taken, the one after the highest.

    Args:
        classes: the class list.
        table: [256] uint8, dataset ids by class index.
        source: the step to continue from.

    Returns:
        Ids in masks by dataset id, 255 for the background if there is none; empty if all are the same.
    """
    values = {index: value for value, index in classes.labels.classes.items()}
    if source and source.info.mask_ids is None:
        return {}
    ids = dict(zip(source.info.dataset_ids, source.info.predicted_ids, strict=True)) if source else {}
    if source and source.replaced:
        ids[source.replaced.dataset_id] = source.replaced.mask_id
    if not source:
        ids[BACKGROUND] = values.get(BACKGROUND, IGNORE)
    for index in range(1, len(classes.names)):
        taken = set(ids.values())
        top = max(taken - {IGNORE}, default=-1)
        free = (v for v in (values[index], *range(top + 1, IGNORE), *range(IGNORE)) if v not in taken)
        ids.setdefault(int(table[index]), next(free))
    return {} if all(number == value for number, value in ids.items()) else ids
