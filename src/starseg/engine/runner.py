"""A task sequence from its configuration: every step trained, evaluated and published in turn."""

from __future__ import annotations

import copy
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric import seed_everything
from lightning_fabric.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor

from starseg.config import RunConfig, choices_for
from starseg.data.loader import LoaderEpoch
from starseg.data.samples import Batch, sample_seed
from starseg.engine import checkpoint
from starseg.engine.evaluate import confusion_matrix
from starseg.engine.exemplars import Memory, choose_memory, confident_classes
from starseg.engine.fit import StepTraining, to_device
from starseg.engine.guard import Guard
from starseg.engine.launch import (
    average_buffers,
    check_world_size,
    is_leader,
    make_all_reduce_sum,
    make_fabric,
    refuse_without_compiler,
    synchronise_norm,
)
from starseg.engine.metrics import summarize
from starseg.engine.run_data import open_data
from starseg.engine.rundir import Keys, adopt, claim, refuse_to_adopt, resolve
from starseg.engine.state import CURRENT, clear, read_state, write_state
from starseg.errors import UserError
from starseg.methods import METHODS, StepContext, method_options
from starseg.methods.recipes import find_recipe
from starseg.models import Segmenter
from starseg.models.encoders import make_backbone
from starseg.report.tables import iou_table
from starseg.utils.clock import Clock
from starseg.utils.files import read_json, write_json
from starseg.utils.progress import bar, track


