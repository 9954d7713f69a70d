"""The configuration of a run: typed sections with documented fields; unknown keys are errors.

Only the schema is checked here. Whatever depends on the registered methods or on the data is checked by
:mod:`starseg.engine.setup`, before anything is written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from starseg.errors import UserError
from starseg.utils.files import read_text
from starseg.utils.overrides import override as override
from starseg.utils.overrides import set_override
from starseg.utils.precision import Precision


class Strict(BaseModel):
    """Base class of sections in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _no_path(name: str) -> str:
    if set(name) & set("/\\\0"):
        raise ValueError("it becomes a part of a folder's name: expected one without / and \\")
    return name


Label = Annotated[str, AfterValidator(_no_path)]
"""Text that becomes part of a folder name and therefore must not contain path separators."""


class DataConfig(Strict):
    """Section `data`: the data set and how it is read."""

    dataset: Label = "voc"
    """Registered data set: `voc`, `ade` (docs/datasets.md), `folder` (a folder prepared by `starseg learn`,
    docs/learn.md), or one of your own (docs/new-dataset.md)."""
    root: Path | None = None
    """Folder of the data set; by default the one in the data set's spec: `./datasets/PascalVOC2012`,
    `./datasets/ADE20K`, `./learn`."""
    crop: int = Field(512, gt=0)
    """Side of the square training and test crops in pixels, a multiple of the model's output stride."""
    lists: Path | None = None
    """Folder of published image lists, `<dataset>/<setting>_<task>_<split>_<step>.npy` (docs/published.md); a list that
    exists replaces the selection of images by their masks."""
    validation: float | None = Field(None, gt=0, lt=1)
    """Share of the training images that is held out for validation: the run trains on the rest, and is evaluated on
    these images instead of the test images (docs/compare.md)."""
    workers: int | Literal["auto"] = Field("auto")
    """Loader workers. `auto`: with a GPU up to 8 per process, limited by the number of cores and the size of
    `/dev/shm`; 0 on a CPU. The number never changes a result."""
    cache: Literal["off", "auto", "ram"] = "auto"
    """Keep decoded training images and masks in memory: `auto` if they take at most half of the available memory; `ram`
    refuses to start if they do not fit. It never changes a result (docs/performance.md)."""
    decode: Literal["full", "scaled"] = "full"
    """`scaled`: decode a JPEG at 1/2, 1/4 or 1/8 of its size where the training crop is reduced as much, which is
    faster for large photos, changes results slightly, and turns the cache off (docs/performance.md)."""


class TaskConfig(Strict):
    """Section `task`: the classes learnt in each step."""

    name: Label | None = None
    """Published task (`15-1`, `joint`, ...), or a label for `task.steps`."""
    steps: list[list[int | str]] | None = None
    """Classes of each step, by name or dataset id; with `setting: domain`, its domains."""
    setting: Literal["overlap", "disjoint", "domain"] = "overlap"
    """Training images of a step: `disjoint` leaves out those that show classes of later steps; with `domain`, the steps
    learn new domains of the same classes (docs/protocol.md)."""
    allow_absent: bool = False
    """Train even if no image shows some class in its step; its logit then learns from negatives only."""
    at_once: bool = False
    """Learn all classes of the task in a single step, as the method `joint` does."""


class ModelConfig(Strict):
    """Section `model`: the network."""

    backbone: str = "resnet101.tv_in1k"
    """The encoder: any timm model with `features_only` that accepts images of any size, or SegFormer's, `mit_b0` to
    `mit_b5` (docs/protocol.md)."""
    decoder: Literal["aspp", "fpn", "linear", "segformer"] = "aspp"
    """The decoder: `aspp`, ASPP on the deepest map of the encoder (DeepLabV3); `fpn`, a light feature pyramid over all
    maps; `linear`, a projection of all maps; `segformer`, SegFormer's all-MLP decoder."""
    output_stride: Literal[8, 16] = 16
    """Pixels per feature cell along each axis."""
    pretrained: bool | Path = True
    """`true`: ImageNet weights (those of `tf_efficientnet_lite0`, `1` and `2` come with the extra `lite` and need no
    download); `false`: random weights; or a file with the encoder's weights."""
    frozen_from: Path | None = None
    """Finished step directory whose encoder and decoder are used in place of those described above, and are not trained
    in any step (docs/compare.md)."""


class PhaseConfig(Strict):
    """Sections `train.base` and `train.later`."""

    epochs: int | None = Field(None, gt=0)
    """Number of epochs; by default the recipe's."""
    lr: float | None = Field(None, gt=0)
    """Base learning rate, that of the encoder; by default the recipe's."""


