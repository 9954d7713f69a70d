"""Files of a step directory: network, metadata, method state and metrics; every file is written atomically."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from starseg.errors import UserError
from starseg.models import Architecture, Segmenter, make_network, upgrade_keys
from starseg.models.classifiers import HeadLayout
from starseg.utils.deprecation import old_names
from starseg.utils.files import read_json, write_atomic, write_json

__getattr__ = old_names(__name__)

FORMAT, BANK_FORMAT = 2, 1


def read_results(run: Path) -> Any:
    """Read results.json of a run directory.

    Raises:
        UserError: it is not a run directory, no step is finished, or the file is damaged.
    """
    path = run / "results.json"
    if not path.is_file() and any(run.glob("step_*")):
        raise UserError(f"{run}: no step of its own is finished yet; rerun the command that started it to resume")
    if not path.is_file():
        raise UserError(
            f"{path}: cannot read it, there is no such file; give a run directory (it holds step_0, ...)"
            + runs_below(run)
        )
    return read_json(path)


def runs_below(folder: Path) -> str:
    """Return the end of an error message about a folder that is not a run: the runs that it contains."""
    runs = sorted(path.parent.name for path in folder.glob("*/results.json"))
    return f"; the runs in {folder} are {', '.join(runs)}" if runs else ""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a step directory and compare it with the SHA-256 recorded in metrics.json.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        data = path.read_bytes()
        written = read_json(path.parent / "metrics.json").get("files", {}) if is_finished(path.parent) else {}
        if path.name in written and hashlib.sha256(data).hexdigest() != written[path.name]:
            raise UserError(
                f"{path}: damaged, not what was written; restore it, or remove {path.parent} and later steps to train "
                "them again"
            )
        return load(data)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error})") from error


@dataclass(frozen=True)
class StepInfo:
    """Content of model.json: what is needed to build and use the network of a step directory.

    Attributes:
        architecture: architecture of the network.
        head_sizes: number of new classes in each step so far.
        names, dataset_ids: class names and class ids by training id, the background first.
        method, dataset, task, setting, step, seed, compat: the run and step in which the network was trained.
        base: number of classes that count as old in tables.
        crop: side of the training crops in pixels.
        test_fill: label of classes not learnt yet in test labels.
        lead, conv_heads, hidden: layout of the heads (:class:`starseg.models.classifiers.HeadLayout`).
        background: whether training id 0 is a background, which can be predicted.
        mask_ids: ids in predicted masks by training id; None if they are the class ids.
        domains: domains of each step so far, in the setting "domain".
    """

    architecture: Architecture
    head_sizes: list[int]
    names: list[str]
    dataset_ids: list[int]
    method: str
    dataset: str
    task: str
    setting: str
    step: int
    seed: int
    compat: str | None
    base: int
    crop: int
    test_fill: int
    lead: list[str] = field(default_factory=list)
    conv_heads: bool = False
    hidden: int = 0
    background: bool = True
    mask_ids: list[int] | None = None
    domains: list[list[str]] = field(default_factory=list)

    @property
    def predicted_ids(self) -> list[int]:
        """Ids in predicted masks by training id; without a background, 255 for training id 0."""
        return self.dataset_ids if self.mask_ids is None else self.mask_ids

    @property
    def predictable(self) -> dict[int, str]:
        """Names of the classes that can be predicted, by id in predicted masks."""
        pairs = [*zip(self.predicted_ids, self.names, strict=True)]
        return dict(pairs if self.background else pairs[1:])

    @property
    def layout(self) -> HeadLayout:
        """Layout of the heads."""
        return HeadLayout(tuple(self.lead), self.conv_heads, self.hidden, self.architecture.extension is not None)


def save_step(folder: Path, model: Segmenter, info: StepInfo, bank: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    """Write the files of a finished step; ``metrics.json`` is written last and marks the step as finished.

    The size of the weights file is added to the metrics as ``network_bytes``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    files = {"model.safetensors": save(weights)}
    if bank:
        tensors = {k: v.cpu().contiguous() for k, v in bank.items()}
        # A single entry, because safetensors writes several in an order that varies between processes.
        metadata = {"starseg": json.dumps({"format": BANK_FORMAT, "classes": info.names[1:]})}
        files["bank.safetensors"] = save(tensors, metadata)
    for name, data in files.items():
        write_atomic(folder / name, data)
    write_json(folder / "model.json", {"format": FORMAT, **asdict(info)})
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    sizes = {"network_bytes": len(files["model.safetensors"])}
    write_json(folder / "metrics.json", {**metrics, **sizes, "files": digests})


def save_imported(
    folder: Path, model: Segmenter, info: StepInfo, bank: dict[str, Tensor], figures: dict[str, Any], origin: str
) -> None:
    """Write the files of a step that was trained elsewhere.

    Args:
        folder: the step directory.
        model: the network.
        info: content of model.json.
        bank: the method's state.
        figures: metrics measured on the data of this run.
        origin: where the network comes from.
    """
    metrics = {
        "step": info.step,
        "new_classes": info.names[-info.head_sizes[-1] :],
        **figures,
        "seconds": 0.0,
        "images": 0,
        "bank_bytes": sum(t.numel() * t.element_size() for t in bank.values()),
        "imported": origin,
    }
    save_step(folder, model, info, bank, metrics)


def is_finished(folder: Path) -> bool:
    """Return whether a step directory contains a finished step."""
    return (folder / "metrics.json").is_file()


def load_info(folder: Path) -> StepInfo:
    """Read model.json of a step directory.

    Raises:
        UserError: the folder is not that of a finished step, or the file is damaged or of a newer version of starseg.
    """
    if (folder / "resume.ckpt").is_file() and not is_finished(folder):
        raise UserError(f"{folder}: the step is not finished; rerun the command that started it to resume")
    if not (folder / "model.json").is_file():
        run = folder if folder.exists() else folder.parent
        steps = ", ".join(sorted(path.parent.name for path in run.glob("step_*/model.json")))
        hint = "it is a run, give one of its steps" if run == folder else f"there is no such folder; the steps of {run}"
        raise UserError(f"{folder}: no step directory (it holds no model.json){f'; {hint}: {steps}' if steps else ''}")
    raw = read_json(folder / "model.json")
    version = raw.pop("format", None)
    if version not in range(1, FORMAT + 1):
        raise UserError(f"{folder / 'model.json'}: format {version}, this starseg reads formats 1 to {FORMAT}")
    if version == 1 and "architecture" not in raw:
        raw["architecture"] = {"encoder": raw.pop("backbone", None), "stride": raw.pop("output_stride", None)}
    try:
        return TypeAdapter(StepInfo).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / 'model.json'}: {where}: {first['msg'].lower()}; it is damaged") from error


def load_model(folder: Path) -> tuple[Segmenter, StepInfo]:
    """Load the network of a step directory, in eval mode on the CPU.

    Raises:
        UserError: files are missing or damaged, or do not match each other.
    """
    info = load_info(folder)
    model = make_network(info.architecture, info.head_sizes, info.layout)
    state, own = upgrade_keys(read_tensors(folder / "model.safetensors")), model.state_dict()
    if wrong := [k for k in own | state if k not in own or k not in state or own[k].shape != state[k].shape]:
        raise UserError(
            f"{folder}: model.safetensors does not fit model.json: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, the first is {wrong[0]}; one of the two files belongs to another step"
        )
    model.load_state_dict(state)
    return model.eval(), info


def load_bank(folder: Path) -> dict[str, Tensor]:
    """Load the method's state of a step directory; empty if the method has none."""
    path = folder / "bank.safetensors"
    return read_tensors(path) if path.is_file() else {}
