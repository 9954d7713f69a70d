"""Run configuration: typed, every field documented, unknown keys rejected by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from starseg.errors import UserError


class Strict(BaseModel):
    """A section whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _no_path(name: str) -> str:
    if set(name) & set("/\\\0"):
        raise ValueError("it becomes a part of a folder's name: expected one without / and \\")
    return name


Label = Annotated[str, AfterValidator(_no_path)]
"""Text that a folder is named by, so that it cannot lead out of the folder above."""

_ROOTS = {"voc": Path("./datasets/PascalVOC2012"), "ade": Path("./datasets/ADE20K"), "folder": Path("./learn")}


class DataConfig(Strict):
    """`data`: which images and how they are read."""

    dataset: Literal["voc", "ade", "folder"] = "voc"
    """Layout of the data on disk (docs/datasets.md); "folder": what `starseg learn` prepares (docs/learn.md)."""
    root: Path | None = None
    """The data set's folder; by default ./datasets/PascalVOC2012, ./datasets/ADE20K or ./learn; read it from
    `folder`."""
    crop: int = Field(512, gt=0)
    """Side of the square training and test crops, in pixels; a multiple of the model's output stride."""
    lists: Path | None = None
    """Folder of published image lists, <dataset>/<setting>_<task>_<train|test>_<step>.npy; one that is there replaces
    the choice of images by their masks."""
    workers: int | Literal["auto"] = Field("auto")
    """Loader processes; "auto": with a GPU up to 8 for each process, as cores and /dev/shm allow; none on a CPU, whose
    cores the network needs. They never change a result."""
    cache: Literal["off", "auto", "ram"] = "off"
    """Keep decoded training images and masks in memory: "auto" if they take at most half of what is available; "ram"
    refuses to start where they do not fit. It never changes a result."""

    @property
    def folder(self) -> Path:
        """The data set's folder, given or by default."""
        return self.root or _ROOTS[self.dataset]


class TaskConfig(Strict):
    """`task`: which classes are learnt when."""

    name: Label | None = None
    """A published task ("15-1", "joint", ...), or a free label beside `steps`."""
    steps: list[list[int | str]] | None = None
    """Classes of each step, by name or dataset id."""
    setting: Literal["overlap", "disjoint"] = "overlap"
    """Which training images a step may see."""
    allow_absent: bool = False
    """Train although no image shows some class in its step: its logit then learns from negatives alone."""


class ModelConfig(Strict):
    """`model`: the network."""

    backbone: str = "resnet101.tv_in1k"
    """Any timm backbone with `features_only`."""
    output_stride: Literal[8, 16] = 16
    """Pixels per feature cell."""
    pretrained: bool | Path = True
    """ImageNet weights, none, or a file with the backbone's weights."""


class PhaseConfig(Strict):
    """`train.base` and `train.later`."""

    epochs: int | None = Field(None, gt=0)
    """Passes over the step's images; by default the recipe's."""
    lr: float | None = Field(None, gt=0)
    """Base learning rate of the backbone; by default the recipe's."""


class TrainConfig(Strict):
    """`train`: optimizer, schedule, machine."""

    batch_size: int = Field(24, gt=0)
    """Images per optimizer step, over all processes."""
    base: PhaseConfig = PhaseConfig()
    """Step 0."""
    later: PhaseConfig = PhaseConfig()
    """Every later step."""
    warmup: float | None = Field(None, ge=0, lt=1)
    """Share of the iterations with a linear warm-up; by default the recipe's."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of SGD (momentum 0.9, Nesterov)."""
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"
    """"auto": bf16 where the hardware is fast at it, fp16 on older GPUs, else float32."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute."""
    devices: int = Field(1, gt=0)
    """Processes on each node, one per GPU (also --devices)."""
    num_nodes: int = Field(1, gt=0)
    """Nodes (also --num-nodes)."""
    compile: bool = False
    """torch.compile of both networks: minutes at the start of each step; on a CPU it needs a C++ compiler
    (docs/performance.md)."""
    accumulate: int = Field(1, gt=0)
    """Parts in which a batch goes through the network, to fit into memory: the same losses and gradients for one more
    forward pass; trained batch norm sees a part at a time."""
    save_minutes: float = Field(10, gt=0)
    """Longest time between two saves of a step's state, which is also saved at each epoch's end."""
    deterministic: bool = False
    """Deterministic algorithms on a GPU too (also --deterministic); a CPU is always bitwise repeatable."""


