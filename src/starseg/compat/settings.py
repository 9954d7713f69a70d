"""Published JSON configuration: its keys, their meaning here, and the values that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from starseg.config import Label, RunConfig, explain, parse_config
from starseg.data.datasets import DATASETS
from starseg.errors import UserError
from starseg.replay.directions import Noise
from starseg.utils.files import parse_json

_DATASETS = {
    "VOCIncrementalDataLoader": "voc",
    "ADEIncrementalDataLoader": "ade",
    "CityIncrementalDataLoader": "city",
}
"""Our data set of each published loader."""
_BASE_MODELS = {"DeepLabV3": ("resnet101.tv_in1k", "aspp"), "SegFormer": ("mit_b2", "segformer")}
"""Default encoder and decoder of each base model."""


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ArchArgs(_Keys):
    """Section ``arch.args``."""

    output_stride: Literal[8, 16] = 16
    norm_act: Literal["bn_sync"] = "bn_sync"
    backbone_pretrained: bool | Path = True
    freeze_all_bn: bool = False
    backbone: str | None = None
    """Ours: any timm backbone; by default that of the base model."""


class Arch(_Keys):
    """Section ``arch``: the network."""

    type: Literal["DeepLabV3", "SegFormer"] = "DeepLabV3"
    args: ArchArgs = ArchArgs()


class Task(_Keys):
    """Section ``data_loader.args.task``."""

    name: Label
    step: int = Field(0, ge=0)
    setting: Literal["overlap", "disjoint"] = "overlap"
    idxs_path: Path | None = None
    allow_absent: bool = False
    """Ours: train although no image shows some class in its step."""


class Crop(_Keys):
    """Section ``transform_args`` of a split."""

    crop_size: int = Field(512, gt=0)


class SplitArgs(_Keys):
    """Section ``args`` of a split."""

    transform: Literal[True] = True
    transform_args: Crop = Crop()
    masking_value: int = 0


class TrainSplit(_Keys):
    """Section ``data_loader.args.train``."""

    args: SplitArgs = SplitArgs()
    batch_size: int = Field(24, gt=0)


class TestSplit(_Keys):
    """Section ``data_loader.args.test``."""

    args: SplitArgs = SplitArgs()
    batch_size: int = Field(1, gt=0)


class ValSplit(TestSplit):
    """Section ``data_loader.args.val``; read, but not used."""

    cross_val: Literal[False] = False


class ExemplarMemory(_Keys):
    """Section ``data_loader.args.memory``."""

    mem_size: int = Field(0, ge=0)


class LoaderArgs(_Keys):
    """Section ``data_loader.args``."""

    task: Task
    train: TrainSplit = TrainSplit()
    val: ValSplit = ValSplit()
    test: TestSplit = TestSplit()
    num_workers: int = Field(4, ge=0)
    pin_memory: bool = True
    memory: ExemplarMemory = ExemplarMemory()
    root: Path | None = None
    """Ours: the data set's folder; by default ./datasets/PascalVOC2012, ADE20K or CityScapes."""


class Loader(_Keys):
    """Section ``data_loader``."""

    type: Literal["VOCIncrementalDataLoader", "ADEIncrementalDataLoader", "CityIncrementalDataLoader"]
    args: LoaderArgs


class OptimizerArgs(_Keys):
    """Section ``optimizer.args``."""

    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    momentum: float = Field(0.9, ge=0.9, le=0.9)
    nesterov: Literal[True] = True


class Optimizer(_Keys):
    """Section ``optimizer``."""

    type: Literal["SGD"] = "SGD"
    args: OptimizerArgs = OptimizerArgs()


class Hyperparameter(_Keys):
    """Section ``hyperparameter``: loss weights."""

    pos_weight: float = Field(4, gt=0)
    mbce: float = Field(1, ge=0)
    pkd: float = Field(5, ge=0)
    cont: float = Field(0.05, ge=0)


class SchedulerArgs(_Keys):
    """Section ``lr_scheduler.args``."""

    warmup_iters: float = Field(0.0, ge=0, lt=1)


class Scheduler(_Keys):
    """Section ``lr_scheduler``."""

    type: Literal["PolyLR", "WarmupPolyLR"] = "PolyLR"
    args: SchedulerArgs = SchedulerArgs()


