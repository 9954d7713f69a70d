"""What the published commands do, once their flags and configuration are understood."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from rich.console import Console

from starseg.compat.settings import PublishedConfig, parse_published, published_tree
from starseg.compat.weights import (
    checkpoint_name,
    load_checkpoint,
    load_prototypes,
    prototypes_name,
    save_published,
)
from starseg.config import RunConfig
from starseg.engine import checkpoint
from starseg.engine.evaluate import evaluate_model
from starseg.engine.launch import is_leader
from starseg.engine.runner import Runner
from starseg.errors import UserError
from starseg.replay.bank import PrototypeBank
from starseg.report.tables import figures_table

# Each command gives its own step's values.
_OF_ONE_STEP = frozenset({("train", "base"), ("train", "later"), ("train", "warmup"), ("memory", "size"), ("star",)})


def _latest(folder: Path) -> int | None:
    """The last epoch whose published checkpoint lies in ``folder``."""
    epochs = [path.stem.removeprefix("checkpoint-epoch") for path in folder.glob("checkpoint-epoch*.pth")]
    return max((int(e) for e in epochs if e.isdigit()), default=None)


def import_step(folder: Path, config: PublishedConfig, run: RunConfig, console: Console) -> None:
    """Make a step directory of a folder that holds a published checkpoint and prototypes; scores it on the way.

    Raises:
        UserError: there are none, or they belong to another step.
    """
    step, epoch = config.task.step - 1, _latest(folder)
    if epoch is None:
        raise UserError(
            f"step {step + 1} starts from step {step}, which is not there: {folder}; run it first (--task_step {step}) "
            f"or put {checkpoint_name(config.trainer.epochs)} and {prototypes_name(config.trainer.epochs)} there"
        )
    weights = folder / checkpoint_name(epoch)
    own = config
    if (folder / "config.json").is_file():
        tree, source = published_tree(None, weights)
        own = parse_published(tree, str(source))
    model, info = load_checkpoint(weights, own)
    bank = load_prototypes(folder / prototypes_name(epoch))
    if info.step != step or len(bank) != sum(info.head_sizes):
        raise UserError(
            f"{weights}: expected the weights of step {step} and as many prototypes, it has the heads of step "
            f"{info.step} and {len(bank)} prototypes"
        )
    console.print(f"step {step}: taken from {weights}", highlight=False, soft_wrap=True)
    figures = evaluate_model(model, info, run, console)
    checkpoint.save_imported(folder, model, info, bank.state_dict(), figures, weights.name)


def train_step(config: PublishedConfig, run: RunConfig, console: Console) -> None:
    """Train the configured step alone and write the published files beside our own.

    Raises:
        UserError: the step before is missing, or whatever stops a run.
    """
    step, folder = config.task.step, config.run_dir
    if step and is_leader() and not checkpoint.is_finished(folder / f"step_{step - 1}"):
        import_step(folder / f"step_{step - 1}", config, run, console)
    runner = Runner(run, console, range(step, step + 1), _OF_ONE_STEP)
    runner.run()
    if runner.leader:
        target = runner.step_dir(step)
        weights = checkpoint.load_model(target)[0].state_dict()
        bank = PrototypeBank.from_state_dict(checkpoint.load_bank(target))
        save_published(target, config.trainer.epochs, weights, bank)
        published = config.model_dump(mode="json", exclude_unset=True)
        checkpoint.write_atomic(target / "config.json", json.dumps(published, indent=4).encode())
        console.print(f"wrote {target / checkpoint_name(config.trainer.epochs)} and its prototypes", soft_wrap=True)


def evaluate_checkpoint(
    weights: Path, config: PublishedConfig, run: RunConfig, save_dir: Path | None, console: Console
) -> None:
    """Print the figures of a published checkpoint; with ``save_dir`` also keep them there as the published log is."""
    model, info = load_checkpoint(weights, config)
    figures = evaluate_model(model, info, run, console)
    console.print(figures_table(str(weights), figures))
    if save_dir is not None:
        folder = save_dir / "log" / config.run_dir.name / f"test_{datetime.now():%m%d_%H%M%S}"
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / "metrics.json", figures)
        console.print(f"wrote {folder / 'metrics.json'}", soft_wrap=True)
