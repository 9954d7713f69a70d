"""A run directory: whose it is, and what it takes over from another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from starseg.config import RunConfig, dump_config
from starseg.engine import checkpoint
from starseg.errors import UserError
from starseg.methods import METHODS, method_options
from starseg.methods.base import Phase, Schedule

# Keys that may differ when a run goes on: where things lie and how fast they go, not what is learnt.
Keys = frozenset[tuple[str, ...]]
_FREE_KEYS: Keys = frozenset(
    {
        ("out",),
        ("data", "workers"),
        ("data", "root"),
        ("train", "accelerator"),
        ("train", "devices"),
        ("train", "num_nodes"),
        ("eval", "batch_size"),
    }
)


def resolve(config: RunConfig, schedule: Schedule) -> RunConfig:
    """Fill in what the method decides for this data set, so that the saved copy says all."""

    def phase(given: Any, default: Phase) -> dict[str, Any]:
        return {"epochs": given.epochs or default.epochs, "lr": given.lr or default.lr}

    train = config.train
    base, later = phase(train.base, schedule.base), phase(train.later, schedule.later)
    warmup = schedule.warmup if train.warmup is None else train.warmup
    resolved = train.model_copy(
        update={
            "base": train.base.model_copy(update=base),
            "later": train.later.model_copy(update=later),
            "warmup": warmup,
        }
    )
    size = schedule.memory if config.memory.size is None else config.memory.size
    memory = config.memory.model_copy(update={"size": size})
    method = METHODS[config.method]
    options = method_options(config.method, config).model_dump()
    if "pos_weight" in options and options["pos_weight"] is None:
        options["pos_weight"] = schedule.pos_weight
    return config.model_copy(update={"train": resolved, "memory": memory, method.section: options})


def _differences(a: Any, b: Any, free: Keys, path: tuple[str, ...] = ()) -> list[str]:
    if path in free:
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in _differences(a.get(k), b.get(k), free, (*path, k))]
    return [] if a == b else [f"{'.'.join(path)}: {a!r} there, {b!r} now"]


def claim(run_dir: Path, config: RunConfig, free: Keys = frozenset()) -> None:
    """Save the resolved configuration, or refuse a directory that belongs to another one."""
    text, path = dump_config(config), run_dir / "config.yaml"
    if path.is_file():
        changed = _differences(yaml.safe_load(path.read_text()), yaml.safe_load(text), _FREE_KEYS | free)
        if changed and any(map(checkpoint.is_finished, run_dir.glob("step_*"))):
            raise UserError(
                f"{run_dir} holds a run with another configuration:\n  " + "\n  ".join(changed) + "\n"
                "Give another directory with --out, or remove this one to start over."
            )
    elif run_dir.is_dir() and any(not entry.name.startswith("step_") for entry in run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty and holds no run of starseg; give another directory with --out")
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(path, text.encode())


def adopt(source: Path, target: Path, mine: checkpoint.StepInfo) -> None:
    """Take another run's finished step 0 as ours.

    Raises:
        UserError: it is not finished, or learnt something else than ``mine``.
    """
    info = checkpoint.load_info(source)
    network = ("backbone", "output_stride", "lead", "conv_heads")
    same = (*network, "dataset_ids", "names", "dataset", "setting", "crop", "compat")
    if changed := [k for k in same if getattr(info, k) != getattr(mine, k)]:
        raise UserError(f"start_from: {source} differs from this run in {', '.join(changed)}")
    if not checkpoint.is_finished(source):
        raise UserError(f"start_from: {source} is not finished")
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("logs"))
    partial.replace(target)
