"""The runs of a comparison, trained one after another or several at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from rich.console import Console

from starseg.config import RunConfig
from starseg.engine.checkpoint import is_finished
from starseg.engine.rundir import refuse_another_run
from starseg.engine.setup import resolve_config
from starseg.errors import Stopped, UserError, message
from starseg.experiments.train import train
from starseg.utils.files import read_json
from starseg.utils.machine import cores
from starseg.utils.terminal import labelled, make_console


@dataclass(frozen=True)
class Plan:
    """Runs of a comparison.

    Attributes:
        runs: one configuration per method and seed, those that train a shared base step first.
        only_base: directories of runs of which step 0 is all that is needed.
        folder: the folder of the comparison; messages name a run by its path within it.
        ceilings: runs that learn all classes at once on the frozen network of another run
            (:func:`starseg.experiments.compare.add_ceilings`).
    """

    runs: list[RunConfig]
    only_base: set[Path]
    folder: Path
    ceilings: list[RunConfig] = field(default_factory=list)

    def name(self, run: RunConfig) -> str:
        """Return the name of a run in messages."""
        return run.run_dir.relative_to(self.folder).as_posix()

    def steps(self, run: RunConfig) -> range | None:
        """Return the steps of a run that are needed; None for all."""
        return range(1) if run.run_dir in self.only_base else None


def run_plan(plan: Plan, console: Console, jobs: int = 1) -> list[str]:
    """Train the unfinished runs, resuming interrupted ones; a failing run does not stop the others.

    Args:
        plan: the runs.
        console: where progress and tables are printed.
        jobs: how many runs are trained at the same time, each in a process of its own.

    Returns:
        The names of runs that failed.

    Raises:
        UserError: all of them did.
    """
    failed = train_runs(plan, console, jobs)
    if failed and len(failed) == len(plan.runs) + len(plan.ceilings):
        raise next(iter(failed.values()))
    return list(failed)


def train_runs(plan: Plan, console: Console, jobs: int = 1) -> dict[str, UserError]:
    """Train the unfinished runs as :func:`run_plan` does, and report those that fail.

    Returns:
        The errors of the runs that failed, by the run's name.

    Raises:
        UserError: several jobs, and runs of several processes.
    """
    if jobs > 1 and any(run.train.devices * run.train.num_nodes > 1 for run in (*plan.runs, *plan.ceilings)):
        raise UserError("--jobs: runs of several processes are trained one at a time; use 1")
    failed: dict[str, UserError] = {}
    lost: set[Path] = set()
    ended = _several_at_once(plan, console, jobs, lost) if jobs > 1 else _one_by_one(plan, console, lost)
    for config, error in ended:
        if error is None:
            continue
        name = plan.name(config)
        failed[name] = error
        if not is_finished(config.run_dir / "step_0"):
            lost.add(config.run_dir)
        console.print(labelled("failed:", "red", f"{name}: {error}"), soft_wrap=True)
    return failed


def _one_by_one(plan: Plan, console: Console, lost: set[Path]) -> Iterator[tuple[RunConfig, UserError | None]]:
    """Train the runs in order and yield each with its error."""
    for config in (*plan.runs, *plan.ceilings):
        console.rule(plan.name(config))
        error = _missing_base(config, lost)
        try:
            if error is None:
                train(config, plan.steps(config), console)
        except UserError as found:
            error = found
        yield config, error


def _missing_base(config: RunConfig, lost: set[Path]) -> UserError | None:
    source = _source(config)
    if source in lost:
        return UserError(f"step 0 is missing, as the run that trains it failed: {source}")
    return None


def _source(config: RunConfig) -> Path | None:
    """Return the run directory whose step 0 a run starts from."""
    step = config.start_from or config.model.frozen_from
    return step.parent if step else None


def _several_at_once(
    plan: Plan, console: Console, jobs: int, lost: set[Path]
) -> Iterator[tuple[RunConfig, UserError | None]]:
    """Train up to ``jobs`` runs at a time and yield each with its error as it ends; output goes to RUN.log."""
    waiting, slots = [*plan.runs, *plan.ceilings], list(range(jobs))
    running: dict[int, _Job] = {}
    with _stopping(running):
        while waiting or running:
            unfinished = {run.run_dir for run in waiting} | {job.config.run_dir for job in running.values()}
            for config in [run for run in waiting if _source(run) not in unfinished]:
                if (error := _missing_base(config, lost)) is not None or _is_done(plan, config):
                    waiting.remove(config)
                    yield config, error or _other_config(config)
                elif slots:
                    waiting.remove(config)
                    job = _Job(config, plan.steps(config), slots.pop(0), jobs)
                    running[job.process.sentinel] = job
                    console.print(f"started {plan.name(config)}", highlight=False)
            for sentinel in wait(list(running)) if running else ():
                job = running.pop(sentinel)  # type: ignore[arg-type]
                slots.append(job.slot)
                error = job.error()
                console.print(f"{'ended' if error else 'finished'} {plan.name(job.config)}", highlight=False)
                yield job.config, error


def _is_done(plan: Plan, config: RunConfig) -> bool:
    """Return whether all needed steps of a run are finished, so that no process has to be started for it."""
    steps, results = plan.steps(config), config.run_dir / "results.json"
    if not results.is_file():
        return False
    steps = steps or range(read_json(results)["run"]["steps"])
    return all(is_finished(config.run_dir / f"step_{step}") for step in steps)


def _other_config(config: RunConfig) -> UserError | None:
    """Return the error if a run directory holds a run with another configuration."""
    try:
        refuse_another_run(config.run_dir, resolve_config(config)[0])
    except UserError as error:
        return error
    return None


class _Job:
    """A run that is trained in a process of its own.

    Args:
        config: the run.
        steps: which steps; None for all.
        slot: number of the process among those that run at the same time.
        jobs: how many run at the same time.
    """

    def __init__(self, config: RunConfig, steps: range | None, slot: int, jobs: int) -> None:
        self.config, self.slot, self.log = config, slot, config.run_dir.with_name(f"{config.run_dir.name}.log")
        context = multiprocessing.get_context("spawn")
        self._result, sender = context.Pipe(duplex=False)
        share = _Share(*(_part(ids, slot, jobs) for ids in (_core_ids(), _gpu_ids())))
        self.process = context.Process(target=_train_alone, args=(config, steps, share, self.log, sender))
        self.process.start()
        sender.close()

    def error(self) -> UserError | None:
        """Return why the run failed, after its process has ended."""
        self.process.join()
        try:
            text: str | None = self._result.recv()
        except EOFError:
            text = f"its process ended with exit status {self.process.exitcode}; {self.log} has its output"
        return None if text is None else UserError(text)


class _Share(NamedTuple):
    """The cores and GPUs on which a job runs."""

    cores: Sequence[str]
    gpus: Sequence[str]

    def apply(self) -> None:
        """Restrict this process to its share; it must not have used a GPU before."""
        if hasattr(os, "sched_setaffinity"):  # not on macOS
            os.sched_setaffinity(0, map(int, self.cores))
        torch.set_num_threads(len(self.cores))
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)


def _core_ids() -> list[str]:
    affinity = getattr(os, "sched_getaffinity", None)
    return [str(core) for core in sorted(affinity(0))] if affinity else list(map(str, range(cores())))


def _gpu_ids() -> list[str]:
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def _part(ids: Sequence[str], slot: int, jobs: int) -> Sequence[str]:
    """Return a job's equal part of the ids, of which several jobs share one if there are fewer than jobs."""
    return ids[slot::jobs] or ids[slot % max(1, len(ids)) :][:1]


def _train_alone(config: RunConfig, steps: range | None, share: _Share, log: Path, sender: Connection) -> None:
    """Train a run in a process of its own, and send its error or None."""
    os.setsid()  # Ctrl-C reaches the parent only, which stops its jobs.
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    share.apply()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            train(config, steps, make_console())
        except Exception as error:
            text = message(error)
            if text is None:
                raise
            sender.send(text)
        else:
            sender.send(None)


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a job runs in a child process"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _stopping(running: Mapping[int, _Job]) -> Iterator[None]:
    """Stop the running jobs, which save their state, if this process is stopped."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for job in running.values():
            job.process.terminate()
        for job in running.values():
            job.process.join()
