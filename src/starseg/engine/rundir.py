"""Run directories: ownership, lock, and steps copied from another run."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

import yaml

from starseg.config import RunConfig, dump_config, parse_config
from starseg.data.datasets import data_root
from starseg.engine import checkpoint
from starseg.engine.state import begun
from starseg.errors import UserError
from starseg.methods import METHODS, method_options
from starseg.methods.recipes import apply_recipe
from starseg.utils.files import write_atomic

# Keys that may differ when a run is resumed: where files are and how fast it runs, not what is learnt.
Keys = frozenset[tuple[str, ...]]
FREE_KEYS: Keys = frozenset(
    {
        ("out",),
        # The values that it stands for are compared themselves.
        ("recipe",),
        ("data", "workers"),
        ("data", "cache"),
        ("data", "root"),
        ("train", "accelerator"),
        ("train", "devices"),
        ("train", "num_nodes"),
        ("train", "save_minutes"),
        ("eval", "batch_size"),
    }
)
LOCK = ".lock"
# What may lie in a run directory before its config.yaml does, and what tells its config.yaml from anyone's.
_OURS = (LOCK, ".config.yaml.tmp", "step_", "learn")
_OF_A_RUN = (LOCK, "step_*", "results.json")
_held: WeakSet[IO[str]] = WeakSet()


def _let_go() -> None:
    for file in _held:
        file.close()


# A lock lasts as long as any process has its file open, and loader workers outlive a killed run by seconds.
os.register_at_fork(after_in_child=_let_go)


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what the method's recipe sets, so that the saved copy holds every value.

    Raises:
        UserError: wrong options, or values that are neither given nor in a recipe.
    """
    # Absolute, so that the run is scored and shown from any folder.
    data = config.data.model_copy(update={"root": data_root(config.data).absolute()})
    method = METHODS[config.method]
    resolved = apply_recipe(config, method, method_options(config.method, config))
    return resolved.model_copy(update={"data": data})


def _resolved_tree(tree: Any) -> Any:
    """A saved configuration with what an earlier version left to the method filled in; as it is where that fails."""
    try:
        return yaml.safe_load(dump_config(resolve(parse_config(tree))))
    except (UserError, KeyError, TypeError, AttributeError):
        return tree


def differences(a: Any, b: Any, free: Keys = frozenset(), path: tuple[str, ...] = ()) -> list[str]:
    """Describe, one line per key, the values of ``a`` that differ in ``b``, except for ``free`` keys."""
    if path in free:
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in differences(a.get(k), b.get(k), free, (*path, k))]
    return [] if a == b else [f"{'.'.join(path)}: {a!r} there, {b!r} now"]


def started(step_dir: Path) -> bool:
    """Whether a step directory holds a finished step or the state of an unfinished one."""
    return checkpoint.is_finished(step_dir) or begun(step_dir)


def lock(run_dir: Path) -> IO[str]:
    """Lock a run directory for this process until the returned file is closed.

    Raises:
        UserError: another process is running in it, or its file system knows no locks.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        raise UserError(
            f"{run_dir}: another process (pid {owner}) is running in it; wait for it, or give another one with --out"
        ) from error
    except OSError as error:
        raise UserError(
            f"{file.name}: cannot be locked ({error.strerror}); give a place on another file system with --out"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _held.add(file)
    return file


def claim(run_dir: Path, config: RunConfig, free: Keys = frozenset(), held: IO[str] | None = None) -> IO[str]:
    """Lock a run directory, unless ``held`` is its lock already, and save the resolved configuration in it.

    Raises:
        UserError: the directory belongs to another configuration, or cannot be locked.
    """
    refuse_another_run(run_dir, config, free)
    held = held or lock(run_dir)
    # Again: another run may have started and ended in between.
    refuse_another_run(run_dir, config, free)
    write_atomic(run_dir / "config.yaml", dump_config(config).encode())
    return held


def refuse_another_run(run_dir: Path, config: RunConfig, free: Keys = frozenset()) -> None:
    """Check that a run with this configuration may start or resume in a directory; ``free`` keys may differ.

    Raises:
        UserError: the directory holds a run with another configuration, or something else.
    """
    path, ours = run_dir / "config.yaml", dump_config(config)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file, expected a folder or a free place; give another one with --out")
    # Looked at before config.yaml, which another process may be writing.
    strange = run_dir.is_dir() and any(not entry.name.startswith(_OURS) for entry in run_dir.iterdir())
    if path.is_file():
        try:
            text = path.read_text()
            theirs = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged, not valid YAML; restore it, or give another one with --out") from error
        if text != ours and not any(any(run_dir.glob(pattern)) for pattern in _OF_A_RUN):
            raise UserError(f"{path}: belongs to no run and would be overwritten; give another directory with --out")
        unused = {(method.section,) for method in METHODS.values()} - {(METHODS[config.method].section,)}
        changed = differences(_resolved_tree(theirs), yaml.safe_load(ours), FREE_KEYS | free | unused)
        if changed and any(map(started, run_dir.glob("step_*"))):
            raise UserError(
                f"{run_dir} holds a run with another configuration:\n  " + "\n  ".join(changed) + "\n"
                "Give another directory with --out, or remove this one to start over."
            )
    elif strange:
        raise UserError(f"{run_dir} is not empty and holds no run of starseg; give another directory with --out")


def refuse_to_adopt(source: Path, mine: checkpoint.StepInfo) -> None:
    """Refuse another run's step 0 that does not fit this run.

    Raises:
        UserError: it is not finished, or learnt something else than ``mine``.
    """
    info = checkpoint.load_info(source)
    network = ("architecture", "lead", "conv_heads")
    same = (*network, "dataset_ids", "names", "dataset", "setting", "crop", "compat")
    if changed := [k for k in same if getattr(info, k) != getattr(mine, k)]:
        raise UserError(f"start_from: {source} differs from this run in {', '.join(changed)}")
    if not checkpoint.is_finished(source):
        raise UserError(f"start_from: {source} is not finished")


def adopt(source: Path, target: Path) -> None:
    """Copy another run's finished step, replacing what a run killed before its first save left."""
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("logs"))
    if target.exists():
        shutil.rmtree(target)
    partial.replace(target)