class Evaluator(_Keys):
    """Section ``evaluator``; it has no options."""

    type: Literal["Evaluator"] = "Evaluator"
    args: dict[str, Any] = Field({}, max_length=0)


class Trainer(_Keys):
    """Section ``trainer``."""

    epochs: int = Field(60, gt=0)
    save_dir: Path
    save_period: int = -1
    validation_period: int = 10
    verbosity: int = 2
    monitor: Literal["off"] = "off"
    early_stop: Literal[-1] = -1
    reset_best_mnt: bool = False
    tensorboard: bool = False
    noise_type: Noise | None = None
    """Journal version: noise of STAR-Basic or STAR-Lite."""
    save_prototypes: bool = False
    """Journal version: whether the method is STAR-Basic, with noise "dist" unless another is given."""
    save_norms: bool = False


class PublishedConfig(_Keys):
    """Published configuration (``config_*.json``).

    Keys without a docstring have their published meaning; docs/published.md lists those that are accepted without
    effect (n_gpu, dist_backend, pin_memory, val, validation_period, ...).
    """

    name: Label
    n_gpu: int = 1
    multiprocessing_distributed: bool = False
    rank: int = Field(0, ge=0)
    world_size: int = Field(1, gt=0)
    dist_backend: str = "nccl"
    dist_url: str = "tcp://127.0.0.1:29528"
    seed: int = Field(1, ge=0)
    use_amp: bool = True
    arch: Arch = Arch()
    data_loader: Loader
    optimizer: Optimizer = Optimizer()
    hyperparameter: Hyperparameter = Hyperparameter()
    lr_scheduler: Scheduler = Scheduler()
    evaluator: Evaluator = Evaluator()
    metrics: list[str] = []
    trainer: Trainer
    test: bool = False
    compat: Literal["published"] | None = None
    """Ours: "published" restores the published code's numerical choices (docs/fidelity.md)."""

    @property
    def dataset(self) -> str:
        """Key of the loader's data set."""
        return _DATASETS[self.data_loader.type]

    @property
    def task(self) -> Task:
        """Section ``data_loader.args.task``."""
        return self.data_loader.args.task

    @property
    def method(self) -> str:
        """The method that the keys of the journal version select; without them, STAR."""
        if self.trainer.save_prototypes:
            return "star-basic"
        return "star-lite" if self.trainer.noise_type else "star"

    @property
    def noise(self) -> Noise:
        """The noise of STAR-Basic or STAR-Lite."""
        return self.trainer.noise_type or "dist"

    @property
    def run_dir(self) -> Path:
        """Run directory ``<save_dir>/models/<setting>_<task>_<name>``, which holds step_<k>."""
        return self.trainer.save_dir / "models" / f"{self.task.setting}_{self.task.name}_{self.name}"

    def to_run(self, devices: int = 1, gpu: bool = True) -> RunConfig:
        """Convert to starseg's configuration.

        Args:
            devices: processes; with ``multiprocessing_distributed`` the batch size is that of each.
            gpu: whether one is used; without one ``num_workers`` gives way to "auto", which changes no result.
        """
        args, task, optimizer = self.data_loader.args, self.task, self.optimizer.args
        phase = {"epochs": self.trainer.epochs, "lr": optimizer.lr}
        world = devices * self.world_size
        weights = self.hyperparameter
        encoder, decoder = _BASE_MODELS[self.arch.type]
        tree: dict[str, Any] = {
            "method": self.method,
            "out": self.run_dir,
            "seed": self.seed,
            "compat": self.compat,
            "data": {
                "dataset": self.dataset,
                "root": args.root,
                "crop": args.train.args.transform_args.crop_size,
                "workers": args.num_workers if gpu else "auto",
                "lists": task.idxs_path,
            },
            "task": {"name": task.name, "setting": task.setting, "allow_absent": task.allow_absent},
            "model": {
                "backbone": self.arch.args.backbone or encoder,
                "decoder": decoder,
                "output_stride": self.arch.args.output_stride,
                "pretrained": self.arch.args.backbone_pretrained,
            },
            "train": {
                "batch_size": args.train.batch_size * (world if self.multiprocessing_distributed else 1),
                "later" if task.step else "base": phase,
                "warmup": self.lr_scheduler.args.warmup_iters,
                "weight_decay": optimizer.weight_decay,
                "precision": "auto" if self.use_amp else "32",
                "accelerator": "auto" if gpu else "cpu",
                "devices": devices,
                "num_nodes": self.world_size,
            },
            "memory": {"size": args.memory.mem_size if task.step else 0},
            "eval": {"batch_size": args.test.batch_size},
            self.method: {
                "pos_weight": weights.pos_weight,
                "mbce": weights.mbce,
                "ocfm": weights.pkd,
                "sad": weights.cont,
            },
        }
        if self.method != "star":
            tree[self.method]["noise"] = self.noise
        return parse_config(tree, "the published configuration, in our terms")