class MemoryConfig(Strict):
    """`memory`: old images kept as exemplars."""

    size: int | None = Field(None, ge=0)
    """Old images kept as exemplars; by default the recipe's (star 0, star-m 50)."""
    copy_files: bool = Field(False, alias="copy")
    """Copy them into the run directory, which then does not need the old data set."""


class EvalConfig(Strict):
    """`eval`: how a step is scored."""

    image: Literal["crop", "full"] = "crop"
    """"crop": short side resized to the crop size, centre crop (the published protocol); "full": whole images."""
    batch_size: int = Field(16, gt=0)
    """Images per forward pass; 1 with `image: full`."""


@dataclass(frozen=True)
class Choices:
    """Numerical choices in which the published code differs from the published formulas (docs/fidelity.md).

    The defaults are the sound ones. Functions take the single choices that they depend on as keyword arguments.

    Attributes:
        noise_around_row: the noise of the k-th new class is measured around row k of all prototypes, an old class's,
            instead of around its own (row 2).
        absent_classes_in_sad: in SAD a new class that is absent from the batch adds the constant 1 (row 5).
        sad_epsilon: smallest norm by which SAD normalises a vector (row 5).
        absent_prototypes_in_sad: SAD also keeps new classes away from the zero prototypes of old classes without a
            cell (row 5).
        ignored_as_negatives: ignored pixels are negatives in the class loss and count in its mean (row 6).
        train_old_heads: the old heads of sigmoid methods belong to the optimizer, and so weight decay moves them
            (row 9).
        iou_epsilon: added to the intersection in the denominator of the IoU (row 10).
        absent_as_zero: in means, an absent class counts as 0 (row 10).
        argmax_of_sigmoids: predictions compare sigmoids, in which saturated logits tie (row 12).
        unshifted_exemplar_labels: SSUL does not shift the labels of exemplars to its channels.
        binned_entropy: PLOP takes the medians from 100 bins, whatever ``plop.threshold`` says.
        binned_running_index: PLOP's running count of these bins adds a bin's index in place of its content.
        fixed_prototypes: Adapter does not move the old prototypes.
    """

    noise_around_row: bool = False
    absent_classes_in_sad: bool = False
    sad_epsilon: float = 1e-3
    absent_prototypes_in_sad: bool = False
    ignored_as_negatives: bool = False
    train_old_heads: bool = False
    iou_epsilon: float = 0.0
    absent_as_zero: bool = False
    argmax_of_sigmoids: bool = False
    unshifted_exemplar_labels: bool = False
    binned_entropy: bool = False
    binned_running_index: bool = False
    fixed_prototypes: bool = False


SOUND = Choices()
PUBLISHED = Choices(
    noise_around_row=True,
    absent_classes_in_sad=True,
    sad_epsilon=1e-12,
    absent_prototypes_in_sad=True,
    ignored_as_negatives=True,
    train_old_heads=True,
    iou_epsilon=1e-6,
    absent_as_zero=True,
    argmax_of_sigmoids=True,
    unshifted_exemplar_labels=True,
    binned_entropy=True,
    binned_running_index=True,
    fixed_prototypes=True,
)


def choices_for(compat: str | None) -> Choices:
    """The choices that a configuration's or a step's ``compat`` stands for."""
    return PUBLISHED if compat == "published" else SOUND


class RunConfig(BaseModel):
    """A whole run. A section named like a method ("star: ...") holds that method's options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str = "star"
    """A registered method."""
    out: Path | None = None
    """Run directory; by default runs/<data>_<task>_<setting>_<method>_seed<seed>."""
    seed: int = Field(0, ge=0)
    """Of initialisation, order, augmentation and replay."""
    compat: Literal["published"] | None = None
    """"published" restores the numerical choices of the published implementation (docs/fidelity.md, rows marked P)."""
    recipe: str | None = None
    """Data set whose recipe for the method is used; by default the run's own."""
    start_from: Path | None = None
    """Step directory of another run, taken as this run's step 0 instead of training one."""
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def run_dir(self) -> Path:
        """`out`, or what it is by default."""
        if self.out is not None:
            return self.out
        task = self.task.name or "custom"
        return Path("runs") / f"{self.data.dataset}_{task}_{self.task.setting}_{self.method}_seed{self.seed}"

    def method_section(self, name: str) -> dict[str, Any]:
        """The options given in section ``name``, not validated yet."""
        return dict((self.model_extra or {}).get(name) or {})


