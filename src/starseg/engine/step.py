"""One step of a run: its context, training (resumed from the last saved state) and evaluation."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric, seed_everything
from lightning_fabric.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor

from starseg.config import choices_for
from starseg.data.loader import LoaderEpoch
from starseg.data.samples import Batch, sample_seed
from starseg.engine import checkpoint
from starseg.engine.evaluate import confusion_matrix, score_step
from starseg.engine.exemplars import Memory, choose_memory, confident_classes
from starseg.engine.features import CachedEpochs, FeatureCache, compute_features, features_autocast
from starseg.engine.fit import StepTraining, to_device
from starseg.engine.guard import Guard
from starseg.engine.launch import average_buffers, synchronise_norm
from starseg.engine.networks import first_network
from starseg.engine.setup import PreparedRun
from starseg.engine.state import CURRENT, FoundState, TrainingState, read_state, set_aside, write_state
from starseg.errors import UserError
from starseg.losses.reduction import AllReduceSum
from starseg.methods import Method, Stage, StepContext, prediction_rule
from starseg.models import Segmenter
from starseg.utils.clock import Clock
from starseg.utils.progress import bar, track
from starseg.utils.terminal import labelled


@dataclass(frozen=True)
class TrainedStep:
    """A step that has been trained and evaluated, but not published yet.

    Attributes:
        step: number of the step.
        model: the trained network, in eval mode.
        memory: the exemplar memory of the step.
        bank: the method's state.
        metrics: content of metrics.json.
    """

    step: int
    model: Segmenter
    memory: Memory
    bank: dict[str, Tensor]
    metrics: dict[str, Any]


class Step:
    """One step of a run whose processes have been launched.

    Args:
        run: the prepared run.
        fabric: devices and processes of the run.
        number: number of the step.
        console: where progress is printed.
        all_reduce_sum: sum over processes.
        loss_scale: state of the precision plugin at the start of a step.
    """

    def __init__(
        self,
        run: PreparedRun,
        fabric: Fabric,
        number: int,
        console: Console,
        all_reduce_sum: AllReduceSum,
        loss_scale: dict[str, Any],
    ) -> None:
        self.run, self.config, self.method, self.data = run, run.config, run.method, run.data
        self.fabric, self.number, self.console = fabric, number, console
        self.all_reduce_sum, self.loss_scale = all_reduce_sum, loss_scale
        self.folder, self.leader = run.step_dir(number), fabric.global_rank == 0
        self.features: FeatureCache | None = None

    def train(self, guard: Guard) -> TrainedStep:
        """Train and evaluate the step, resuming from its last saved state if there is one.

        Raises:
            UserError: the step was started with other images, or a loss is NaN or infinite.
            Stopped: a signal was received; the training state has been saved if training had begun.
        """
        start = time.monotonic()
        state = self._find_state()
        start -= state.seconds if state else 0.0
        ctx, memory = self._context()
        clock, before = Clock(self.fabric.device), 0
        for index, stage in enumerate(stages := self.method.stages(ctx)):
            ctx = self._stage_context(ctx, memory, stage)
            epochs, lr = self._schedule(stage)
            if not state or index >= state.stage:
                resumed = state if state and index == state.stage else None
                part = f" ({stage.name}, stage {index + 1} of {len(stages)})" if len(stages) > 1 else ""
                self._announce(ctx, f"{epochs} epochs of {ctx.iterations} iterations{part}")
                training = self._begin(ctx, epochs, lr, clock, index, before, resumed)
                self._fit(training, memory, guard, resumed, start)
            before += epochs * ctx.iterations
        if not stages:
            self._announce(ctx, "without training")
        ctx.model.eval()
        with torch.no_grad(), clock.time("statistics"):
            average_buffers(ctx.model, self.fabric)
            self.method.end_step(ctx)
        bank = self.method.state_dict()
        with clock.time("evaluation"):
            scores = self._evaluate(ctx)
        self._log_times(clock, before)
        metrics = scores | {
            "seconds": round(time.monotonic() - start, 2),
            "images": len(self.data.positions(self.number, "train")),
            "bank_bytes": sum(t.numel() * t.element_size() for t in bank.values()),
            "trainable_parameters": sum(p.numel() for p in ctx.model.parameters() if p.requires_grad),
            "exemplars": len(memory.files),
            "exemplar_bytes": memory.nbytes,
        }
        return TrainedStep(self.number, ctx.model, memory, bank, metrics)

    def begin(self) -> Method:
        """Begin the step as training does, and return the method; nothing is trained or saved."""
        self._begin(self._context()[0], 1, 1e-6, Clock(self.fabric.device))
        return self.method

    def _say(self, text: str) -> None:
        self.console.print(f"step {self.number}: {text}", highlight=False, soft_wrap=True)

    def _models(self) -> tuple[Segmenter, Segmenter | None]:
        """Return the network to train, with its new head, and the frozen network of the previous step."""
        new = len(self.run.task.added(self.number))
        if self.number == 0:
            return first_network(self.config.model, self.method, new), None
        previous = self.run.step_dir(self.number - 1)
        model, _ = checkpoint.load_model(previous)
        self.method.load_state_dict(checkpoint.load_bank(previous))
        old = copy.deepcopy(model).requires_grad_(False)
        return (self.method.grow(model, new) if new else model), old

    def _memory(self, old: Segmenter | None) -> Memory:
        """Choose the step's exemplar memory with the network of the previous step."""
        size, previous = self.config.memory.size, self.run.step_dir(self.number - 1)
        if not size or old is None:
            return Memory()

        def found(earlier: int) -> Tensor:
            loader = self.data.train_loader(earlier, ["memory"], drop_last=False)
            batches = self._scan(old, loader, f"step {self.number} scan for exemplars")
            return self.all_reduce_sum(
                confident_classes(old, batches, self.data.positions(earlier, "train"), self.method.confident)
            )

        with torch.no_grad():
            seed = sample_seed(self.config.seed, self.number, "memory")
            memory = choose_memory(self.data, self.number, size, previous, seed, found)
        self._say(f"{len(memory.files)} old images as exemplars")
        return memory

    def _context(self) -> tuple[StepContext, Memory]:
        """Create the context of the step's first stage, and the step's exemplar memory."""
        fabric, step, seed = self.fabric, self.number, self.config.seed
        seed_everything(sample_seed(seed, step) % 2**32, verbose=False)
        model, old = self._models()
        if fabric.global_rank:
            seed_everything(sample_seed(seed, step, fabric.global_rank) % 2**32, verbose=False)
        device = fabric.device
        old = old.to(device) if old else None
        memory = self._memory(old)
        generator = torch.Generator(device).manual_seed(sample_seed(seed, step, "method"))
        context = StepContext(
            task=self.run.task,
            step=step,
            choices=choices_for(self.config.compat),
            model=model.to(device),
            old_model=old,
            iterations=self.data.samples(step, len(memory.files)) // self.config.train.batch_size,
            scan=lambda name: self._scan(
                model,
                self.data.train_loader(step, [name], drop_last=False, exemplars=memory.files),
                f"step {step} scan {name}",
            ),
            generator=generator,
            all_reduce_sum=self.all_reduce_sum,
            rank=fabric.global_rank,
            world=fabric.world_size,
            pretrained=bool(self.config.model.pretrained),
            crop=self.config.data.crop,
            frozen=self.config.model.frozen_from is not None,
            autocast=fabric.autocast,
        )
        return replace(context, stage=next(iter(self.method.stages(context)), context.stage)), memory

    def _stage_context(self, ctx: StepContext, memory: Memory, stage: Stage) -> StepContext:
        """Return the context of a stage; its cached features are computed when they are first asked for."""
        step, size = self.number, self.config.train.batch_size
        samples = self.data.samples(step, len(memory.files)) * max(1, stage.crops)
        self.features = None

        def cached() -> Iterator[Batch]:
            if self.features is None:
                epochs = [f"crop {i}" for i in range(stage.crops)]
                loader = self.data.train_loader(step, epochs, drop_last=False, exemplars=memory.files)
                batches = self._scan(ctx.model, loader, f"step {step} features")
                seed = sample_seed(self.config.seed, step, "features", ctx.rank)
                autocast = features_autocast(self.config.eval.precision, self.fabric)
                self.features = compute_features(ctx.model, batches, samples // ctx.world, autocast, seed, stage.cells)
            return self.features.ordered(size, ctx.device)

        return replace(ctx, stage=stage, iterations=samples // size, cached=cached if stage.crops else None)

    def _schedule(self, stage: Stage) -> tuple[int, float]:
        """Return the number of epochs and the base learning rate of a stage."""
        if stage.schedule:
            return stage.schedule.epochs, stage.schedule.lr
        phase = self.config.train.later if self.number else self.config.train.base
        assert phase.epochs and phase.lr, "filled in by resolve()"
        return phase.epochs, phase.lr

    def _announce(self, ctx: StepContext, how: str) -> None:
        images = len(self.data.positions(self.number, "train"))
        self._say(f"learning {self.run.task.describe(self.number)} from {images} images, {how}")

    def _scan(self, model: Segmenter, loader: LoaderEpoch, title: str) -> Iterator[Batch]:
        for batch in track(self.console, title, loader, len(loader)):
            yield to_device(batch, model)

    def _begin(
        self,
        ctx: StepContext,
        epochs: int,
        lr: float,
        clock: Clock,
        stage: int = 0,
        before: int = 0,
        state: TrainingState | None = None,
    ) -> StepTraining:
        """Initialise and freeze parts of the network, call the method's ``begin_step`` and set up the training loop.

        Args:
            ctx: context of the stage.
            epochs: number of epochs of the stage.
            lr: its base learning rate.
            clock: clock of the step.
            stage: index of the stage.
            before: iterations of the earlier stages.
            state: state from which the stage will be resumed.
        """
        if stage == 0:
            if self.run.task.added(self.number):
                with torch.no_grad():
                    self.method.init_heads(ctx)
        else:
            ctx.model.zero_grad()
            if state:
                ctx.model.load_state_dict(state.model)
        self.method.freeze(ctx)
        if ctx.frozen:
            ctx.model.freeze_network()
        elif self.config.train.encoder_lr == 0:
            ctx.model.freeze_encoder()
        synchronise_norm(ctx.model.train(), self.fabric)
        ctx.model.eval()
        with torch.no_grad(), clock.time("statistics"):
            self.method.begin_step(ctx)
        self.fabric.strategy.precision.load_state_dict(self.loss_scale)
        return StepTraining(self.fabric, self.method, ctx, epochs, lr, self.config.train, clock, stage, before)

    def _find_state(self) -> TrainingState | None:
        """Find the training state to resume from; None if the step starts from its beginning.

        Damaged files are renamed and kept, and so are the logs if no state is intact.

        Raises:
            UserError: the step was started with other images.
        """
        found = read_state(self.folder)
        if found.state:
            self._check_images(found.state)
        self.fabric.barrier()  # Files may be renamed only after all processes have read them.
        if self.leader:
            # The logs are renamed first, so that a rerun after a kill in between finds the damaged states again.
            logs = self._start_logs(found)
            for path, reason in found.damaged.items():
                self._say(f"{path}: {reason}; it is kept as {set_aside(path).name}")
            if found.damaged and not found.state:
                self._say(f"no intact training state; restarting step {self.number} from its beginning{logs}")
        return found.state

    def _start_logs(self, found: FoundState) -> str:
        """Rename or remove the logs of a step that starts from its beginning; return the end of the message."""
        logs = self.folder / "logs"
        if found.state or not logs.is_dir():
            return ""
        if found.damaged:
            return f"; its logs are kept as {set_aside(logs).name}"
        shutil.rmtree(logs)
        return ""

    def _check_images(self, state: TrainingState) -> None:
        # Exemplars are not compared, as another device may choose others.
        if state.images not in (None, self.data.digest(self.number)):
            raise UserError(
                f"{self.folder / CURRENT}: step {self.number} was started with other training images than "
                f"{self.data.dataset.root} has now; restore the list of images, give another directory with --out, or "
                f"remove {self.folder} to restart the step"
            )

    def _fit(
        self, training: StepTraining, memory: Memory, guard: Guard, state: TrainingState | None, start: float
    ) -> None:
        """Train, resuming from ``state`` if given.

        Args:
            training: the training loop.
            memory: the exemplar memory of the step.
            guard: decides when to save.
            state: state to resume from.
            start: time at which the step would have started if it had not been interrupted.
        """
        if state:
            reset = training.restore(state)
            self._say(f"resuming at iteration {training.iteration} of {training.total}")
            if reset:
                self.console.print(labelled("note:", "yellow", f"saved on another device; reset: {', '.join(reset)}"))
        purge = training.before + training.iteration if state else None
        logger = TensorBoardLogger(root_dir=self.folder / "logs", name="", version="", purge_step=purge)
        loader = self._loader(training, memory)
        save = self._saver(training, start)
        with bar(self.console, f"step {self.number}", len(loader)) as shown, guard.saving():
            training.run(loader, shown, logger, guard, save)
        logger.finalize("success")

    def _loader(self, training: StepTraining, memory: Memory) -> LoaderEpoch | CachedEpochs:
        """Return the remaining batches of a stage."""
        ctx, epochs, start = training.ctx, training.epochs, training.iteration
        if ctx.cached is None:
            return self.data.train_loader(self.number, range(epochs), True, memory.files, start=start)
        next(ctx.cached())
        assert self.features is not None
        seed, size = (self.config.seed, self.number, ctx.rank), self.config.train.batch_size
        share = len(range(ctx.rank, size, ctx.world))
        return CachedEpochs(self.features, share, epochs, ctx.iterations, seed, ctx.device, start)

    def _saver(self, training: StepTraining, start: float) -> Callable[[], None]:
        """Return a function that saves the training state; every process must call it."""
        images = self.data.digest(self.number)

        def save() -> None:
            state = training.capture(time.monotonic() - start, images)
            if self.leader:
                write_state(self.folder, state)

        return save

    def _log_times(self, clock: Clock, iterations: int) -> None:
        """Write the time spent on each part of the step to its logs."""
        if self.leader:
            logger = TensorBoardLogger(root_dir=self.folder / "logs", name="", version="")
            logger.log_metrics(clock.scalars(), step=iterations)
            logger.finalize("success")

    def _evaluate(self, ctx: StepContext) -> dict[str, Any]:
        task, choices, bf16 = self.run.task, ctx.choices, self.config.eval.bf16
        rule = prediction_rule(self.method, choices, self.data.dataset.background)
        parts = []
        for loader in self.data.test_loaders(self.number):
            batches = track(self.console, f"step {self.number} test", loader, len(loader))
            confusion = confusion_matrix(ctx.model, rule, batches, ctx.all_reduce_sum, bf16)
            parts.append(self.data.dataset.scored(confusion, task.dataset_ids(self.number)))
        hidden = self.data.dataset.unscored(task.dataset_ids(self.number))
        names, background = task.class_names(self.number), self.data.dataset.background
        scores = score_step(parts, names, task.base, choices, background, hidden)
        return {
            "step": self.number,
            "new_classes": [task.label(c) for c in task.added(self.number)],
            **({"new_domains": list(task.domains_of(self.number))} if task.domains else {}),
            **scores,
            "confusion": np.sum(parts, axis=0).tolist(),
        }