def parse_published(tree: dict[str, Any], source: str) -> PublishedConfig:
    """Validate a published configuration.

    Raises:
        UserError: unknown keys, or values whose meaning this implementation does not have.
    """
    try:
        config = PublishedConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}:\n{explain(error, PublishedConfig)}") from error
    args = config.data_loader.args
    crop = args.train.args.transform_args.crop_size
    fill = DATASETS[config.dataset].test_fill
    for key, given, wanted in (
        ("data_loader.args.train.args.masking_value", args.train.args.masking_value, 0),
        ("data_loader.args.val.args.masking_value", args.val.args.masking_value, fill),
        ("data_loader.args.test.args.masking_value", args.test.args.masking_value, fill),
        ("data_loader.args.val.args.transform_args.crop_size", args.val.args.transform_args.crop_size, crop),
        ("data_loader.args.test.args.transform_args.crop_size", args.test.args.transform_args.crop_size, crop),
    ):
        if given != wanted:
            raise UserError(f"{source}:\n{key}: expected {wanted}, as published for this data set, got {given}")
    steps = DATASETS[config.dataset].tasks.get(config.task.name)
    if steps and config.task.step >= len(steps):
        raise UserError(
            f"{source}:\ndata_loader.args.task.step (--task_step): expected less than {len(steps)}, as task "
            f"{config.task.name} has {len(steps)} steps, got {config.task.step}"
        )
    if config.lr_scheduler.type == "PolyLR" and config.lr_scheduler.args.warmup_iters:
        raise UserError(f"{source}:\nlr_scheduler.args.warmup_iters: PolyLR has none; take WarmupPolyLR")
    return config


def read_published(path: Path) -> dict[str, Any]:
    """Read a published JSON configuration as nested dictionaries.

    Raises:
        UserError: missing, or not a JSON object.
    """
    try:
        tree = parse_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object of sections, got {type(tree).__name__}")
    return tree


def published_tree(config: Path | None, resume: Path | None) -> tuple[dict[str, Any], Path]:
    """Return a command's configuration: that next to the checkpoint, with the sections of ``config`` replacing its own.

    Returns:
        The nested dictionaries, and the file to name in errors.

    Raises:
        UserError: no such checkpoint, or neither configuration is there.
    """
    if resume is not None and not resume.is_file():
        raise UserError(f"-r/--resume: there is no checkpoint {resume}")
    beside = resume.parent / "config.json" if resume else None
    if config is None and (beside is None or not beside.is_file()):
        where = f"lie beside the checkpoint ({beside}) or " if beside else ""
        raise UserError(f"-c/--config: a configuration must {where}be given, such as configs/config_voc.json")
    tree = read_published(beside) if beside and beside.is_file() else {}
    if config is not None:
        tree.update(read_published(config))
    return _without_unread(tree), config or beside or Path()


def tree_beside(checkpoint: Path) -> tuple[dict[str, Any], Path]:
    """Return the configuration next to a checkpoint, as nested dictionaries, and its file.

    Raises:
        UserError: no such checkpoint, or no configuration next to it.
    """
    config = checkpoint.parent / "config.json"
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint {checkpoint}; give a file that exists")
    if not config.is_file():
        raise UserError(
            f"{checkpoint}: its configuration {config} is missing; put the config.json of the download beside the "
            "checkpoint, or that of its training run"
        )
    return _without_unread(read_published(config)), config


def _without_unread(tree: dict[str, Any]) -> dict[str, Any]:
    if isinstance(section := tree.get("hyperparameter"), dict):
        for unread in ("kd", "ac"):
            section.pop(unread, None)
    return tree


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a nested dictionary, creating sections as needed."""
    *parents, leaf = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {part!r} is a value in the configuration, expected a section")
    tree[leaf] = value
