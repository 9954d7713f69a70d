"""Run configuration: typed, every field documented, unknown keys rejected by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from starseg.errors import UserError


class Strict(BaseModel):
    """Section in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _no_path(name: str) -> str:
    if set(name) & set("/\\\0"):
        raise ValueError("it becomes a part of a folder's name: expected one without / and \\")
    return name


Label = Annotated[str, AfterValidator(_no_path)]
"""Text that becomes part of a folder's name, and so must not contain path separators."""

_ROOTS = {"voc": Path("./datasets/PascalVOC2012"), "ade": Path("./datasets/ADE20K"), "folder": Path("./learn")}


class DataConfig(Strict):
    """Section `data`: images, and how they are read."""

    dataset: Literal["voc", "ade", "folder"] = "voc"
    """Layout of the data on disk (docs/datasets.md); `folder`: as `starseg learn` prepares it (docs/learn.md)."""
    root: Path | None = None
    """Folder of the data set; by default `./datasets/PascalVOC2012`, `./datasets/ADE20K` or `./learn`."""
    crop: int = Field(512, gt=0)
    """Side of the square training and test crops in pixels, a multiple of the model's output stride."""
    lists: Path | None = None
    """Folder of published image lists, `<dataset>/<setting>_<task>_<split>_<step>.npy` (docs/published.md); an existing
    list replaces the selection of images by their masks."""
    workers: int | Literal["auto"] = Field("auto")
    """Loader workers. `auto`: with a GPU up to 8 per process, limited by the number of cores and the size of
    `/dev/shm`; 0 on a CPU. The number never changes a result."""
    cache: Literal["off", "auto", "ram"] = "off"
    """Keep decoded training images and masks in memory: `auto` if they take at most half of the available memory; `ram`
    refuses to start if they do not fit. It never changes a result (docs/performance.md)."""

    @property
    def folder(self) -> Path:
        """The data set's folder, given or by default."""
        return self.root or _ROOTS[self.dataset]


class TaskConfig(Strict):
    """Section `task`: the classes learnt in each step."""

    name: Label | None = None
    """Published task (`15-1`, `joint`, ...), or a label for `task.steps`."""
    steps: list[list[int | str]] | None = None
    """Classes of each step, by name or dataset id."""
    setting: Literal["overlap", "disjoint"] = "overlap"
    """Training images of a step: `disjoint` leaves out those that show classes of later steps (docs/protocol.md)."""
    allow_absent: bool = False
    """Train even if no image shows some class in its step; its logit then learns from negatives only."""


class ModelConfig(Strict):
    """Section `model`: the network."""

    backbone: str = "resnet101.tv_in1k"
    """Any timm backbone with `features_only`."""
    output_stride: Literal[8, 16] = 16
    """Pixels per feature cell along each axis."""
    pretrained: bool | Path = True
    """`true`: ImageNet weights (those of `tf_efficientnet_lite0` come with the extra `lite` and need no download);
    `false`: random weights; or a file with the backbone's weights."""


class PhaseConfig(Strict):
    """Sections `train.base` and `train.later`."""

    epochs: int | None = Field(None, gt=0)
    """Number of epochs; by default the recipe's."""
    lr: float | None = Field(None, gt=0)
    """Base learning rate, that of the backbone; by default the recipe's."""


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
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"
    """`auto`: bf16 where the hardware is fast at it, fp16 on older GPUs, otherwise float32. `32` and every evaluation
    use float32 without TF32."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Hardware to compute on."""
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
    """Maximum time in minutes between two saves of the training state, which is also saved after each epoch."""
    deterministic: bool = False
    """Deterministic algorithms on a GPU, too (also `--deterministic`); runs on a CPU are always bitwise repeatable."""


class MemoryConfig(Strict):
    """Section `memory`: old images kept as exemplars."""

    size: int | None = Field(None, ge=0)
    """Number of old images kept as exemplars; by default the method's (`star` 0, `star-m` 50)."""
    copy_files: bool = Field(False, alias="copy")
    """Copy the exemplars into the run directory, so that later steps do not need the old data set."""


class EvalConfig(Strict):
    """Section `eval`: evaluation of a step."""

    image: Literal["crop", "full"] = "crop"
    """`crop`: short side resized to the crop size, then centre crop (the published protocol); `full`: whole images."""
    batch_size: int = Field(16, gt=0)
    """Images per forward pass; always 1 with `eval.image: full`."""


class RunConfig(BaseModel):
    """Configuration of a run; a section with the name of a method (`star: ...`) holds that method's options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str = "star"
    """Registered method (`starseg methods` lists them)."""
    out: Path | None = None
    """Run directory (also `--out`); by default `runs/<data>_<task>_<setting>_<method>_seed<seed>`."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation, sample order, augmentation and replay."""
    compat: Literal["published"] | None = None
    """`published` restores numerical choices of the published code (docs/fidelity.md, rows marked P)."""
    start_from: Path | None = None
    """Finished step directory of another run, used as step 0 instead of training one."""
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