class TrainConfig(Strict):
    """Section `train`: optimizer, schedule, hardware."""

    batch_size: int = Field(24, gt=0)
    """Images per optimizer step, over all processes."""
    base: PhaseConfig = PhaseConfig()
    """Step 0."""
    later: PhaseConfig = PhaseConfig()
    """Every later step."""
    warmup: float | None = Field(None, ge=0, lt=1)
    """Fraction of the iterations with a linear warm-up; by default the recipe's."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of SGD (momentum 0.9, Nesterov)."""
    encoder_lr: float = Field(1.0, ge=0)
    """Factor on the encoder's learning rate in all steps. 0 freezes the encoder: its weights, the statistics of its
    norm layers and its dropout."""
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"
    """`auto`: bf16 if the hardware supports it natively, fp16 on older GPUs, otherwise float32. `32` uses float32
    without TF32; evaluation has its own `eval.precision`."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware to run on."""
    devices: int = Field(1, gt=0)
    """Processes per node, one per GPU (also `--devices`)."""
    num_nodes: int = Field(1, gt=0)
    """Number of nodes (also `--num-nodes`)."""
    compile: bool = False
    """Apply `torch.compile` to both networks: takes minutes at the start of each step, and on a CPU needs a C++
    compiler (docs/performance.md)."""
    accumulate: int = Field(1, gt=0)
    """Number of micro-batches into which a batch is split to save memory: same losses and gradients at the cost of one
    more forward pass; batch norm in training mode sees one micro-batch at a time (docs/performance.md)."""
    save_minutes: float = Field(10, gt=0)
    """Maximum time in minutes between two saves of the training state; also saved after each epoch over images."""
    deterministic: bool = False
    """Use deterministic algorithms on a GPU (also `--deterministic`); runs on a CPU are always bitwise reproducible."""


class MemoryConfig(Strict):
    """Section `memory`: the exemplar memory."""

    size: int | None = Field(None, ge=0)
    """Number of old images kept as exemplars; by default the recipe's (`star` 0, `star-m` 50)."""
    copy_files: bool = Field(False, alias="copy")
    """Copy the exemplars into the run directory, so that later steps do not need the old data set."""


class EvalConfig(Strict):
    """Section `eval`: evaluation after each step."""

    image: Literal["crop", "full"] = "crop"
    """`crop`: short side resized to the crop size, then centre crop (the published protocol); `full`: whole images."""
    batch_size: int = Field(16, gt=0)
    """Images per forward pass; always 1 with `eval.image: full`."""
    precision: Precision = "auto"
    """Precision of the network in evaluation, reports and cached features: `auto`, float32 (cached features: that of
    training); `32`, float32; `bf16`, faster where the hardware supports it (docs/performance.md)."""

    @property
    def bf16(self) -> bool:
        """Whether evaluation and reports run the network in bf16 instead of float32."""
        return self.precision == "bf16"


