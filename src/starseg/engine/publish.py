"""Publishing of results: step directories and results.json."""

from __future__ import annotations

from typing import Any

from lightning_fabric import Fabric

from starseg.engine import checkpoint
from starseg.engine.setup import PreparedRun
from starseg.engine.state import clear
from starseg.engine.step import TrainedStep
from starseg.models import Architecture
from starseg.utils.files import read_json, write_json


def step_info(run: PreparedRun, step: int, architecture: Architecture, head_sizes: list[int]) -> checkpoint.StepInfo:
    """Return the content of model.json for a step of a run."""
    config, task, dataset = run.config, run.task, run.data.dataset
    ids = list(task.dataset_ids(step))
    return checkpoint.StepInfo(
        architecture=architecture,
        head_sizes=head_sizes,
        names=list(task.class_names(step)),
        dataset_ids=ids,
        method=config.method,
        dataset=dataset.key,
        task=task.name,
        setting=task.setting,
        step=step,
        seed=config.seed,
        compat=config.compat,
        base=task.base,
        crop=config.data.crop,
        test_fill=dataset.test_fill,
        lead=list(run.method.layout.lead),
        conv_heads=run.method.layout.conv,
        hidden=run.method.layout.hidden,
        background=dataset.background,
        domains=[list(group) for group in task.domains[: step + 1]],
        mask_ids=[dataset.mask_ids.get(i, i) for i in ids] if dataset.mask_ids else None,
    )


def publish_step(run: PreparedRun, trained: TrainedStep) -> None:
    """Write a trained step to its directory (metrics.json last), then remove its training state."""
    step, memory, folder = trained.step, trained.memory, run.step_dir(trained.step)
    if run.config.memory.size and step:
        memory.save(folder, run.step_dir(step - 1), step, run.config.memory.copy_files)
    info = step_info(run, step, trained.model.architecture, trained.model.head_sizes)
    checkpoint.save_step(folder, trained.model, info, trained.bank, trained.metrics)
    clear(folder)


def write_results(run: PreparedRun, fabric: Fabric) -> dict[str, Any]:
    """Write results.json from the finished steps and return its content."""
    steps = [folder for t in range(len(run.task)) if checkpoint.is_finished(folder := run.step_dir(t))]
    results = {
        "run": {
            "method": run.config.method,
            "dataset": run.data.dataset.key,
            "task": run.task.name,
            "setting": run.task.setting,
            "seed": run.config.seed,
            "compat": run.config.compat,
            "crop": run.config.data.crop,
            "precision": str(fabric._precision.precision),
            **({} if run.data.dataset.background else {"background": False}),
            "notes": run.notes,
            "steps": len(run.task),
        },
        "steps": [
            {k: v for k, v in read_json(s / "metrics.json").items() if k not in ("confusion", "files")} for s in steps
        ],
    }
    write_json(run.config.run_dir / "results.json", results)
    return results
