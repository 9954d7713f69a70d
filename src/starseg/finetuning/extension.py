"""Learning on a network whose predictions stay as they are: the default method, and its options from the arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starseg.engine.checkpoint import StepInfo
from starseg.errors import UserError
from starseg.finetuning.defaults import EXTEND, method_for
from starseg.finetuning.known import has_background
from starseg.finetuning.prepare import LearnRequest, SourceStep
from starseg.inference.files import find_images
from starseg.methods import METHODS
from starseg.models.extended import ANY
from starseg.tasks import BACKGROUND
from starseg.utils.files import write_lines

PHOTOS = "photos.txt"
"""List of the unlabelled photos in the prepared data."""


def method_of(request: LearnRequest, info: StepInfo | None) -> str:
    """Return the given method, or the one that suits a source: constellation-extend for a softmax over all classes.

    `constellation` stands for it as well, because it is what constellation becomes on such a network.

    Raises:
        UserError: an option is given that only constellation-extend has.
    """
    extendable = info is not None and METHODS[EXTEND](METHODS[EXTEND].Options()).can_continue(info, {}) is None
    method = request.method or (EXTEND if extendable else method_for(info.method if info else None))
    if method == "constellation" and extendable:
        method = EXTEND
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("photos", "part_of", "refine", "replace", "tune_copy")
        if getattr(request, name)
    ]
    if given and method != EXTEND:
        raise UserError(f"{given[0]}: only {EXTEND} has this option, not {method}; leave it out")
    return method


def extension_options(request: LearnRequest, source: SourceStep, root: Path) -> dict[str, Any]:
    """Return the options of constellation-extend.

    Args:
        request: the arguments.
        source: the network to extend.
        root: the prepared data.

    Raises:
        UserError: --part-of names no class of the network, or --tune-copy comes too late.
    """
    within = BACKGROUND if has_background(source.folder) else ANY
    if request.part_of is not None:
        names = [name.casefold() for name in source.info.names]
        if request.part_of.casefold() not in names[1:]:
            raise UserError(
                f"--part-of {request.part_of}: {request.source} knows no such class; expected one of "
                f"{', '.join(source.info.names[1:])}"
            )
        within = names.index(request.part_of.casefold(), 1)
    if request.tune_copy and source.info.architecture.extension:
        raise UserError(
            f"--tune-copy: {request.source} has been extended already, and the description of its cells never changes; "
            "give the option in the first step on top of the network"
        )
    options: dict[str, Any] = {"within": within, "refine": request.refine, "tune_copy": request.tune_copy}
    return options | ({"photos": str(root / PHOTOS)} if request.photos else {})


def write_photos(request: LearnRequest, prepared: Path) -> list[Path]:
    """Write the list of the unlabelled photos into the prepared data, if some are given, and return them.

    Raises:
        UserError: there is no image among them.
    """
    if not request.photos:
        return []
    photos = [path.resolve() for path in find_images([request.photos])]
    write_lines(prepared / PHOTOS, map(str, photos))
    return photos