@dataclass(frozen=True)
class Choices:
    """Numerical choices in which the published code differs from the published formulas (docs/fidelity.md).

    The defaults are the sound choices. Functions receive the individual choices that they depend on as keyword
    arguments.

    Attributes:
        noise_around_row: the noise of the k-th new class is measured around row k of all prototypes, which belongs to
            an old class, instead of around the class's own prototype (row 2).
        absent_classes_in_sad: a new class that is absent from the batch adds the constant 1 to SAD (row 5).
        sad_epsilon: lower bound of the norm by which SAD normalises a vector (row 5).
        absent_prototypes_in_sad: SAD also pushes new classes away from the zero prototypes of old classes without a
            feature cell (row 5).
        ignored_as_negatives: ignored pixels are negatives in the class loss and count in its mean (row 6).
        train_old_heads: the old heads of sigmoid methods are passed to the optimizer, so that weight decay changes them
            (row 9).
        iou_epsilon: added to the intersection in the denominator of the IoU (row 10).
        absent_as_zero: absent classes count as 0 in means (row 10).
        argmax_of_sigmoids: predictions compare sigmoids, where saturated logits tie (row 12).
        unshifted_exemplar_labels: SSUL does not shift the labels of exemplars to its channels.
        binned_entropy: PLOP computes medians from 100 bins, regardless of ``plop.threshold``.
        binned_running_index: PLOP's running count of these bins adds the index of a bin instead of its content.
        fixed_prototypes: Adapter does not move the old prototypes.
        iterated_prototypes: STAR-Lite derives prototypes by iterations of AdamW instead of solving for their limit.
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
    iterated_prototypes: bool = False


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
    iterated_prototypes=True,
)


def choices_for(compat: str | None) -> Choices:
    """Return the choices for a value of ``compat`` in a configuration or in model.json."""
    return PUBLISHED if compat == "published" else SOUND


class RunConfig(BaseModel):
    """Configuration of a run; a section named like a method (`star: ...`) contains the options of that method."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str = "star"
    """Registered method (`starseg methods` lists them)."""
    out: Path | None = None
    """Run directory (also `--out`); by default `runs/<data>_<task>_<setting>_<method>_seed<seed>`."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation, sample order, augmentation and replay."""
    compat: Literal["published"] | None = None
    """`published` restores numerical choices of the published code (docs/fidelity.md, rows marked P)."""
    recipe: str | None = None
    """Data set whose recipe for the method is used; by default the run's own."""
    start_from: Path | None = None
    """Finished step directory of another run, used as step 0 instead of training one."""
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    eval: EvalConfig = EvalConfig()

    _source: str = PrivateAttr("config")

    @property
    def source(self) -> str:
        """The file and overrides that the configuration was read from, for error messages."""
        return self._source

    @property
    def run_dir(self) -> Path:
        """The run directory: `out`, or its default."""
        if self.out is not None:
            return self.out
        task = self.task.name or "custom"
        return Path("runs") / f"{self.data.dataset}_{task}_{self.task.setting}_{self.method}_seed{self.seed}"

    def method_section(self, name: str) -> dict[str, Any]:
        """Return the options in section ``name``, not validated yet; empty if the section is missing."""
        return dict((self.model_extra or {}).get(name) or {})


def _known_keys(model: Any, path: tuple[int | str, ...]) -> list[str]:
    for key in path:
        field = getattr(model, "model_fields", {}).get(str(key))
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Format a pydantic error of ``model`` as one line per mistake: key, what is wrong, what was received."""
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


def parse_config(tree: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate a configuration given as nested dictionaries.

    Sections of methods are not validated here, but by :func:`starseg.engine.setup.check_method`.

    Args:
        tree: the nested dictionaries.
        source: where they come from, for error messages.

    Raises:
        UserError: a key is unknown, a value has the wrong type or is out of range, or values contradict each other.
    """
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}:\n{explain(error, RunConfig)}") from error
    config._source = source
    if config.task.name is None and config.task.steps is None:
        raise UserError(f"{source}:\ntask: give task.name (a published task such as 15-1) or task.steps")
    if config.data.crop % config.model.output_stride:
        raise UserError(
            f"{source}:\ndata.crop: {config.data.crop} is no multiple of model.output_stride "
            f"({config.model.output_stride}); the statistics are taken on that grid"
        )
    if config.data.decode == "scaled" and config.data.cache == "ram":
        raise UserError(
            f"{source}:\ndata.cache: ram keeps whole images, which data.decode=scaled does not decode; use "
            "data.cache=off or data.decode=full"
        )
    world, parts = config.train.devices * config.train.num_nodes, config.train.accumulate
    if config.train.batch_size < 2 * world * parts:
        raise UserError(
            f"{source}:\ntrain.batch_size: batch norm needs at least 2 images in each of {world} processes"
            + (f" and {parts} parts (train.accumulate)" if parts > 1 else "")
            + f", got {config.train.batch_size} in all"
        )
    return config


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML configuration and apply ``a.b=value`` overrides.

    Raises:
        UserError: the file is missing or not valid YAML, or :func:`parse_config` rejects it.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(read_text(path)) or {}
    except OSError as error:
        place = "" if path.is_absolute() else f"; looked from {Path.cwd()}"
        raise UserError(f"{path}: cannot read the configuration ({error.strerror}){place}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections (key: value), got {type(tree).__name__}")
    assignments = list(overrides)
    for assignment in assignments:
        set_override(tree, assignment, RunConfig)
    return parse_config(tree, f"{path} (with {', '.join(assignments)})" if assignments else str(path))


def change_config(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Return a configuration with ``a.b=value`` overrides applied.

    Raises:
        UserError: an override is malformed, or :func:`parse_config` rejects the result.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    for assignment in overrides:
        set_override(tree, assignment, RunConfig)
    return parse_config(tree, "overrides")


def dump_config(config: RunConfig) -> str:
    """Serialise a configuration as YAML, including defaults."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
