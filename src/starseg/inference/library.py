"""Export of a step to the library that its network came from (`starseg export --to torchvision|smp|transformers`)."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from starseg import __version__
from starseg.engine.checkpoint import StepInfo, load_model
from starseg.errors import UserError
from starseg.inference.history import read_history
from starseg.inference.predictor import step_rule
from starseg.models import Architecture, Segmenter
from starseg.models.classifiers import BACKGROUND, linear_classifier
from starseg.models.foreign import LIBRARIES, NEVER, grow, huggingface, smp
from starseg.ops.bilinear import resize
from starseg.report.templating import template
from starseg.utils.files import write_atomic, write_json

BUILDERS = {"torchvision": "torchvision", "smp": "smp", "transformers": "transformers", "model": "module"}
"""Builders of networks by the form that `--to` names."""
OTHERWISE = "take --to program, or --out model.onnx without --to"
_CARD, _WEIGHTS, _ABOUT = "README.md", "weights.pth", "classes.json"
_SIDE, _TOLERANCE, _AGREEMENT = 96, 1e-3, 0.999


@dataclass(frozen=True)
class Classifier:
    """A step's heads as one linear classifier whose largest output is the prediction.

    Attributes:
        weight: [K, D].
        bias: [K].
        names: of the outputs.
        first: training id of output 0.
    """

    weight: Tensor
    bias: Tensor
    names: list[str]
    first: int


def join_heads(model: Segmenter, info: StepInfo) -> Classifier:
    """Return the heads of a step as one classifier.

    Raises:
        UserError: they are not linear, or not all of them are classes.
    """
    heads = [*model.lead.values(), *model.heads]
    if model.layout.hidden or not all(isinstance(head, nn.Conv2d) for head in heads):
        raise UserError(f"{info.method}: its classifier is no single 1x1 convolution, as the library's is; {OTHERWISE}")
    if extra := set(model.lead) - {BACKGROUND}:
        raise UserError(f"{info.method}: its channels {', '.join(sorted(extra))} have no place there; {OTHERWISE}")
    weight, bias = linear_classifier(heads)
    if BACKGROUND not in model.lead and info.background:
        # The largest logit above 0, else the background: the background's logit is 0.
        weight, bias = torch.cat([weight.new_zeros(1, model.width), weight]), torch.cat([bias.new_zeros(1), bias])
    elif BACKGROUND in model.lead and (not info.background or (not weight[0].any() and bias[0] <= NEVER)):
        return Classifier(weight[1:], bias[1:], info.names[1:], 1)
    first = int(not info.background)
    return Classifier(weight, bias, info.names[first:], first)


@torch.no_grad()
def export_library(step_dir: Path, form: str, out: Path, console: Console) -> Path:
    """Write a step as files that the library of its network loads without starseg.

    The files are read back as the library reads them and compared with the step.

    Args:
        step_dir: what to export.
        form: key of :data:`BUILDERS`.
        out: folder to make.
        console: where the comparison is printed.

    Returns:
        The model card.

    Raises:
        UserError: the network is not the library's, has no longer its form, or predicts something else there.
    """
    model, info = load_model(step_dir)
    builder = info.architecture.builder
    if builder != BUILDERS[form]:
        own = next((name for name, key in BUILDERS.items() if key == builder), None)
        raise UserError(
            f"--to {form}: {step_dir} holds a network of {own or builder}; take --to {own or 'program'}"
            + ("" if own else ", or --out model.onnx without --to")
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; give a free place")
    classifier = join_heads(model, info)
    try:
        network, grown = grow(info.architecture, model.state_dict(), classifier.weight, classifier.bias)
    except UserError as error:
        raise UserError(f"--to {form}: {error}; {OTHERWISE}") from error
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.resolve().parent) as temporary:
        folder = Path(temporary) / "export"
        folder.mkdir()
        load, code = _WRITERS[form](network, grown, classifier.names, info.crop, folder)
        agreement = _compare(model, info, classifier, load())
        options = grown.options
        about = {"mean": options["mean"], "std": options["std"], "crop": info.crop, "multiple": model.encoder.multiple}
        about |= {"bgr": bool(options.get("bgr"))}
        write_json(folder / _ABOUT, {"classes": classifier.names, **about})
        card = template("library_card.md.j2").render(
            input=_input(about),
            title=" ".join(filter(None, (grown.decoder, grown.encoder))),
            library={"smp": "segmentation-models-pytorch", "model": "torch"}.get(form, form),
            classes=list(enumerate(classifier.names)),
            column="output",
            rule="The prediction is the class of the largest output.",
            code=code,
            agreement=agreement,
            history=read_history(step_dir, info),
            version=__version__,
        )
        write_atomic(folder / _CARD, card.encode(errors="backslashreplace"))
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    console.print(f"compared with starseg: {agreement}", highlight=False, soft_wrap=True)
    console.print(f"{form}: {out}, with a model card {out / _CARD}", highlight=False, soft_wrap=True)
    return out / _CARD


def _input(about: dict[str, Any]) -> str:
    """Say what images the network takes."""
    order = "BGR images, normalised in the order RGB:" if about["bgr"] else "RGB images,"
    sides = f", sides that are multiples of {about['multiple']}" if about["multiple"] > 1 else ""
    mean, std = ([round(x, 4) for x in about[key]] for key in ("mean", "std"))
    return f"{order} `(pixel / 255 - mean) / std` with mean {mean} and std {std}, short side {about['crop']} px{sides}"


Load = Callable[[], nn.Module]


def _write_torchvision(
    network: nn.Module, grown: Architecture, names: list[str], crop: int, out: Path
) -> tuple[Load, str]:
    torch.save(network.state_dict(), out / _WEIGHTS)
    call = f"get_model({grown.encoder!r}, weights=None, weights_backbone=None, num_classes={len(names)})"
    code = f"import torch, torchvision\n\nnetwork = torchvision.models.{call}\n" + _LOAD
    return _state_dict_loader(grown, out), code


def _write_model(network: nn.Module, grown: Architecture, names: list[str], crop: int, out: Path) -> tuple[Load, str]:
    torch.save(network.state_dict(), out / _WEIGHTS)
    arguments = "".join(f", {key}={value!r}" for key, value in grown.options.get("config", {}).items())
    code = f"import torch\n\nnetwork = {grown.encoder}({len(names)}{arguments})  # your function\n" + _LOAD
    return _state_dict_loader(grown, out), code


_LOAD = f"""network.load_state_dict(torch.load("this/folder/{_WEIGHTS}", weights_only=True))
network.eval()"""


def _state_dict_loader(grown: Architecture, out: Path) -> Load:
    def load() -> nn.Module:
        network = LIBRARIES[grown.builder].create(grown, grown.options["outputs"])
        network.load_state_dict(torch.load(out / _WEIGHTS, "cpu", weights_only=True))
        return network

    return load


def _write_smp(network: nn.Module, grown: Architecture, names: list[str], crop: int, out: Path) -> tuple[Load, str]:
    library: Any = smp.library()
    network.save_pretrained(out)  # type: ignore[operator]
    code = 'import segmentation_models_pytorch as smp\n\nnetwork = smp.from_pretrained("this/folder").eval()'

    def load() -> nn.Module:
        with redirect_stdout(None):  # it prints where it loads from
            return library.from_pretrained(str(out))

    return load, code


def _write_transformers(
    network: nn.Module, grown: Architecture, names: list[str], crop: int, out: Path
) -> tuple[Load, str]:
    model: Any = network
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    huggingface.library().utils.logging.disable_progress_bar()
    model.save_pretrained(out)
    processor = grown.options.get("processor") or {"size": {"height": crop, "width": crop}, "do_normalize": True}
    if processor.get("do_normalize", not grown.options.get("bgr")):
        step = -1 if grown.options.get("bgr") else 1
        processor = processor | {f"image_{key}": grown.options[key][::step] for key in ("mean", "std")}
        processor |= {"do_rescale": True, "rescale_factor": 1 / 255}
    write_atomic(out / "preprocessor_config.json", json.dumps(processor, indent=2).encode())
    kind = getattr(huggingface.library(), grown.decoder)
    code = f"""from transformers import AutoImageProcessor, {grown.decoder}

