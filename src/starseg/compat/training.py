"""Training and evaluation as the published commands do them."""

from __future__ import annotations

import json
import operator
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Any

from rich.console import Console

from starseg.compat.settings import PublishedConfig, parse_published, published_tree, set_key, tree_beside
from starseg.compat.weights import (
    checkpoint_name,
    info_name,
    load_bank,
    load_checkpoint,
    load_derived,
    noise_key,
    prototypes_name,
    save_info,
    save_published,
)
from starseg.config import RunConfig
from starseg.engine import checkpoint
from starseg.engine.evaluate import evaluate_model
from starseg.engine.launch import is_leader
from starseg.engine.rundir import Keys, differences, started
from starseg.engine.runner import Runner
from starseg.errors import UserError
from starseg.methods import METHODS, Method
from starseg.methods.star_lite import StarLite
from starseg.report.tables import figures_table, print_results
from starseg.utils.files import read_json, write_atomic, write_json

# Each command gives its own step's values, which other steps need not share: its config.json records them.
_OF_STEP_0: Keys = frozenset({("train", "base")})
_OF_LATER_STEPS: Keys = frozenset({("train", "later"), ("memory", "size")})
_OF_ONE_STEP: Keys = _OF_STEP_0 | _OF_LATER_STEPS | {("train", "warmup"), ("method",), ("seed",)}


def _own_keys(run: RunConfig) -> Keys:
    """Return the keys with values of one step alone. The method is one: STAR-Lite may continue from a step of STAR."""
    return _OF_ONE_STEP | {(METHODS[run.method].section,)}


def _latest(folder: Path) -> int | None:
    """Return the last epoch with a published checkpoint in ``folder``."""
    epochs = [path.stem.removeprefix("checkpoint-epoch") for path in folder.glob("checkpoint-epoch*.pth")]
    return max((int(e) for e in epochs if e.isdigit()), default=None)


def import_step(folder: Path, config: PublishedConfig, run: RunConfig, console: Console) -> None:
    """Convert a folder with a published checkpoint and prototypes into an evaluated step directory.

    Raises:
        UserError: there are none, or they belong to another step.
    """
    step, epoch = config.task.step - 1, _latest(folder)
    if epoch is None:
        stored = (prototypes_name if config.method == "star" else info_name)(config.trainer.epochs)
        raise UserError(
            f"step {step + 1} starts from step {step}, which is not there: {folder}; run it first (--task_step {step}) "
            f"or put {checkpoint_name(config.trainer.epochs)} and {stored} there"
        )
    weights = folder / checkpoint_name(epoch)
    own = config
    if (folder / "config.json").is_file():
        tree, source = tree_beside(weights)
        own = parse_published(tree, str(source))
    model, info = load_checkpoint(weights, own)
    bank = load_bank(folder, epoch, own)
    classes = len(bank["counts"]) - 1
    if info.step != step or classes != sum(info.head_sizes):
        raise UserError(
            f"{weights}: expected the weights of step {step} and as many prototypes, it has the heads of step "
            f"{info.step} and {classes} prototypes"
        )
    console.print(f"step {step}: taken from {weights}", highlight=False, soft_wrap=True)
    figures = evaluate_model(model, info, run, console)
    checkpoint.save_imported(folder, model, info, bank, figures, weights.name)


def _of_one_step(run: RunConfig) -> dict[str, Any]:
    tree, own = run.model_dump(mode="json"), dict[str, Any]()
    for key in _own_keys(run):
        set_key(own, ".".join(key), reduce(operator.getitem, key, tree))
    return own


def _free_keys(folder: Path, step: int, run: RunConfig) -> Keys:
    """Return the keys that may differ from the run's config.yaml for the step in ``folder``.

    Raises:
        UserError: the step was started with other values than ``run`` has, as its config.json says.
    """
    record = folder / "config.json"
    if not started(folder):
        return _own_keys(run)
    if not record.is_file():
        # Started by ``starseg train``: config.yaml says with what, and this command nothing of the other phase.
        return _OF_STEP_0 if step else _OF_LATER_STEPS
    tree, source = published_tree(record, None)
    recorded = parse_published(tree, str(source)).to_run()
    if changed := differences(_of_one_step(recorded), _of_one_step(run)):
        raise UserError(
            f"{folder} holds a step with another configuration:\n  " + "\n  ".join(changed) + "\n"
            "Give another --name or --save_dir, or remove this step and those after it to train them again."
        )
    return _own_keys(run)


