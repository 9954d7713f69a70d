"""Tables that `starseg learn` prints before and after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from starseg.config import RunConfig
from starseg.engine.setup import make_method
from starseg.finetuning.defaults import EXTEND
from starseg.finetuning.unlabelled import unlabelled_classes
from starseg.report.tables import percent
from starseg.tasks import IGNORE

if TYPE_CHECKING:
    from starseg.finetuning.known import KnownClasses
    from starseg.finetuning.prepare import PreparedStep, SourceStep


def _classes_table(prepared_step: PreparedStep) -> Table:
    table = Table("class", "id", "", "images", "pixels", "training", "validation")
    for number in prepared_step.labelled:
        shown = prepared_step.pixels[:, number] > 0
        counts = (
            shown.sum(),
            prepared_step.pixels[:, number].sum(),
            (shown & ~prepared_step.val).sum(),
            (shown & prepared_step.val).sum(),
        )
        kind = "new" if number in prepared_step.new else "known"
        table.add_row(Text(prepared_step.names[number]), str(number), kind, *(f"{n:,}" for n in counts))
    return table


def _replay_table(source: SourceStep, share: float, iterations: int) -> Table:
    """Tabulate upper bounds of the replay; old classes that the old model finds in the new images need none."""
    assert source.stored is not None, "asked only where something is replayed"
    table = Table("old class", "id", "stored cells", "replayed per iteration, at most")
    names, ids = source.info.names[1:], source.info.dataset_ids[1:]
    for name, number, count in zip(names, ids, source.stored[1:].tolist(), strict=True):
        table.add_row(Text(name), str(number), f"{count:,.0f}", f"{int(count * share / iterations):,}")
    return table


def _never_stored(source: SourceStep) -> list[str]:
    """Return the names of old classes of which nothing can be replayed."""
    assert source.stored is not None, "asked only where something is replayed"
    stored = zip(source.info.names[1:], source.stored[1:].tolist(), strict=True)
    return [name for name, cells in stored if not cells]


def _known_table(known: KnownClasses) -> Table:
    titles = ["old class", f"cells found in {known.images} new images"]
    columns = [known.cells]
    if known.unlabelled is not None:
        titles.append(f"in {known.unlabelled_images} unlabelled photos")
        columns.append(known.unlabelled)
    if known.stored is not None:
        titles.append("stored cells")
        columns.append(known.stored)
    table = Table(*titles, *(["prototype"] if known.stored is None else []))
    for name, *counts in zip(known.names, *columns, strict=True):
        origin = ["derived from the classifier" if name in known.derived else ""] if known.stored is None else []
        table.add_row(Text(name), *(f"{cells:,}" if cells else "none" for cells in counts), *origin)
    return table


def _print_known(known: KnownClasses, config: RunConfig, say: Callable[[str], None]) -> None:
    """Print a note on old classes of an adopted network of which nothing is known, as no image of them was seen."""
    if not known.absent:
        return
    absent = ", ".join(known.absent)
    if config.method == EXTEND:
        say(
            f"note: nothing is known of {absent}: the logits stay as they are, but the new class may be predicted in "
            "their place; unlabelled photos that show them (--photos) prevent that"
        )
    else:
        say(
            f"note: the new images show nothing of {absent} and nothing of it is stored, so that it may be forgotten; "
            "add images that show it beside a new class, without labelling it"
        )


def _describe_extension(prepared_step: PreparedStep, config: RunConfig, source: SourceStep) -> str:
    """Say what the extension of a network does to its earlier classes."""
    options = make_method(config).options
    new = ", ".join(prepared_step.names[number] for number in prepared_step.new)
    rival = f"the part of {source.info.names[options.within]} that is {new}" if options.within > 0 else new
    if options.refine:
        return f"learns {rival}; --refine: a factor and an offset for each logit of the old classes are trained as well"
    where = f"{new} is not predicted"
    if source.replaced:
        where = f"neither {new} nor the old {source.replaced.name} is predicted"
    return f"learns {rival}; wherever {where}, the predictions stay exactly as they were"


def _schedule(config: RunConfig, step: int, images: int) -> str:
    """Describe the schedule of a step with a number of training images."""
    size, own = config.train.batch_size, make_method(config).own_stage(step, bool(config.model.pretrained))
    phase = own.schedule if own else config.train.later if step else config.train.base
    crops = own.crops if own else 1
    assert phase and phase.lr
    features = f" on the features of {crops} crops per image" if own else ""
    # If the classifier has a schedule of its own, this has a learning rate only if a copy is tuned.
    copy = config.train.later
    before = (
        f"{copy.epochs} epochs of {images // size} iterations of a copy at {copy.lr:g}, " if own and copy.lr else ""
    )
    return (
        f"schedule: {before}{phase.epochs} epochs of {images * crops // size} iterations{features}, batches of {size}, "
        f"crops of {config.data.crop}, learning rate {phase.lr:g}, method {config.method}, backbone "
        f"{config.model.backbone}"
    )


def print_preview(
    prepared_step: PreparedStep,
    config: RunConfig,
    source: SourceStep | None,
    console: Console,
    known: KnownClasses | None = None,
) -> None:
    """Print the images and pixels of each class, the schedule, and the replay of old classes.

    Args:
        prepared_step: the classes to learn and the images.
        config: configuration of the run.
        source: step that learning continues from.
        console: where to print.
        known: what is known of the old classes of an adopted network.
    """

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    train, step = int(prepared_step.training.sum()), len(prepared_step.steps) - 1
    iterations = train // config.train.batch_size
    say(
        f"{len(prepared_step.photos)} images: {train} to train on, {int(prepared_step.val.sum())} for validation, "
        f"{len(prepared_step.photos) - train - int(prepared_step.val.sum())} without a new class are not used"
    )
    console.print(_classes_table(prepared_step))
    if prepared_step.mask_ids:
        ids = {
            value: prepared_step.names[number] for number, value in prepared_step.mask_ids.items() if value != IGNORE
        }
        say(f"ids in predicted masks: {', '.join(f'{value} {name}' for value, name in sorted(ids.items()))}")
    if hidden := unlabelled_classes(source, prepared_step):
        listed = ", ".join(prepared_step.names[number] for number in hidden)
        say(
            f"not labelled in these masks: {listed}; not scored, and background pixels in which the model sees one of "
            "them are not scored as background"
        )
    for number in prepared_step.new:
        if not prepared_step.pixels[prepared_step.val, number].any():
            say(f"note: {prepared_step.names[number]} is in no validation image, so it is not scored; add images of it")
    say(_schedule(config, step, train))
    if source and source.replaced:
        say(f"{source.replaced.name}: learnt again; it replaces the old {source.replaced.name}")
    if config.method == EXTEND and source:
        say(_describe_extension(prepared_step, config, source))
    if known:
        console.print(_known_table(known))
        if source is None or source.stored is None:
            _print_known(known, config, say)
    if source and (share := source.replay_share(train, config.data.crop)) is not None:
        console.print(_replay_table(source, share, iterations))
        if lost := _never_stored(source):
            say(
                f"note: no stored cell shows {', '.join(lost)}, so that nothing of it is replayed; its objects may be "
                "too small for the crop and the output stride"
            )
        if share < 1:
            say(f"replays {100 * share:.2g} % of the stored counts, so that old classes do not outweigh new images")


def before_after_table(figures: Mapping[str, Any]) -> Group:
    """Tabulate the IoU per class of the old and the new model, from :func:`starseg.finetuning.run.before_after`."""
    steps = figures["steps"]
    names = [name for name in next(reversed(steps.values()))["iou"] if name not in figures["unlabelled"]]
    table = Table("class", *(["before"] if len(steps) > 1 else []), "after")
    for name in names:
        unknown = name in figures["new"]
        cells = [
            "" if unknown and i < len(steps) - 1 else percent(f["iou"][name]) for i, f in enumerate(steps.values())
        ]
        table.add_row(Text(f"{name} (new)" if unknown else name), *cells)
    lines = [Text(f"IoU in percent on the {figures['images']} validation images")]
    if figures["unlabelled"]:
        unlabelled = ", ".join(figures["unlabelled"])
        lines.append(Text(f"old classes are scored only where these masks label them; not labelled: {unlabelled}"))
        lines.append(
            Text(
                f"background is scored only where the old model sees none of these classes; it sees them in "
                f"{figures.get('unknown', 0):.1f} % of the pixels labelled background"
            )
        )
    return Group(lines[0], table, *lines[1:])