processor = AutoImageProcessor.from_pretrained("this/folder")
network = {grown.decoder}.from_pretrained("this/folder").eval()"""
    return lambda: kind.from_pretrained(out, local_files_only=True), code


_WRITERS: dict[str, Callable[[nn.Module, Architecture, list[str], int, Path], tuple[Load, str]]] = {
    "torchvision": _write_torchvision,
    "smp": _write_smp,
    "transformers": _write_transformers,
    "model": _write_model,
}


@torch.no_grad()
def _compare(model: Segmenter, info: StepInfo, classifier: Classifier, network: nn.Module) -> str:
    """Compare a network in its library's form with the step on a random image.

    Raises:
        UserError: they differ.
    """
    unit = model.encoder.multiple
    side = unit if model.encoder.fixed else math.ceil(_SIDE / unit) * unit
    size = (side, side if model.encoder.fixed else side + unit * math.ceil(32 / unit))
    coarse = torch.rand(1, 3, side // 8 + 1, size[1] // 8 + 1, generator=torch.Generator().manual_seed(0))
    image = model.normalize((resize(coarse, size) * 255).round().byte())
    output = model(image)
    bgr = info.architecture.options.get("bgr")
    found = huggingface.logits(network, network.eval()(image.flip(1) if bgr else image))
    expected = nn.functional.conv2d(output.features, classifier.weight[:, :, None, None], classifier.bias)
    found, expected = (resize(logits.contiguous(), size) for logits in (found, expected))
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    same = (found.argmax(1) + classifier.first == step_rule(info)(resize(output.logits.contiguous(), size))).float()
    said = (
        f"max |logit difference| {difference:.2g} (largest logit {largest:.3g}), the same class on "
        f"{100 * float(same.mean()):.3f} % of the pixels"
    )
    if difference > _TOLERANCE * largest or same.mean() < _AGREEMENT:
        raise UserError(f"the exported network does not predict what the step predicts ({said}); {OTHERWISE}")
    return said