def _record(folder: Path, config: PublishedConfig) -> None:
    """Record the options with which a step starts; those of a started step are kept."""
    record = folder / "config.json"
    if not (started(folder) and record.is_file()):
        folder.mkdir(exist_ok=True)
        published = config.model_dump(mode="json", exclude_unset=True)
        write_atomic(record, json.dumps(published, indent=4).encode())


def train_step(config: PublishedConfig, run: RunConfig, console: Console) -> None:
    """Train only the configured step, and write the published files next to starseg's own.

    Raises:
        UserError: the step before is missing, this one was started with other values, or whatever stops a run.
    """
    step, folder = config.task.step, config.run_dir
    target = folder / f"step_{step}"
    free = _free_keys(target, step, run) if is_leader() else _own_keys(run)
    _import_if_needed(config, run, console)
    with Runner(run, console, range(step, step + 1), listeners=[print_results(console)], free=free) as runner:
        if runner.leader:
            # Again: another command may have started the step before this one had the run's lock.
            _free_keys(target, step, run)
            _record(target, config)
        _use_derived(runner.prepared.method, config, console)
        runner.run()
    if runner.leader and "imported" not in read_json(target / "metrics.json"):
        weights = checkpoint.load_model(target)[0].state_dict()
        bank = checkpoint.load_bank(target)
        save_published(target, config.trainer.epochs, weights, bank, config.arch.type)
        console.print(f"wrote {target / checkpoint_name(config.trainer.epochs)} and its prototypes", soft_wrap=True)


def _use_derived(method: Method, config: PublishedConfig, console: Console) -> None:
    """Let STAR-Lite begin with the prototypes in ``new_saved_info-epoch<E>.pth`` of the step before, if it is there."""
    path = config.run_dir / f"step_{config.task.step - 1}" / info_name(config.trainer.epochs, derived=True)
    if isinstance(method, StarLite) and path.is_file():
        method.given = load_derived(path, config)
        console.print(f"prototypes: taken from {path}", highlight=False, soft_wrap=True)


def derive_prototypes(config: PublishedConfig, run: RunConfig, console: Console) -> None:
    """Write the prototypes with which STAR-Lite begins the configured step, as ``new_saved_info-epoch<E>.pth``.

    Raises:
        UserError: the step before is missing, or whatever stops a run.
    """
    step, folder = config.task.step, config.run_dir
    _import_if_needed(config, run, console)
    with Runner(run, console, range(step, step + 1), free=_own_keys(run)) as runner:
        bank = runner.begin(step).bank  # type: ignore[attr-defined]
        if runner.leader:
            path = folder / f"step_{step - 1}" / info_name(config.trainer.epochs, derived=True)
            save_info(path, {"counts": bank.counts, "prototypes": bank.prototypes, noise_key(config): bank.noise})
            console.print(f"wrote {path}", soft_wrap=True)


def _import_if_needed(config: PublishedConfig, run: RunConfig, console: Console) -> None:
    """Convert the step before, if it is there only as published files."""
    before = config.run_dir / f"step_{config.task.step - 1}"
    if config.task.step and is_leader() and not checkpoint.is_finished(before):
        import_step(before, config, run, console)


def evaluate_checkpoint(
    weights: Path, config: PublishedConfig, run: RunConfig, save_dir: Path | None, console: Console
) -> None:
    """Print the results of a published checkpoint; with ``save_dir``, also write them there like the published log."""
    model, info = load_checkpoint(weights, config)
    figures = evaluate_model(model, info, run, console)
    console.print(figures_table(str(weights), figures))
    if save_dir is not None:
        folder = save_dir / "log" / config.run_dir.name / f"test_{datetime.now():%m%d_%H%M%S}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", figures)
        console.print(f"wrote {folder / 'metrics.json'}", soft_wrap=True)
