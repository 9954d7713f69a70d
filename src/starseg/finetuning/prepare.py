"""Preparation of a step from the user's folders: classes, ids, split and converted masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from starseg.config import RunConfig, explain, load_config
from starseg.data.annotations.classlist import ClassList, read_classes
from starseg.data.annotations.coco import Coco, read_coco
from starseg.data.annotations.photos import Photo, UnknownValues, convert_masks, pair_files
from starseg.data.datasets.folder import write_list
from starseg.data.samples import sample_seed
from starseg.data.validation import split_images
from starseg.engine import checkpoint
from starseg.errors import UserError
from starseg.finetuning.defaults import replay_share
from starseg.finetuning.ids import assign_ids, assign_mask_ids
from starseg.finetuning.known import check_background
from starseg.finetuning.question import describe_values, doubt, mismatch, values_in_masks
from starseg.inference.hub import is_export
from starseg.methods import METHODS, Method
from starseg.tasks import BACKGROUND, IGNORE
from starseg.utils.files import write_json, write_lines


@dataclass(frozen=True)
class LearnRequest:
    """Arguments of `starseg learn`; None: chosen from the data, the source or its run.

    Attributes:
        source: step directory to continue from; None for a first step.
        images: a folder.
        masks: a folder, or a COCO file.
        classes: a file or names, see :func:`~starseg.data.annotations.classlist.read_classes`; None: the
            categories of a COCO file.
        out: run directory.
        background: whether the masks have a background; if not, value 0 is the first class.
        ignored: values of ignored pixels in the masks, in addition to 255.
        method: a registered method that can continue from the source; None: see
            :func:`starseg.finetuning.extension.method_of`.
        backbone, pretrained, crop: of a first step.
        epochs, lr: of the new step.
        val_share: of the images, kept for validation.
        seed: of the run and the split.
        photos, part_of, refine, replace, tune_copy: only for an extended network, see
            :mod:`starseg.finetuning.extension`.
    """

    source: Path | None
    images: Path
    masks: Path
    classes: str | None
    out: Path
    method: str | None = None
    backbone: str | None = None
    pretrained: bool | Path | None = None
    crop: int | None = None
    epochs: int | None = None
    lr: float | None = None
    val_share: float = 0.15
    seed: int = 0
    background: bool = True
    ignored: tuple[int, ...] = ()
    photos: str | None = None
    part_of: str | None = None
    refine: bool = False
    replace: str | None = None
    tune_copy: bool = False


class Replaced(NamedTuple):
    """A class that is learnt again: name, dataset id, and id in predicted masks."""

    name: str
    dataset_id: int
    mask_id: int


@dataclass(frozen=True)
class SourceStep:
    """Step that learning continues from.

    Attributes:
        folder, info: of the step.
        state: what its method stored with it.
        config: configuration of its run, if that is next to it.
        stored: [1 + K] stored feature cells of the background and of each old class, of which the new step replays
            some; None if it replays none.
        replaced: the class that the step has no longer, because it is learnt again.
    """

    folder: Path
    info: checkpoint.StepInfo
    state: dict[str, Tensor]
    config: RunConfig | None
    stored: Tensor | None
    replaced: Replaced | None = None

    @property
    def groups(self) -> list[list[int]]:
        """Dataset ids learnt in each step so far."""
        ids = iter(self.info.dataset_ids[1:])
        return [[next(ids) for _ in range(size)] for size in self.info.head_sizes]

    def replay_share(self, images: int, crop: int) -> float | None:
        """Share of :attr:`stored` to replay beside so many new images of a crop size; None: nothing is replayed."""
        if self.stored is None:
            return None
        return replay_share(float(self.stored.sum()), images * (crop // self.info.architecture.stride) ** 2)


@dataclass(frozen=True)
class PreparedStep:
    """Classes to learn and the data to learn them from.

    Attributes:
        names: by dataset id.
        steps: dataset ids of each step, the last one new.
        labelled: dataset ids that the masks show, the new and the known.
        photos: images and their given masks.
        pixels: [N, 256] pixels of every dataset id in every mask.
        val: [N] bool, images for validation.
        background: whether the model has a background.
        mask_ids: ids in predicted masks by dataset id, the values in the user's masks; empty if they are the same.
    """

    names: tuple[str, ...]
    steps: list[list[int]]
    labelled: list[int]
    photos: list[Photo]
    pixels: np.ndarray
    val: np.ndarray
    background: bool = True
    mask_ids: Mapping[int, int] = field(default_factory=dict)

    @property
    def new(self) -> list[int]:
        """Dataset ids of the new classes."""
        return self.steps[-1]

    @property
    def training(self) -> np.ndarray:
        """Training images, [N] bool: those that show a new class and are not used for validation."""
        return ~self.val & (self.pixels[:, self.new] > 0).any(1)

    def write_list(self, path: Path, chosen: np.ndarray) -> None:
        """Write the list of the images selected by ``chosen`` [N] bool, with their converted masks."""
        photos = [self.photos[i] for i in np.flatnonzero(chosen).tolist()]
        write_list(path, [(photo.image.resolve(), Path("masks") / f"{photo.name}.png") for photo in photos])


def open_source_step(folder: Path, method: str) -> SourceStep:
    """Open the step that learning continues from.

    Raises:
        UserError: no finished step, or one that ``method`` cannot continue from.
    """
    info = checkpoint.load_info(folder)
    if is_export(folder):
        raise UserError(
            f"{folder}: an export for a model hub, which holds no prototype bank and so cannot be learnt on from; give "
            f"the step directory that it was made from (step_{info.step} of its run)"
        )
    if not checkpoint.is_finished(folder):
        raise UserError(f"{folder} is not finished (it holds no metrics.json); finish its run first")
    check_background(folder, method)
    path = folder.resolve().parent / "config.yaml"
    config = load_config(path) if path.is_file() else None
    learner, state = default_method(method), checkpoint.load_bank(folder)
    if (reason := learner.can_continue(info, state)) is not None:
        others = [name for name in sorted(METHODS) if _can_continue(name, info, state)]
        raise UserError(
            f"{folder}: {method} cannot continue from it: {reason}"
            + (f"; or give --method {' or '.join(others)}" if others else "")
        )
    learner.load_state_dict(state)
    return SourceStep(folder, info, state, config, learner.replay_counts())


def default_method(name: str) -> Method:
    """Return a method with its default options.

    Raises:
        UserError: the method has an option without a default.
    """
    method = METHODS[name]
    try:
        return method(method.Options())
    except ValidationError as error:
        raise UserError(
            f"--method {name}: has options without a default, which learn cannot give; take another method, or "
            f"`starseg train`:\n{explain(error, method.Options, f'{method.section}.')}"
        ) from error


def _can_continue(name: str, info: checkpoint.StepInfo, state: dict[str, Tensor]) -> bool:
    try:
        return default_method(name).can_continue(info, state) is None
    except UserError:
        return False


def prepare_step(request: LearnRequest, source: SourceStep | None, folder: Path, console: Console) -> PreparedStep:
    """Read the user's folders and write the prepared data set (:mod:`starseg.data.datasets.folder`) into ``folder``.

    Raises:
        UserError: whatever is wrong with the folders; a new class that no mask shows; too few images.
    """
    if not 0 < request.val_share < 1:
        raise UserError(f"--val-share: expected a share between 0 and 1 such as 0.15, got {request.val_share}")
    if request.lr is not None and not request.lr > 0:
        raise UserError(f"--lr: expected a learning rate above 0 such as 0.001, got {request.lr}")
    coco = read_coco(request.masks) if request.masks.is_file() else None
    classes = _classes(request, coco, console)
    names, new, table = assign_ids(classes, source)
    if coco:
        photos = coco.photos(request.images, classes)
    else:
        photos = pair_files(request.images, request.masks, classes)
    try:
        pixels = convert_masks(photos, table, folder / "masks", console)
    except UnknownValues as error:
        found = values_in_masks(classes, table, error.others) + error.pixels
        raise UserError(f"{error}{mismatch(request, classes, found, ())}") from error
    shown = pixels[:, new] > 0
    _check_shown(request, classes, photos, pixels.sum(0), table, [names[c] for c in new if not pixels[:, c].any()])
    val = split_images(shown, request.val_share, np.random.default_rng(sample_seed(request.seed, "validation")))
    prepared_step = PreparedStep(
        names,
        [*(source.groups if source else []), new],
        sorted({int(i) for i in table[1 : len(classes.names)]}),
        photos,
        pixels,
        val,
        source.info.background if source else classes.background,
        assign_mask_ids(classes, table, source),
    )
    if prepared_step.training.sum() < 2 or not shown[val].any():
        raise UserError(
            f"--images {request.images}: {shown.any(1).sum()} images show a new class; expected at least 3, two to "
            "train on and one for validation"
        )
    _write_prepared(folder, prepared_step, request, classes)
    return prepared_step


def _check_shown(
    request: LearnRequest,
    classes: ClassList,
    photos: Sequence[Photo],
    pixels: np.ndarray,
    table: np.ndarray,
    absent: Sequence[str],
) -> None:
    """Refuse new classes that no mask shows, and a list of names that may be one off.

    Args:
        request: the arguments.
        classes: the class list.
        photos: images and masks.
        pixels: [256] of every dataset id.
        table: [256] uint8, dataset ids by class index.
        absent: names of new classes that no mask shows.

    Raises:
        UserError: there is such a class, or the list is doubtful; the message asks what is right.
    """
    found = values_in_masks(classes, table, pixels)
    by_value = classes.colours is None and not any(p.mask and p.mask.suffix.lower() == ".json" for p in photos)
    if not absent:
        if by_value and request.source is None and (question := doubt(request, classes, found)):
            raise UserError(question)
        return
    them = "it" if len(absent) == 1 else "them"
    remedy, question = f"add images of {them}, or take {them} out of --classes", ""
    values = [int(v) for v in np.flatnonzero(found) if v != IGNORE]
    if by_value and values == [BACKGROUND] and found[IGNORE]:
        remedy = (
            "the masks hold only 0 and 255, and 255 is ignored; if they are black and white, give a file as --classes "
            f"with the lines 'background #000000' and '{absent[0]} #ffffff'"
        )
    elif by_value:
        listed, meanings = ", ".join(map(str, values)), describe_values(classes)
        order = "" if classes.numbered else ", whose order is the order of the values"
        remedy = f"the masks hold the values {listed}, where {meanings}; {remedy}{order}"
        question = mismatch(request, classes, found, absent)
    raise UserError(f"--masks {request.masks}: no mask shows {', '.join(absent)}; {remedy}{question}")


def _classes(request: LearnRequest, coco: Coco | None, console: Console) -> ClassList:
    """Return the given classes, by default those of the COCO file."""
    if coco and request.ignored:
        raise UserError(f"--ignore: {request.masks} is a COCO file, which has no values; leave the option out")
    if request.classes:
        classes = read_classes(request.classes, request.background, request.ignored)
        if coco and (rest := coco.left_out(classes)):
            text = f"note: annotations of {', '.join(rest)} count as background, they are not in --classes"
            console.print(text, highlight=False, soft_wrap=True, markup=False)
        return classes
    if not coco:
        raise UserError(
            "--classes: give a file or names such as cat,dog; only a COCO file as --masks names its classes"
        )
    return replace(coco.classes, background=request.background)


def _write_prepared(folder: Path, prepared_step: PreparedStep, request: LearnRequest, classes: ClassList) -> None:
    write_lines(folder / "classes.txt", prepared_step.names)
    for name, chosen in (("train.txt", ~prepared_step.val), ("val.txt", prepared_step.val)):
        prepared_step.write_list(folder / name, chosen)
    digest = hashlib.sha256()
    files = (p.resolve() for photo in prepared_step.photos for p in (photo.image, photo.mask) if p)
    for path in dict.fromkeys(files):
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    about: dict[str, object] = {"photos": request.photos} if request.photos else {}
    about |= {"replace": request.replace} if request.replace else {}
    about |= {
        "source": str(request.source.resolve()) if request.source else None,
        "step": len(prepared_step.steps) - 1,
        "labelled": prepared_step.labelled,
        "classes": list(prepared_step.names),
        "val_share": request.val_share,
        "seed": request.seed,
        "files": digest.hexdigest(),
    }
    if classes.values is not None or classes.ignored:
        values = {str(value): classes.names[index] for value, index in classes.labels.classes.items()}
        about |= {"values": values, "ignored": sorted(classes.ignored)}
    if not prepared_step.background:
        about |= {"background": False}
    if prepared_step.mask_ids:
        about |= {"mask_ids": {str(number): value for number, value in prepared_step.mask_ids.items()}}
    write_json(folder / "learn.json", about)
