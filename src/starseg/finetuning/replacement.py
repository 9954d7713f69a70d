"""Relearning of a class: the network without the old one, to which the new one of the same name and id is added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from starseg.engine import checkpoint
from starseg.errors import UserError
from starseg.finetuning.known import adopted_figures
from starseg.finetuning.prepare import Replaced, SourceStep
from starseg.utils.files import read_json


def without_class(source: SourceStep, name: str, target: Path) -> SourceStep:
    """Write a step without one of its classes, whose logit its network no longer returns.

    Args:
        source: the step.
        name: of the class, in upper or lower case.
        target: step directory to write.

    Returns:
        The step in ``target``, without a bank.

    Raises:
        UserError: the class does not exist, it is the only one of its head, or the network has been extended already.
    """
    info, asked = source.info, f"--replace {name}"
    known = [other.casefold() for other in info.names]
    if name.casefold() not in known[1:]:
        raise UserError(
            f"{asked}: {source.folder} knows no such class; expected one of {', '.join(info.names[1:])}, or leave the "
            "option out to learn a new class"
        )
    place = known.index(name.casefold(), 1)
    head = next(h for h in range(len(info.head_sizes)) if place <= sum(info.head_sizes[: h + 1]))
    if extension := info.architecture.extension:
        earlier = "replace it in the step before the first extension"
        if head >= extension.heads:
            earlier = f"step {head} learnt it: learn it again from step {head - 1}"
        raise UserError(
            f"{asked}: the network of {source.folder} has been extended, and later classes build on the "
            f"logits of earlier ones; {earlier}, then the classes after it"
        )
    if info.head_sizes[head] == 1:
        raise UserError(
            f"{asked}: it is the only class that step {head} of {source.folder} learnt, and a step needs at least one; "
            "learn it under another name"
        )
    smaller = _info_without(source, place, head)
    model, _ = checkpoint.load_model(source.folder)
    metrics = read_json(source.folder / "metrics.json")
    if adopted := adopted_figures(source.folder):
        metrics["adopted"] = adopted
    model.architecture = smaller.architecture
    checkpoint.save_step(target, model, smaller, {}, metrics)
    replaced = Replaced(info.names[place], info.dataset_ids[place], info.predicted_ids[place])
    return replace(source, folder=target, info=smaller, state={}, stored=None, replaced=replaced)


def _info_without(source: SourceStep, place: int, head: int) -> checkpoint.StepInfo:
    """Return the metadata of a step without the class of a training id, which belongs to a head."""
    info = source.info
    dropped = [list(rows) for rows in info.architecture.dropped] or [[] for _ in info.head_sizes]
    row = place - 1 - sum(info.head_sizes[:head])
    size = info.head_sizes[head] + len(dropped[head])
    dropped[head] = sorted([*dropped[head], [r for r in range(size) if r not in dropped[head]][row]])
    ids = info.mask_ids
    return replace(
        info,
        architecture=replace(info.architecture, dropped=dropped),
        head_sizes=[size - (h == head) for h, size in enumerate(info.head_sizes)],
        names=[*info.names[:place], *info.names[place + 1 :]],
        dataset_ids=[*info.dataset_ids[:place], *info.dataset_ids[place + 1 :]],
        mask_ids=None if ids is None else [*ids[:place], *ids[place + 1 :]],
        base=info.base - (place <= info.base),
    )
