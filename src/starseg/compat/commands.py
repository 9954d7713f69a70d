"""Published commands train_<voc|ade|city>.py, eval_<voc|ade|city>.py and compute_prototype.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from starseg.compat.settings import PublishedConfig, parse_published, published_tree, set_key
from starseg.data.datasets import DATASETS
from starseg.errors import UserError
from starseg.utils.terminal import make_console, reporting_errors, resumable

# Flags of training that set a key of the configuration.
_KEYS: dict[tuple[str, ...], tuple[str, type]] = {
    ("--dist_url",): ("dist_url", str),
    ("--save_dir",): ("trainer.save_dir", str),
    ("--name",): ("name", str),
    ("--task_name",): ("data_loader.args.task.name", str),
    ("--task_setting",): ("data_loader.args.task.setting", str),
    ("--task_step",): ("data_loader.args.task.step", int),
    ("--lr", "--learning_rate"): ("optimizer.args.lr", float),
    ("--bs", "--batch_size"): ("data_loader.args.train.batch_size", int),
    ("--ep", "--epochs"): ("trainer.epochs", int),
    ("--seed",): ("seed", int),
    ("--mem_size",): ("data_loader.args.memory.mem_size", int),
    ("--pos_weight",): ("hyperparameter.pos_weight", float),
    ("--mbce",): ("hyperparameter.mbce", float),
    ("--noise_type",): ("trainer.noise_type", str),
    ("--basemodel",): ("arch.type", str),
    ("--data_root",): ("data_loader.args.root", str),
    ("--compat",): ("compat", str),
}
# What messages advise whoever runs ``starseg train``, and what these commands have in its place.
_ADVICE = {
    "with --out": "with --name or --save_dir",
    "task.allow_absent=true": "data_loader.args.task.allow_absent: true in the configuration",
}
_EVAL_FLAGS = ("--dist_url", "--save_dir", "--name", "--data_root")


def _parser(dataset: str | None, training: bool) -> argparse.ArgumentParser:
    what = "Train one step of" if training else "Evaluate a checkpoint of"
    text = (
        f"{what} STAR on {DATASETS[dataset].title}" if dataset else "Derive the prototypes of STAR-Lite before a step"
    )
    parser = argparse.ArgumentParser(description=f"{text} (docs/published.md).")
    add = parser.add_argument
    add("-c", "--config", type=Path, help=f"JSON configuration, such as configs/config_{dataset or 'voc'}.json")
    add("-r", "--resume", type=Path, help="checkpoint-epoch<E>.pth, with its config.json beside it")
    add("-d", "--device", help='"cpu", or indices of GPUs such as 0 or 0,1; without a GPU that many CPU processes')
    add("--multiprocessing_distributed", action="store_true", help="the batch size is that of each process")
    add("--test", action="store_true", help="evaluate only: for eval_*.py")
    add("--debug", action="store_true", help="show tracebacks of errors")
    for flags, (key, kind) in _KEYS.items():
        if training or flags[0] in _EVAL_FLAGS:
            add(*flags, type=kind, dest=key, metavar=kind.__name__.upper(), help=f"sets {key}")
    if training:
        add("--freeze_bn", action="store_true", help="freeze batch norm: in every step after step 0")
        add("--save_prototypes", action="store_true", help="STAR-Basic instead of STAR or STAR-Lite")
        add("--save_norms", action="store_true", help="accepted without effect, as published")
        for flag in ("--kd", "--ac"):
            add(flag, type=float, help="refused: a weight of DKD, which STAR never reads")
    return parser


@dataclass(frozen=True)
class _Devices:
    count: int
    gpu: bool


def _devices(text: str | None, console: Console) -> _Devices:
    """Make only the requested GPUs visible before torch initialises, and return the number of processes."""
    wanted = text.split(",") if text else []
    if text is not None and text != "cpu" and not all(w.strip().isdigit() for w in wanted):
        raise UserError(f'-d/--device: expected "cpu" or indices of GPUs such as 0 or 0,1, got {text!r}')
    if text == "cpu":
        return _Devices(1, gpu=False)
    if wanted and "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(w.strip() for w in wanted)
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        count = max(1, len(wanted))
        where = "on the CPU" if count == 1 else f"in {count} processes on the CPU (gloo)"
        console.print(f"device {text or 'all'}: torch sees no GPU, running {where}", highlight=False)
        return _Devices(count, gpu=False)
    if len(wanted) > found:
        raise UserError(f"-d/--device: GPUs {text} are asked for, torch sees {found} of them")
    return _Devices(found, gpu=True)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {key: getattr(args, key, None) for key, _ in _KEYS.values()}
    flags = {
        "multiprocessing_distributed": args.multiprocessing_distributed,
        "arch.args.freeze_all_bn": getattr(args, "freeze_bn", False),
        "trainer.save_prototypes": getattr(args, "save_prototypes", False),
        "trainer.save_norms": getattr(args, "save_norms", False),
    }
    return {k: v for k, v in given.items() if v is not None} | {k: True for k, v in flags.items() if v}


def _refuse_what_training_has_not(args: argparse.Namespace, dataset: str) -> None:
    if args.test:
        raise UserError(f"--test: take eval_{dataset}.py --test -r CHECKPOINT; training evaluates by itself at its end")
    for flag, ours in (("kd", "pkd"), ("ac", "cont")):
        if getattr(args, flag) is not None:
            raise UserError(
                f"--{flag}: a weight of DKD, which STAR never reads; STAR's are hyperparameter.pkd (OCFM) and "
                f"hyperparameter.cont (SAD) in the configuration: set {ours} there, or run DKD itself: "
                "starseg train CONFIG method=dkd"
            )


def _config(args: argparse.Namespace, dataset: str | None) -> PublishedConfig:
    """Return the configuration with the flags applied; ``dataset`` is the only one that the command accepts."""
    tree, source = published_tree(args.config, args.resume)
    for key, value in _overrides(args).items():
        set_key(tree, key, value)
    config = parse_published(tree, str(source))
    if dataset and config.dataset != dataset:
        other = f"{Path(sys.argv[0]).stem.split('_')[0]}_{config.dataset}.py"
        raise UserError(f"{source}: data_loader.type is for {DATASETS[config.dataset].title}; take {other}")
    return config


def _check_training(args: argparse.Namespace, config: PublishedConfig) -> None:
    frozen = config.arch.args.freeze_all_bn
    if config.task.step and not frozen:
        raise UserError(f"step {config.task.step}: steps after step 0 freeze batch norm; add --freeze_bn")
    if not config.task.step and frozen:
        raise UserError("step 0 trains batch norm: leave --freeze_bn (arch.args.freeze_all_bn) out")
    step_dir = config.run_dir / f"step_{config.task.step}"
    if args.resume and args.resume.resolve().parent != step_dir.resolve():
        raise UserError(
            f"-r/--resume: {args.resume} does not lie in {step_dir}; an interrupted step is resumed by its own "
            f"command, and a step starts from the checkpoint in step_{max(0, config.task.step - 1)} beside it"
        )


def _set_address(config: PublishedConfig, given: bool) -> None:
    """Set lightning's environment variables from --dist_url, rank and world_size (nodes)."""
    if given or config.world_size > 1:
        address = urlsplit(config.dist_url)
        if address.scheme != "tcp" or not address.hostname or not address.port:
            raise UserError(f"dist_url: expected tcp://HOST:PORT, got {config.dist_url!r}")
        os.environ.setdefault("MASTER_ADDR", address.hostname)
        os.environ.setdefault("MASTER_PORT", str(address.port))
        os.environ.setdefault("NODE_RANK", str(config.rank))


