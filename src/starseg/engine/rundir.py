"""Run directories: their lock, their saved configuration, and steps copied from another run."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

import yaml

from starseg.config import RunConfig, dump_config, load_config, parse_config
from starseg.data.datasets import data_root
from starseg.engine import checkpoint
from starseg.engine.state import begun
from starseg.errors import UserError
from starseg.methods import METHODS, method_options
from starseg.methods.recipes import apply_recipe, recipes_of
from starseg.utils.files import read_text, write_atomic

# Keys that may differ when a run is resumed, because they affect the location of files and the speed, not the result.
Keys = frozenset[tuple[str, ...]]
FREE_KEYS: Keys = frozenset(
    {
        ("out",),
        # The values that the recipe provides are compared instead.
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
PREPARED = "learn"
"""Name of the folder in a run directory into which `starseg learn` writes the prepared data."""
# Name prefixes of what a run directory may contain before its config.yaml is written, and patterns of what identifies a
# config.yaml as that of a run.
_OURS = (LOCK, ".config.yaml.tmp", "step_", PREPARED)
_OF_A_RUN = (LOCK, "step_*", "results.json")
_held: WeakSet[IO[str]] = WeakSet()


def _let_go() -> None:
    for file in _held:
        file.close()


# A lock is held until every process has closed the file, and loader workers outlive a killed run by seconds.
os.register_at_fork(after_in_child=_let_go)


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the values of the method's recipe, so that the saved configuration is complete.

    Raises:
        UserError: an option is invalid, or a value is neither given nor in a recipe.
    """
    # Absolute, so that the run can be evaluated from any working directory.
    data = config.data.model_copy(update={"root": data_root(config.data).absolute()})
    method = METHODS[config.method]
    resolved = apply_recipe(config, method, method_options(config.method, config))
    return resolved.model_copy(update={"data": data})


def load_run_config(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the saved configuration of a run directory, which may have been renamed, moved or copied.

    If `starseg learn` has prepared its data inside the run directory, they are used from where they are now.

    Args:
        run: the run directory.
        overrides: changes of the configuration, "key=value".

    Raises:
        UserError: there is no valid configuration, or an override is invalid.
    """
    config, own = load_config(run / "config.yaml", overrides), run.absolute() / PREPARED
    given = any(text.startswith("data.root=") for text in overrides)
    if given or not config.data.root or config.data.root.name != PREPARED or not (own / "learn.json").is_file():
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"root": own})})


def _resolved_tree(tree: Any) -> Any:
    """Complete a saved configuration of an earlier version, which may lack recipe values; unchanged if that fails."""
    try:
        config = parse_config(tree)
        if "recipe" not in tree and config.data.dataset not in recipes_of(METHODS[config.method]):
            # Version 0.1.0 took VOC's values for every data set that it had no others for.
            config = config.model_copy(update={"recipe": "voc"})
        return yaml.safe_load(dump_config(resolve(config)))
    except (UserError, KeyError, TypeError, AttributeError):
        return tree


def differences(a: Any, b: Any, free: Keys = frozenset(), path: tuple[str, ...] = ()) -> list[str]:
    """Describe the differences between two configuration trees, one line per key.

    Args:
        a: the saved configuration.
        b: the current configuration.
        free: keys that may differ.
        path: key of ``a`` and ``b`` within the whole configuration.
    """
    if path in free:
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in differences(a.get(k), b.get(k), free, (*path, k))]
    return [] if a == b else [f"{'.'.join(path)}: {a!r} there, {b!r} now"]


def started(step_dir: Path) -> bool:
    """Return whether a step directory contains a finished step or the training state of an unfinished one."""
    return checkpoint.is_finished(step_dir) or begun(step_dir)


def lock(run_dir: Path) -> IO[str]:
    """Lock a run directory for this process until the returned file is closed.

    Raises:
        UserError: another process holds the lock, or the file system does not support locks.
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
    """Lock a run directory and save the resolved configuration in it.

    Args:
        run_dir: the run directory.
        config: the resolved configuration.
        free: keys that may differ from the saved configuration.
        held: the lock of the directory, if the caller already holds it.

    Returns:
        The lock.

    Raises:
        UserError: the directory belongs to a run with another configuration, or cannot be locked.
    """
    refuse_another_run(run_dir, config, free)
    with ExitStack() as on_error:
        held = held or on_error.enter_context(lock(run_dir))
        # Checked again, as another run may have started and finished in between.
        refuse_another_run(run_dir, config, free)
        write_atomic(run_dir / "config.yaml", dump_config(config).encode())
        on_error.pop_all()
    return held


def refuse_another_run(run_dir: Path, config: RunConfig, free: Keys = frozenset()) -> None:
    """Check that a run with this configuration may start or resume in a directory; ``free`` keys may differ.

    Raises:
        UserError: the directory contains a run with another configuration, or files that belong to no run.
    """
    path, ours = run_dir / "config.yaml", dump_config(config)
    if any("\ud800" <= letter <= "\udfff" for letter in str(run_dir)):
        raise UserError(
            f"{run_dir}: the name of this folder, or of one above it, is not valid UTF-8, which TensorBoard needs; "
            "rename it, or give another directory with --out"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file, expected a folder or a free place; give another one with --out")
    # Listed before config.yaml is read, as another process may be writing that file.
    strange = run_dir.is_dir() and any(not entry.name.startswith(_OURS) for entry in run_dir.iterdir())
    if path.is_file():
        try:
            text = read_text(path)
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
    """Check that step 0 of another run can be used as step 0 of this run.

    Args:
        source: directory of the other run's step.
        mine: description of this run's step 0.

    Raises:
        UserError: the step is not finished, or differs from ``mine`` in its network, classes or data.
    """
    info = checkpoint.load_info(source)
    network = ("architecture", "lead", "conv_heads", "hidden")
    same = (*network, "dataset_ids", "names", "dataset", "setting", "crop", "compat", "background")
    if changed := [k for k in same if getattr(info, k) != getattr(mine, k)]:
        raise UserError(f"start_from: {source} differs from this run in {', '.join(changed)}")
    if not checkpoint.is_finished(source):
        raise UserError(f"start_from: {source} is not finished")


def adopt(source: Path, target: Path) -> None:
    """Copy another run's finished step, replacing remains of a run that was killed before its first save."""
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("logs"))
    if target.exists():
        shutil.rmtree(target)
    partial.replace(target)