def _known_keys(model: Any, path: tuple[int | str, ...]) -> list[str]:
    for key in path:
        field = getattr(model, "model_fields", {}).get(str(key))
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """A pydantic error of ``model`` as one line per mistake: key, what was wrong, what was received."""
    lines = []
    for item in error.errors():
        loc = item["loc"]
        key = prefix + ".".join(str(p) for p in loc)
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, loc[:-1])
            near = difflib.get_close_matches(str(loc[-1]), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}" if known else ""
            lines.append(f"{key}: unknown key; {hint}".rstrip("; "))
        else:
            lines.append(f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return "\n".join(dict.fromkeys(lines))


def _set_dotted(tree: dict[str, Any], assignment: str) -> None:
    key, sep, value = assignment.partition("=")
    if not sep or not key:
        raise UserError(f"override {assignment!r}: expected key=value, e.g. train.base.epochs=5")
    *parents, leaf = key.split(".")
    for part in parents:
        if not isinstance(tree.setdefault(part, {}), dict):
            raise UserError(f"override {assignment!r}: {part!r} is a value, not a section")
        tree = tree[part]
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {assignment!r}: {value!r} is not valid YAML") from error


def parse_config(tree: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate a configuration given as nested dictionaries.

    Raises:
        UserError: unknown keys, wrong types, options of a method that does not exist or does not know them.
    """
    from starseg.methods import METHODS, method_options

    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}:\n{explain(error, RunConfig)}") from error
    if config.method not in METHODS:
        raise UserError(
            f"{source}:\nmethod: unknown method {config.method!r}; known: {', '.join(sorted(METHODS))}; "
            "one of your own is named by STARSEG_METHODS=its_file.py, or by its package (docs/new-method.md)"
        )
    sections = {method.section for method in METHODS.values()}
    if unknown := sorted(set(config.model_extra or {}) - sections):
        known = [*RunConfig.model_fields, *sorted(sections)]
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"{source}:\n{unknown[0]}: unknown key; {hint}")
    for method in METHODS.values():
        if method.section in (config.model_extra or {}):
            if not isinstance(given := (config.model_extra or {})[method.section] or {}, dict):
                raise UserError(f"{source}:\n{method.section}: expected a section (key: value), got {given!r}")
            method_options(method.name, config)
    if config.memory.size and METHODS[config.method].memory is None:
        keeping = ", ".join(sorted(name for name, method in METHODS.items() if method.memory is not None))
        raise UserError(
            f"{source}:\nmemory.size: method {config.method} keeps no images; set it to 0 or take one of: {keeping}"
        )
    if config.task.name is None and config.task.steps is None:
        raise UserError(f"{source}:\ntask: give task.name (a published task such as 15-1) or task.steps")
    if config.data.crop % config.model.output_stride:
        raise UserError(
            f"{source}:\ndata.crop: {config.data.crop} is no multiple of model.output_stride "
            f"({config.model.output_stride}); the statistics are taken on that grid"
        )
    world = config.train.devices * config.train.num_nodes
    if world > 1 and METHODS[config.method].one_process:
        raise UserError(f"{source}:\ntrain.devices: method {config.method} runs on one process only, got {world}")
    parts = config.train.accumulate
    if config.train.batch_size < 2 * world * parts:
        raise UserError(
            f"{source}:\ntrain.batch_size: batch norm needs at least 2 images in each of {world} processes"
            + (f" and {parts} parts (train.accumulate)" if parts > 1 else "")
            + f", got {config.train.batch_size} in all"
        )
    return config


def override(key: str, value: Any) -> str:
    """``key=value`` for :func:`load_config`, quoted where YAML would read a text as something else."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML configuration and apply ``a.b=value`` overrides.

    Raises:
        UserError: the file is missing or not YAML, or :func:`parse_config` refuses it.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        place = "" if path.is_absolute() else f"; looked from {Path.cwd()}"
        raise UserError(f"{path}: cannot read the configuration ({error.strerror}){place}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections (key: value), got {type(tree).__name__}")
    assignments = list(overrides)
    for assignment in assignments:
        _set_dotted(tree, assignment)
    return parse_config(tree, f"{path} (with {', '.join(assignments)})" if assignments else str(path))


def change_config(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The configuration with ``a.b=value`` overrides applied; refuses what :func:`load_config` refuses."""
    tree = config.model_dump(mode="json", by_alias=True)
    for assignment in overrides:
        _set_dotted(tree, assignment)
    return parse_config(tree, "overrides")


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, every field spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