class Runner:
    """Runs the steps of one configuration in one directory.

    Args:
        config: validated configuration.
        console: where progress and tables go.
        steps: which steps; all by default.
        free: keys that may moreover differ from those of the directory's finished steps.
        lock: of the run directory, where the caller holds it already.

    Raises:
        UserError: bad data, a step that does not exist, a directory of another run.
    """

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        steps: range | None = None,
        free: Keys = frozenset(),
        lock: IO[str] | None = None,
    ) -> None:
        self.leader = is_leader()
        self.console = console if self.leader else Console(quiet=True)
        self.config = resolve(config)
        self.method = METHODS[config.method](method_options(config.method, self.config))
        check_world_size(self.config.train)
        self.fabric = make_fabric(self.config.train)
        self.loss_scale = self.fabric.strategy.precision.state_dict()
        if self.config.train.compile:
            refuse_without_compiler(self.fabric.device)
        self.data = open_data(self.config, self.method, self.console, self.fabric, steps)
        self.notes = self.method.notes(find_recipe(self.config, type(self.method)))
        for note in self.notes:
            self.console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
        self.task = self.data.task
        self.steps = steps if steps is not None else range(len(self.task))
        self.run_dir = self.config.run_dir
        if self.leader:
            self._check_start()
        self.lock = claim(self.run_dir, self.config, free, lock) if self.leader else None
        self.fabric.launch()
        self.all_reduce_sum = make_all_reduce_sum(self.fabric)

    def step_dir(self, step: int) -> Path:
        return self.run_dir / f"step_{step}"

    def _check_start(self) -> None:
        """Refuse a run whose first step has nothing to start from, before anything is written."""
        first = next((t for t in self.steps if not checkpoint.is_finished(self.step_dir(t))), None)
        model, start_from = self.config.model, self.config.start_from
        if first and not checkpoint.is_finished(self.step_dir(first - 1)):
            raise UserError(f"step {first} needs step {first - 1}, which is not finished: {self.step_dir(first - 1)}")
        if first == 0 and start_from:
            refuse_to_adopt(start_from, self._info(0, [len(self.task.new(0))]))
        elif first == 0:
            make_backbone(model.backbone, model.output_stride, model.pretrained)

    def run(self) -> Path:
        """Run the wanted steps that are not finished yet, and return the run directory."""
        try:
            self._run_steps()
        finally:
            self.data.loading.close()
            if self.lock:
                self.lock.close()
        return self.run_dir

    def _run_steps(self) -> None:
        if 0 in self.steps and self.config.start_from and not checkpoint.is_finished(self.step_dir(0)) and self.leader:
            adopt(self.config.start_from, self.step_dir(0))
            self._write_results()
        self.fabric.barrier()
        for step in self.steps:
            if checkpoint.is_finished(self.step_dir(step)):
                self.console.print(f"step {step}: finished already, {self.step_dir(step)}", soft_wrap=True)
            else:
                guard = Guard(self.fabric, self.config.train.save_minutes)
                with guard.watching():
                    self._train(step, guard)

    def _info(self, step: int, head_sizes: list[int]) -> checkpoint.StepInfo:
        c, task = self.config, self.task
        return checkpoint.StepInfo(
            backbone=c.model.backbone,
            output_stride=c.model.output_stride,
            head_sizes=head_sizes,
            names=list(task.class_names(step)),
            dataset_ids=list(task.dataset_ids(step)),
            method=c.method,
            dataset=self.data.dataset.key,
            task=task.name,
            setting=task.setting,
            step=step,
            seed=c.seed,
            compat=c.compat,
            base=task.base,
            crop=c.data.crop,
            test_fill=self.data.dataset.test_fill,
            lead=list(self.method.layout.lead),
            conv_heads=self.method.layout.conv,
        )

    def _models(self, step: int) -> tuple[Segmenter, Segmenter | None]:
        """The network to train, its new head grown, and the frozen previous one."""
        model_config, new = self.config.model, len(self.task.new(step))
        if step == 0:
            model = Segmenter(
                model_config.backbone, [new], model_config.output_stride, model_config.pretrained, self.method.layout
            )
            return model, None
        previous = self.step_dir(step - 1)
        model, _ = checkpoint.load_model(previous)
        self.method.load_state_dict(checkpoint.load_bank(previous))
        old = copy.deepcopy(model).requires_grad_(False)
        model.add_head(new)
        return model, old

    def _memory(self, step: int, old: Segmenter | None) -> Memory:
        """The step's exemplar memory, chosen with the previous step's model."""
        size, previous = self.config.memory.size, self.step_dir(step - 1)
        if not size or old is None:
            return Memory()
        data = self.data

        def found(earlier: int) -> Tensor:
            loader = data.train_loader(earlier, ["memory"], drop_last=False)
            batches = self._scan(old, loader, f"step {step} scan for exemplars")
            return self.all_reduce_sum(
                confident_classes(old, batches, data.positions(earlier, "train"), self.method.confident)
            )

        with torch.no_grad():
            memory = choose_memory(data, step, size, previous, sample_seed(self.config.seed, step, "memory"), found)
        self.console.print(f"step {step}: {len(memory.files)} old images as exemplars", highlight=False)
        return memory

    def _context(self, step: int) -> tuple[StepContext, Memory]:
        """What the method is told of a step, and the step's exemplar memory."""
        fabric = self.fabric
        seed_everything(sample_seed(self.config.seed, step) % 2**32, verbose=False)
        model, old = self._models(step)
        if fabric.global_rank:
            seed_everything(sample_seed(self.config.seed, step, fabric.global_rank) % 2**32, verbose=False)
        device = fabric.device
        old = old.to(device) if old else None
        memory = self._memory(step, old)
        generator = torch.Generator(device).manual_seed(sample_seed(self.config.seed, step, "method"))
        context = StepContext(
            task=self.task,
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
        )
        return context, memory

    def _scan(self, model: Segmenter, loader: LoaderEpoch, title: str) -> Iterator[Batch]:
        for batch in track(self.console, title, loader, len(loader)):
            yield to_device(batch, model)

    def _train(self, step: int, guard: Guard) -> None:
        """Train, evaluate and publish one step."""
        start, config, method = time.monotonic(), self.config, self.method
        phase = config.train.later if step else config.train.base
        assert phase.epochs and phase.lr, "resolved in __init__"
        state = self._broken_state(step)
        ctx, memory = self._context(step)
        images = len(self.data.positions(step, "train"))
        new = self.task.list_names(self.task.new(step))
        self.console.print(
            f"step {step}: learning {new} from {images} images, {phase.epochs} epochs of {ctx.iterations} iterations",
            highlight=False,
            soft_wrap=True,
        )
        training = self._begin(ctx, phase.epochs, phase.lr)
        spent = self._fit(training, memory, guard, state)
        ctx.model.eval()
        with torch.no_grad(), training.clock.time("statistics"):
            average_buffers(ctx.model, self.fabric)
            method.end_step(ctx)
        bank = method.state_dict()
        with training.clock.time("evaluation"):
            figures = self._evaluate(ctx)
        self._log_times(training)
        metrics = figures | {
            "seconds": round(time.monotonic() - start + spent, 2),
            "images": images,
            "bank_bytes": sum(t.numel() * t.element_size() for t in bank.values()),
            "trainable_parameters": sum(p.numel() for p in ctx.model.parameters() if p.requires_grad),
            "exemplars": len(memory.files),
            "exemplar_bytes": memory.nbytes,
        }
        if self.leader:
            info = self._info(step, ctx.model.head_sizes)
            if config.memory.size and step:
                memory.save(self.step_dir(step), self.step_dir(step - 1), step, config.memory.copy_files)
            checkpoint.save_step(self.step_dir(step), ctx.model, info, bank, metrics)
            clear(self.step_dir(step))
            self.console.print(iou_table(self._write_results()))
        self.fabric.barrier()

    def _begin(self, ctx: StepContext, epochs: int, lr: float) -> StepTraining:
        """All that precedes the first iteration of a step."""
        with torch.no_grad():
            self.method.init_heads(ctx)
        self.method.freeze(ctx)
        synchronise_norm(ctx.model.train(), self.fabric)
        ctx.model.eval()
        clock = Clock(self.fabric.device)
        with torch.no_grad(), clock.time("statistics"):
            self.method.begin_step(ctx)
        self.fabric.strategy.precision.load_state_dict(self.loss_scale)
        return StepTraining(self.fabric, self.method, ctx, epochs, lr, self.config.train, clock)

    def _log_times(self, training: StepTraining) -> None:
        """Keep in the step's logs where its time went."""
        if self.leader:
            logger = TensorBoardLogger(root_dir=self.step_dir(training.ctx.step) / "logs", name="", version="")
            logger.log_metrics(training.clock.scalars(), step=training.iteration)
            logger.finalize("success")

    def seconds_per_iteration(self, step: int, iterations: int = 3) -> float:
        """Train a few iterations for the clock's sake; nothing is kept, and the first does not count.

        Raises:
            UserError: as :meth:`run`.
        """
        ctx, memory = self._context(step)
        training = self._begin(ctx, 1, 1e-6)
        ctx.model.train()
        loader, marks = self.data.train_loader(step, range(iterations), True, memory.files), []
        for batch in itertools.islice(loader, iterations):
            losses = training.iterate(batch)
            sum(value.item() for value in losses.values())
            marks.append(time.monotonic())
        self.data.loading.close()
        return (marks[-1] - marks[0]) / (len(marks) - 1)

    def _broken_state(self, step: int) -> dict[str, Any] | None:
        """Where a broken run left a step off, None if it was not begun.

        Raises:
            UserError: it was begun with other images.
        """
        folder, images = self.step_dir(step), self.data.digest(step)
        state = read_state(folder, self.console)
        # The first states named no images. Exemplars are left out: another device may choose others.
        if state and state.get("images", images) != images:
            raise UserError(
                f"{folder / CURRENT}: step {step} was begun with other training images than {self.data.dataset.root} "
                "gives now; restore the list of images, give another directory with --out, or remove "
                f"{folder} to train the step anew"
            )
        return state

    def _fit(self, training: StepTraining, memory: Memory, guard: Guard, state: dict[str, Any] | None) -> float:
        """Train, from ``state`` on, where a broken run left off; the seconds spent before."""
        step, start = training.ctx.step, time.monotonic()
        folder, images = self.step_dir(step), self.data.digest(step)
        spent = state["seconds"] if state else 0.0
        if state:
            reset = training.load_state_dict(state)
            done = f"{training.iteration} of {training.total} iterations are done"
            self.console.print(f"step {step}: going on, {done}", highlight=False)
            if reset:
                self.console.print(f"[yellow]note:[/] saved on another device: {', '.join(reset)} begin anew")
        elif self.leader:
            shutil.rmtree(folder / "logs", ignore_errors=True)

        def save() -> None:
            values = training.state_dict() | {"seconds": spent + time.monotonic() - start, "images": images}
            if self.leader:
                write_state(folder, values)

        purge = training.iteration if state else None
        logger = TensorBoardLogger(root_dir=folder / "logs", name="", version="", purge_step=purge)
        epochs = range(training.epochs)
        loader = self.data.train_loader(step, epochs, True, memory.files, start=training.iteration)
        with bar(self.console, f"step {step}", len(loader)) as shown, guard.saving():
            training.run(loader, shown, logger, guard, save)
        logger.finalize("success")
        return spent

    def _evaluate(self, ctx: StepContext) -> dict[str, Any]:
        loader = self.data.test_loader(ctx.step)
        batches = track(self.console, f"step {ctx.step} test", loader, len(loader))
        confusion = confusion_matrix(ctx.model, self.method.rule(ctx.choices), batches, ctx.all_reduce_sum)
        confusion = self.data.dataset.scored(confusion, self.task.dataset_ids(ctx.step))
        names, choices = self.task.class_names(ctx.step), ctx.choices
        scores = summarize(
            confusion, names, self.task.base, iou_epsilon=choices.iou_epsilon, absent_as_zero=choices.absent_as_zero
        )
        return {
            "step": ctx.step,
            "new_classes": [self.task.label(c) for c in self.task.new(ctx.step)],
            **scores,
            "confusion": confusion.tolist(),
        }

    def _write_results(self) -> dict[str, Any]:
        """Rewrite results.json from the finished steps."""
        steps = [self.step_dir(t) for t in range(len(self.task)) if checkpoint.is_finished(self.step_dir(t))]
        results = {
            "run": {
                "method": self.config.method,
                "dataset": self.data.dataset.key,
                "task": self.task.name,
                "setting": self.task.setting,
                "seed": self.config.seed,
                "compat": self.config.compat,
                "crop": self.config.data.crop,
                "precision": str(self.fabric._precision.precision),
                "notes": self.notes,
                "steps": len(self.task),
            },
            "steps": [
                {k: v for k, v in read_json(s / "metrics.json").items() if k not in ("confusion", "files")}
                for s in steps
            ],
        }
        write_json(self.run_dir / "results.json", results)
        return results


def train(config: RunConfig, steps: range | None = None, console: Console | None = None) -> Path:
    """Run a configuration; finished steps are skipped.

    Args:
        config: see :mod:`starseg.config`.
        steps: which steps; all by default.
        console: where progress goes; the terminal by default.

    Returns:
        The run directory.

    Raises:
        UserError: anything in the input that must be mended first.
    """
    return Runner(config, console or Console(), steps).run()
