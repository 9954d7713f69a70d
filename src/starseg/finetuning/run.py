"""Learning of a step from a user's folder, on top of a step directory or as a first step."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console

from starseg.config import ModelConfig, RunConfig, choices_for, parse_config
from starseg.data.images import image_size
from starseg.engine import checkpoint
from starseg.engine.evaluate import evaluate_model
from starseg.engine.metrics import summarize
from starseg.engine.rundir import LOCK, PREPARED, adopt, lock, refuse_another_run
from starseg.engine.runner import Runner
from starseg.engine.setup import make_method, resolve_config
from starseg.engine.state import begun
from starseg.engine.trial import StageTime
from starseg.errors import UserError
from starseg.finetuning.defaults import (
    EXTEND,
    FIRST,
    LATER,
    RECIPE,
    batch_size,
    classifier_epochs,
    crop_size,
)
from starseg.finetuning.extension import extension_options, method_of, write_photos
from starseg.finetuning.known import adopted_figures, known_classes
from starseg.finetuning.prepare import (
    LearnRequest,
    PreparedStep,
    SourceStep,
    default_method,
    open_source_step,
    prepare_step,
)
from starseg.finetuning.preview import before_after_table, print_preview
from starseg.finetuning.replacement import without_class
from starseg.finetuning.unlabelled import mark_seen, unlabelled_classes
from starseg.methods import METHODS, Stage
from starseg.models import Architecture, make_network
from starseg.report.tables import print_results
from starseg.report.testset import open_test_set
from starseg.tasks import BACKGROUND
from starseg.utils.files import read_json, write_json
from starseg.utils.terminal import make_console

_TRIAL = 3


def _crop(request: LearnRequest, source: SourceStep | None, prepared_step: PreparedStep, multiple: int) -> int:
    if source:
        if request.crop not in (None, source.info.crop):
            raise UserError(
                f"--crop {request.crop}: {request.source} was trained on crops of {source.info.crop}, on which its "
                "stored statistics rest; leave --crop out"
            )
        return source.info.crop
    return request.crop or crop_size([min(image_size(photo.image)) for photo in prepared_step.photos], multiple)


def make_config(
    request: LearnRequest, source: SourceStep | None, prepared_step: PreparedStep, root: Path, multiple: int = 16
) -> RunConfig:
    """The run that learns the prepared_step's last step, its schedule fitted to the number of images.

    Args:
        request: its options win; it names a method.
        source: gives network, crop and options.
        prepared_step: gives classes and images.
        root: the prepared data.
        multiple: what the network needs the crop to be a multiple of.
    """
    images = int(prepared_step.training.sum())
    batch, phase = batch_size(images), LATER if source and not request.tune_copy else FIRST
    epochs = request.epochs or phase.epochs(images)
    rate = phase.learning_rate(epochs * (images // batch))
    model: dict[str, Any] = {"pretrained": False}
    if source:
        network = source.info.architecture
        model |= {"backbone": network.encoder}
        if network.builder == "timm":
            model |= {"output_stride": network.stride}
            if network.decoder in get_args(ModelConfig.model_fields["decoder"].annotation):
                model |= {"decoder": network.decoder}
    else:
        pretrained = True if request.pretrained is None else request.pretrained
        rate = rate if pretrained else phase.rates[1]
        model |= {"pretrained": str(pretrained) if isinstance(pretrained, Path) else pretrained}
        model |= {"backbone": request.backbone} if request.backbone else {}
    crop = _crop(request, source, prepared_step, multiple)
    assert request.method
    section, learner = METHODS[request.method].section, default_method(request.method)
    options = source.config.method_section(section) if source and source.config else {}
    if source and request.method == EXTEND:
        options = {**options, "photos": None} | extension_options(request, source, root)
    if source and (share := source.replay_share(images, crop)) is not None:
        options |= learner.scale_replay(share)
    phases: dict[str, Any] = {"later" if source else "base": {"epochs": epochs, "lr": request.lr or rate}}
    if own := learner.own_stage(len(prepared_step.steps) - 1, bool(model["pretrained"])):
        given = replace(request, epochs=None, lr=None) if request.tune_copy else request
        options |= _own_schedule(given, own, images * options.get("crops", own.crops) // batch)
        phases = phases if request.tune_copy else {}
    tree = {
        "method": request.method,
        "out": str(request.out),
        "seed": request.seed,
        "compat": source.info.compat if source else None,
        "recipe": RECIPE,
        "data": {"dataset": "folder", "root": str(root), "crop": crop},
        "task": {"name": "learn", "steps": prepared_step.steps},
        "model": model,
        "train": {"batch_size": batch, **phases},
        "memory": {"size": 0},
    }
    return parse_config(tree | ({section: options} if options else {}), "learn")


def _own_schedule(request: LearnRequest, stage: Stage, iterations: int) -> dict[str, Any]:
    """Return the options of a method with a schedule of its own, for a number of iterations per epoch."""
    assert stage.schedule
    epochs = request.epochs or classifier_epochs(iterations, stage.schedule.epochs)
    return {"epochs": epochs, "lr": request.lr or stage.schedule.lr}


def _refuse_out(request: LearnRequest) -> None:
    """Refuse an --out that another command has filled or that cannot be written to."""
    out = request.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a free place")
    there = {entry.name for entry in out.iterdir()} - {LOCK} if out.is_dir() else set()
    if there and not (out / PREPARED / "learn.json").is_file():
        raise UserError(f"--out {out}: holds something that `starseg learn` did not make; give a free place")
    place = next(folder for folder in out.resolve().parents if folder.exists())
    try:
        # Only trying tells: /proc says that root may write into it.
        with tempfile.TemporaryDirectory(prefix=".learn-", dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out}: nothing can be written into {place} ({error.strerror}); give another place"
        ) from error


def _crop_multiple(request: LearnRequest) -> int:
    """What a new network needs the crop to be a multiple of.

    Raises:
        UserError: it cannot be built, or its weights are not available; told before any mask is read.
    """
    model = ModelConfig()
    weights = model.pretrained if request.pretrained is None else request.pretrained
    architecture = Architecture(request.backbone or model.backbone, model.decoder, model.output_stride)
    return make_network(architecture, [1], pretrained=weights).multiple


def _holds_prepared(run: Path, prepared: Path) -> bool:
    """Whether the run directory holds the prepared data already.

    Raises:
        UserError: others are, and a step on them was started.
    """
    target = run / PREPARED
    if not target.is_dir():
        return False
    there = read_json(target / "learn.json")
    if there == read_json(prepared / "learn.json"):
        return True
    step = run / f"step_{there['step']}"
    if checkpoint.is_finished(step) or begun(step):
        raise UserError(f"--out {run}: holds a step learnt from other files, classes or options; give a free place")
    return False


def _check_same_data(config: RunConfig, prepared: Path) -> None:
    """Refuse a run directory with a started step on other prepared data, or with other options."""
    _holds_prepared(config.run_dir, prepared)
    refuse_another_run(config.run_dir, resolve_config(config)[0])


def _install(prepared: Path, run: Path) -> None:
    """Move the prepared data into the locked run directory, unless they are there already."""
    if _holds_prepared(run, prepared):
        return
    target = run / PREPARED
    if target.is_dir():
        for old in (target, *run.glob("step_*")):
            shutil.rmtree(old)
    prepared.rename(target)


def _take_over(
    source: SourceStep, prepared_step: PreparedStep, config: RunConfig, origin: Path | None, console: Console
) -> None:
    """Copy the source step, which comes from ``origin``, into the run directory, evaluated on the validation images."""
    info = source.info
    target = config.run_dir / f"step_{info.step}"
    if checkpoint.is_finished(target):
        return
    model, _ = checkpoint.load_model(source.folder)
    if prepared_step.pixels[prepared_step.val][:, info.dataset_ids[1:]].any():
        figures = evaluate_model(model, info, config, console)
    else:
        nothing = np.zeros([len(info.names)] * 2, np.int64)
        figures = {
            **summarize(nothing, info.names, info.base, background=info.background),
            "confusion": nothing.tolist(),
        }
    if adopted := adopted_figures(source.folder):
        figures["adopted"] = adopted
    bank = checkpoint.load_bank(source.folder)
    checkpoint.save_imported(target, model.cpu(), info, bank, figures, str(origin))


def _trial(
    config: RunConfig, prepared_step: PreparedStep, source: SourceStep | None, prepared: Path
) -> list[StageTime]:
    """Measure a few iterations on part of the data; writes next to ``prepared``."""
    run, batch = prepared.parent / "trial", config.train.batch_size
    chosen = prepared_step.training & (prepared_step.training.cumsum() <= _TRIAL * batch)
    prepared_step.write_list(prepared / "train.txt", chosen)
    tree = config.model_dump(mode="json", by_alias=True)
    tree["out"], tree["task"]["allow_absent"] = str(run), True
    method = make_method(config)
    if scaled := method.scale_replay(float(chosen.sum() / prepared_step.training.sum())):
        tree[method.section] = tree.get(method.section, {}) | scaled
    step = len(prepared_step.steps) - 1
    if source:
        run.mkdir()
        adopt(source.folder, run / f"step_{step - 1}")
    with Runner(parse_config(tree, "learn"), make_console(quiet=True), range(step, step + 1)) as runner:
        return runner.stage_times(step, _TRIAL)


def before_after(run: Path) -> dict[str, Any]:
    """Return the IoU per class on the validation images of the old model and the new.

    Both are compared with the same truth; what an old model cannot know is a miss. Classes that the masks do not
    label are left out, and their predictions count as background. A background pixel in which the old model sees such a
    class counts only against labelled classes that are predicted there.

    Returns:
        {"images", "new": names, "unlabelled": names, "unknown": percentage of background pixels in which the old model
        sees an unlabelled class, "steps": {"step_0": {"iou": {name: percent or None}, "miou": {...}}, ...}}.
    """
    test = open_test_set(run)
    names, size = test.task.class_names(test.last), 1 + len(test.task.seen(test.last))
    confusions = {folder.name: np.zeros(size * size, np.int64) for folder in test.folders}
    labels = np.zeros(size, np.int64)
    for first in range(0, len(test.positions), 64):
        images, truth = test.samples(test.positions[first : first + 64], unlabelled=True)
        valid = truth < size
        labels += torch.bincount(truth[valid].long(), minlength=size).numpy()
        for folder in test.folders:
            pairs = truth[valid].long() * size + test.predict(folder, images)[valid].long()
            confusions[folder.name] += torch.bincount(pairs, minlength=size * size).numpy()
    ids, choices = test.task.dataset_ids(test.last), choices_for(test.config.compat)
    hidden = test.dataset.unscored(ids)
    figures = {
        name: summarize(
            test.dataset.scored(matrix.reshape(size, size), ids),
            names,
            test.task.base,
            iou_epsilon=choices.iou_epsilon,
            absent_as_zero=choices.absent_as_zero,
            background=test.dataset.background,
            unscored=hidden,
        )
        for name, matrix in confusions.items()
    }
    return {
        "images": len(test.positions),
        "new": [test.task.label(c) for c in test.task.new(test.last)],
        "unlabelled": [test.task.label(c) for c in test.task.seen(test.last) if c in test.dataset.unlabelled],
        "unknown": float(100 * labels[hidden].sum() / max(1, labels[hidden].sum() + labels[BACKGROUND])),
        "steps": {name: {"iou": f["iou"], "miou": f["miou"]} for name, f in figures.items()},
    }


def learn(request: LearnRequest, console: Console, dry_run: bool = False) -> Path | None:
    """Learn the classes of a folder; an interrupted request resumes when repeated.

    Args:
        request: what from what.
        console: where the preview, progress and the before / after table go.
        dry_run: print the preview with a time estimate, and write and train nothing.

    Returns:
        The step directory; None for a dry run.

    Raises:
        UserError: anything in the input that must be corrected first.
    """
    info = checkpoint.load_info(request.source) if request.source else None
    method = method_of(request, info)
    source = open_source_step(request.source, method) if request.source else None
    _refuse_out(request)
    multiple = _crop_multiple(request) if not source else source.info.architecture.stride
    out = request.out.resolve()
    if not dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as until_trained:
        if source and request.replace:
            smaller = Path(until_trained.enter_context(tempfile.TemporaryDirectory(prefix="starseg-learn-")))
            source = without_class(source, request.replace, smaller / f"step_{source.info.step}")
        with tempfile.TemporaryDirectory(prefix=".learn-", dir=None if dry_run else out.parent) as temporary:
            prepared = Path(temporary) / PREPARED
            prepared_step = prepare_step(request, source, prepared, console)
            unlabelled = write_photos(request, prepared)
            chosen = replace(request, method=method)
            config = make_config(chosen, source, prepared_step, prepared if dry_run else out / PREPARED, multiple)
            _check_same_data(config, prepared)
            training = [prepared_step.photos[i] for i in np.flatnonzero(prepared_step.training).tolist()]
            photos = [(photo.image, prepared / "masks" / f"{photo.name}.png") for photo in training]
            known = known_classes(source.folder, photos, prepared_step.new, unlabelled) if source else None
            print_preview(prepared_step, config, source, console, known)
            if dry_run:
                times = _trial(config, prepared_step, source, prepared)
                _print_estimate(times, config, prepared_step, console)
                return None
            held = until_trained.enter_context(lock(out))
            _install(prepared, out)
        if source:
            mark_seen(out / PREPARED, source, unlabelled_classes(source, prepared_step), console)
            _take_over(source, prepared_step, config, request.source, console)
        step = len(prepared_step.steps) - 1
        listeners = [print_results(console)]
        with Runner(config, console, range(step, step + 1), listeners=listeners, lock=held) as runner:
            run = runner.run()
    figures = before_after(run)
    write_json(run / PREPARED / "before_after.json", figures)
    console.print(before_after_table(figures))
    folder = request.out / f"step_{step}"
    console.print(f"learnt: {folder}; try `starseg predict {folder} PHOTOS --out found --overlays`", soft_wrap=True)
    return folder


def _print_estimate(times: list[StageTime], config: RunConfig, prepared_step: PreparedStep, console: Console) -> None:
    """Print the estimated time of training and of the passes over the data before and after it."""
    iterations = int(prepared_step.training.sum()) // config.train.batch_size
    total = sum(stage.total(iterations) for stage in times)
    console.print(
        f"time: about {max(1, round(total))} s ({times[0].images:.2f} s an iteration on this machine); nothing was "
        f"written, without --dry-run, the result is written to {config.run_dir}",
        highlight=False,
        soft_wrap=True,
    )
