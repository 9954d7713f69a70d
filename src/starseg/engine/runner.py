"""The runner, which trains, evaluates and publishes the steps of a run one after another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from lightning_fabric import Fabric
from rich.console import Console

from starseg.config import RunConfig
from starseg.engine import checkpoint
from starseg.engine.events import Listener, StepFinished
from starseg.engine.guard import Guard
from starseg.engine.launch import is_leader, make_all_reduce_sum
from starseg.engine.publish import publish_step, step_info, write_results
from starseg.engine.rundir import Keys, adopt, claim, refuse_to_adopt
from starseg.engine.setup import PreparedRun, prepare
from starseg.engine.step import Step
from starseg.engine.trial import StageTime, TrialStep
from starseg.errors import UserError
from starseg.losses.reduction import AllReduceSum
from starseg.methods import Method
from starseg.models import Architecture, make_network
from starseg.models.builders import check_crop
from starseg.utils.terminal import make_console


class Runner:
    """Context manager that runs the steps of one configuration in one run directory.

    Constructing it does no work. Entering it checks everything, locks the run directory and launches the processes;
    leaving it stops the loader workers and releases the lock. Processes stay connected for later runs of the command.

    Args:
        config: validated configuration.
        console: where progress is printed.
        steps: the steps to run; all by default.
        listeners: called with each event, in the process that writes the run's files.
        free: further keys that may differ from the saved configuration of the directory's finished steps.
        lock: lock of the run directory if the caller already holds it; the caller releases it.
    """

    prepared: PreparedRun
    fabric: Fabric
    all_reduce_sum: AllReduceSum
    loss_scale: dict[str, Any]

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        steps: range | None = None,
        *,
        listeners: Sequence[Listener] = (),
        free: Keys = frozenset(),
        lock: IO[str] | None = None,
    ) -> None:
        self.config, self.steps, self.listeners, self.free, self.lock = config, steps, listeners, free, lock
        self.leader = is_leader()
        self.console = console if self.leader else make_console(quiet=True)

    def __enter__(self) -> Runner:
        """Prepare the run, lock its directory and launch its processes.

        Raises:
            UserError: the configuration or data is invalid, a step does not exist, or the directory belongs to another
                run.
        """
        with ExitStack() as resources:
            self.prepared = prepare(self.config, self.console, self.steps)
            self.fabric = self.prepared.fabric
            resources.callback(self.prepared.data.loading.close)
            self.loss_scale = self.fabric.strategy.precision.state_dict()
            if self.leader:
                self._check_start()
                lock = claim(self.prepared.config.run_dir, self.prepared.config, self.free, self.lock)
                if self.lock is None:
                    resources.enter_context(lock)
            self.fabric.launch()
            self.all_reduce_sum = make_all_reduce_sum(self.fabric)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(self) -> Path:
        """Run the requested steps that are not finished yet and return the run directory.

        Raises:
            UserError: a step cannot be trained.
            Stopped: a signal was received; the training state has been saved if training had begun.
        """
        source, run = self.config.start_from, self.prepared
        if 0 in self._wanted and source and not checkpoint.is_finished(run.step_dir(0)) and self.leader:
            adopt(source, run.step_dir(0))
            write_results(run, self.fabric)
        self.fabric.barrier()
        for step in self._wanted:
            if checkpoint.is_finished(run.step_dir(step)):
                self.console.print(f"step {step}: finished already, {run.step_dir(step)}", soft_wrap=True)
            else:
                self._run_step(step)
        return run.config.run_dir

    def begin(self, step: int) -> Method:
        """Begin a step without training it, and return the method after its ``begin_step``; nothing is saved."""
        return self._step(step).begin()

    def stage_times(self, step: int, iterations: int = 3) -> list[StageTime]:
        """Measure the time per iteration of each stage of a step over a few iterations, without saving anything."""
        trial = TrialStep(self.prepared, self.fabric, step, self.console, self.all_reduce_sum, self.loss_scale)
        return trial.stage_times(iterations)

    @property
    def _wanted(self) -> range:
        return self.steps if self.steps is not None else range(len(self.prepared.task))

    def _step(self, step: int) -> Step:
        return Step(self.prepared, self.fabric, step, self.console, self.all_reduce_sum, self.loss_scale)

    def _run_step(self, step: int) -> None:
        """Train, evaluate and publish one step."""
        guard = Guard(self.fabric, self.prepared.config.train.save_minutes)
        with guard.watching():
            trained = self._step(step).train(guard)
            if self.leader:
                publish_step(self.prepared, trained)
                event = StepFinished(step, self.prepared.step_dir(step), write_results(self.prepared, self.fabric))
                for listener in self.listeners:
                    listener(event)
            self.fabric.barrier()

    def _check_start(self) -> None:
        """Check, before anything is written, that the first unfinished step can start."""
        run = self.prepared
        first = next((t for t in self._wanted if not checkpoint.is_finished(run.step_dir(t))), None)
        model, start_from = run.config.model, run.config.start_from
        architecture = run.method.architecture(Architecture.of(model))
        if first and not checkpoint.is_finished(run.step_dir(first - 1)):
            raise UserError(f"step {first} needs step {first - 1}, which is not finished: {run.step_dir(first - 1)}")
        if first == 0 and start_from:
            refuse_to_adopt(start_from, step_info(run, 0, architecture, [len(run.task.new(0))]))
        elif first == 0:
            check_crop(make_network(architecture, [1], pretrained=model.pretrained), run.config.data.crop)


def __getattr__(name: str) -> Any:
    if name == "train":
        message = "starseg.engine.runner.train has moved: use starseg.train, or starseg.experiments.train.train"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return import_module("starseg.experiments.train").train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