def train(dataset: str, argv: list[str] | None = None) -> None:
    """Train one step of a published task on top of the step before.

    The results go to ``<save_dir>/models/<setting>_<task>_<name>/step_<k>``.
    """

    def run(args: argparse.Namespace, console: Console) -> None:
        _refuse_what_training_has_not(args, dataset)
        config = _config(args, dataset)
        _check_training(args, config)
        _set_address(config, args.dist_url is not None)
        devices = _devices(args.device, console)
        from starseg.compat.training import train_step

        train_step(config, config.to_run(devices.count, devices.gpu), console)

    _main(dataset, True, argv, run)


def derive(argv: list[str] | None = None) -> None:
    """Derive the prototypes with which STAR-Lite begins a step, and write them beside the step before.

    The data set is that of the configuration. The step begins with them; without the file it derives the same ones.
    """

    def run(args: argparse.Namespace, console: Console) -> None:
        config = _config(args, None)
        if not config.task.step:
            raise UserError("--task_step: step 0 has no old classes; prototypes are derived before each later step")
        if config.method != "star-lite":
            raise UserError(
                "compute_prototype.py derives the prototypes of STAR-Lite: add --noise_type, such as dist, and leave "
                "--save_prototypes out"
            )
        _set_address(config, args.dist_url is not None)
        devices = _devices(args.device, console)
        from starseg.compat.training import derive_prototypes

        derive_prototypes(config, config.to_run(devices.count, devices.gpu), console)

    _main(None, True, argv, run)


def evaluate(dataset: str, argv: list[str] | None = None) -> None:
    """Evaluate a checkpoint on the test split."""

    def run(args: argparse.Namespace, console: Console) -> None:
        if args.resume is None:
            raise UserError("-r/--resume: give the checkpoint, with its config.json beside it")
        config = _config(args, dataset)
        devices = _devices(args.device, console)
        from starseg.compat.training import evaluate_checkpoint

        save_dir = getattr(args, "trainer.save_dir")
        evaluate_checkpoint(args.resume, config, config.to_run(1, devices.gpu), save_dir and Path(save_dir), console)

    _main(dataset, False, argv, run)


@contextmanager
def _advising() -> Iterator[None]:
    """Rewrite errors to name the flags of these commands."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for native, ours in _ADVICE.items():
            text = text.replace(native, ours)
        raise UserError(text) from error


def _main(
    dataset: str | None, training: bool, argv: list[str] | None, run: Callable[[argparse.Namespace, Console], None]
) -> None:
    args = _parser(dataset, training).parse_args(argv)
    with reporting_errors(args.debug), resumable(), _advising():
        quiet = os.environ.get("LOCAL_RANK", "0") != "0"
        run(args, make_console(quiet=quiet))
