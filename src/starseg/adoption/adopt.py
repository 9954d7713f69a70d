"""Adoption of a network: conversion, comparison with the original, and writing of a step directory."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from starseg.adoption.bank import MeasuredBank, measure_bank, to_sigmoid
from starseg.adoption.classes import Outputs, name_outputs
from starseg.adoption.sources import Foreign, Options, open_source
from starseg.config import dump_config, parse_config
from starseg.engine.checkpoint import StepInfo, save_imported
from starseg.engine.metrics import summarize
from starseg.errors import UserError
from starseg.inference.files import find_images
from starseg.models import Segmenter
from starseg.models.classifiers import BACKGROUND, SOFTMAX, last_layer
from starseg.models.foreign import LIBRARIES, NEVER, huggingface, preprocess_of, split_network
from starseg.models.foreign.split import feature_stride, make_parts
from starseg.ops.bilinear import resize
from starseg.tasks import BACKGROUND as BACKGROUND_ID
from starseg.utils.files import read_json, write_atomic, write_json

METHOD = "lwf"
"""Method whose first step trains such a network: one softmax over the background and all classes."""
WITH_BANK = "star"
"""Method whose state is the bank that is measured on photos."""
_CROP, _DERIVED = 512, "derived from the classifier"
# Sides of the images on which both are compared, and smallest divisor of sides from which a square of it is taken.
_SIDE, _WHOLE = 96, 64
# Largest difference of logits, as a share of the largest logit; rounding causes some 1e-6, in deep networks up to 1e-4.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AdoptRequest:
    """Arguments of `starseg adopt`.

    Attributes:
        source: see :mod:`starseg.adoption.sources`.
        out: run directory to make.
        weights: a file, or the name of torchvision weights.
        classes: comma-separated names of the outputs, the background first.
        background: whether the first output is the background.
        classifier: name of the classifier, if it is not the library's usual one.
        mean, std: three numbers for pixels in 0..1, in the order RGB, that replace those of the source.
        crop: side in pixels of the images at which the network predicts.
        photos: a folder or pattern of unlabelled images, from which a prototype bank is measured.
        features: name of a layer whose output becomes a further map of the encoder; for `model:NAME`.
        multiple: divisor that the sides of images must have; for `model:NAME`.
        bgr: whether the network takes BGR images.
    """

    source: str
    out: Path
    weights: str | None = None
    classes: str | None = None
    background: bool = True
    classifier: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: int | None = None
    photos: str | None = None
    features: str | None = None
    multiple: int | None = None
    bgr: bool = False


@dataclass(frozen=True)
class Comparison:
    """Comparison of an adopted network with the original on random images.

    Attributes:
        logits: largest absolute difference of logits.
        largest: largest absolute logit.
        agreement: share of the pixels with the same class.
    """

    logits: float
    largest: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"max |logit difference| {self.logits:.2g} (largest logit {self.largest:.3g}), the same class on "
            f"{100 * self.agreement:.3f} % of the pixels"
        )


def adopt(request: AdoptRequest, console: Console) -> Path:
    """Make a step directory from a network of another library.

    Args:
        request: what to adopt, and where to write it.
        console: where notes and the comparison with the original are printed.

    Returns:
        The step directory.

    Raises:
        UserError: the network cannot be adopted, or does not predict what the original predicts.
    """
    check_request(request)
    classes = len(request.classes.split(",")) if request.classes else None
    options = Options(request.weights, classes, request.classifier, request.features, request.multiple)
    return adopt_network(open_source(request.source, options), request, console)


def adopt_network(foreign: Foreign, request: AdoptRequest, console: Console) -> Path:
    """Make a step directory from a network that is in memory; arguments and errors as in :func:`adopt`.

    Args:
        foreign: the network, which is changed.
        request: its source is only shown.
        console: where notes and the comparison with the original are printed.
    """
    photos = find_images([request.photos]) if request.photos else []
    outputs = name_outputs(
        request.classes, foreign.names, foreign.architecture.options["outputs"], request.background, request.source
    )
    has_background = outputs.background is not None or outputs.binary
    if photos and not has_background:
        raise UserError(
            f"--photos: {request.source} has no background class, to which a bank relates every class; leave --photos "
            "out"
        )
    given = {key: list(value) for key in ("mean", "std") if (value := getattr(request, key))}
    channels = {"bgr": True} if request.bgr else {}
    architecture = replace(foreign.architecture, options=foreign.architecture.options | given | channels)
    model, compared = convert(replace(foreign, architecture=architecture), outputs)
    for note in () if given else foreign.notes:
        console.print(f"note: {note}", soft_wrap=True)
    crop = _crop(request, foreign.crop, model)
    measured = None
    if photos:
        model = to_sigmoid(model)
        measured = measure_bank(model, photos, crop)
    step = _write(request, model, outputs, crop, compared, measured)
    background = f"and {outputs.names[0]}" if has_background else "no background"
    shown = ", ".join(outputs.names[1:6]) + (", ..." if len(outputs.names) > 6 else "")
    console.print(f"{len(outputs.names) - 1} classes ({shown}), {background}", soft_wrap=True)
    console.print(f"{model.width} features, one per {model.stride} x {model.stride} pixels; crop {crop}")
    console.print(f"compared with the original: {compared}", soft_wrap=True)
    if measured:
        console.print(_bank_table(measured, outputs.names[1:]))
    console.print(f"adopted: {step}; try `starseg predict {step} PHOTOS --out found --overlays`", soft_wrap=True)
    return step


def _bank_table(measured: MeasuredBank, names: list[str]) -> Table:
    """Tabulate what the bank knows of each class."""
    table = Table("class", f"cells found in {measured.images} photos", "prototype")
    for name, cells in zip(names, measured.cells, strict=True):
        table.add_row(Text(name), f"{cells:,}" if cells else "none", "measured" if cells else _DERIVED)
    return table


def check_request(request: AdoptRequest) -> None:
    """Check the arguments that need no network.

    Raises:
        UserError: the place is taken, or numbers make no sense.
    """
    out = request.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; give a free place")
    for name in ("mean", "std"):
        values = getattr(request, name)
        if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
            raise UserError(f"--{name}: expected three numbers for pixels in 0..1, such as 0.5,0.5,0.5, got {values}")
    if request.mean and max(map(abs, request.mean)) > 2:
        raise UserError(f"--mean: expected numbers for pixels in 0..1, got {request.mean}; divide mean and std by 255")


def convert(foreign: Foreign, outputs: Outputs) -> tuple[Segmenter, Comparison]:
    """Convert a network, which is taken apart, and compare the result with it.

    Args:
        foreign: the network.
        outputs: what its outputs are.

    Raises:
        UserError: it cannot be split in front of its classifier, or the result differs from it.
    """
    library = LIBRARIES[foreign.architecture.builder]
    network = foreign.network.eval()
    original, image = _original(network, library, foreign)
    split = split_network(network, foreign.architecture)
    if not split.classifier.out_channels == foreign.architecture.options["outputs"] == original.shape[1]:
        raise UserError(
            f"{foreign.architecture.encoder}: looked for its classifier in "
            f"{foreign.architecture.options.get('classifier') or 'its last convolution'}, which has "
            f"{split.classifier.out_channels} outputs; the network has {original.shape[1]} and "
            f"{foreign.architecture.options['outputs']} are named; name its last convolution with --classifier"
        )
    encoder, decoder = make_parts(split, preprocess_of(foreign.architecture))
    architecture = replace(foreign.architecture, stride=feature_stride(encoder, decoder))
    model = Segmenter(architecture, encoder, decoder, [len(outputs.channels)], SOFTMAX).eval()
    _scale_features(model, split.classifier, image)
    _fill_heads(model, split.classifier, outputs)
    compared = _compare(model, original, image, outputs)
    if compared.logits > _TOLERANCE * compared.largest:
        raise UserError(
            f"{foreign.architecture.encoder}: does not predict what the original predicts ({compared}); the original "
            "may do more after its classifier than resize its outputs; name another layer with --classifier"
        )
    return model, compared


def _original(network: nn.Module, library: Any, foreign: Foreign) -> tuple[Tensor, Tensor]:
    """Return the original's logits [1, N, H, W] of a random image, and the image [1, 3, H, W]."""
    multiple = library.multiple(network, foreign.architecture)
    side = multiple if multiple >= _WHOLE else math.ceil(_SIDE / multiple) * multiple
    width = side if multiple >= _WHOLE else side + math.ceil(32 / multiple) * multiple
    coarse = torch.rand(1, 3, side // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(0))
    pixels = (resize(coarse, (side, width)) * 255).round()
    preprocess = preprocess_of(foreign.architecture)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    image = (pixels / 255 - mean) / std
    try:
        with torch.no_grad():
            result = network(image.flip(1) if foreign.architecture.options.get("bgr") else image)
    except UserError:
        raise
    except Exception as error:  # another person's code may raise anything
        hint = "; name the divisor of its sides with --multiple" if library is LIBRARIES["module"] else ""
        raise UserError(
            f"{foreign.architecture.encoder}: cannot be run on images of {side} x {width} pixels: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}{hint}"
        ) from error
    logits = huggingface.logits(network, result)
    return resize(logits.float(), image.shape[-2:]), image


@torch.no_grad()
def _scale_features(model: Segmenter, classifier: nn.Conv2d, image: Tensor) -> None:
    """Scale the features by a power of 2 to a root mean square near 1, and the classifier by its inverse."""
    size = float(model(image).features.square().mean().sqrt())
    if 0 < size < math.inf:
        scale = 2.0 ** -round(math.log2(size))
        decoder: Any = model.decoder
        decoder.scale.fill_(scale)
        classifier.weight /= scale


@torch.no_grad()
def _fill_heads(model: Segmenter, classifier: nn.Conv2d, outputs: Outputs) -> None:
    """Copy the rows of the original classifier into the heads."""
    weight = classifier.weight
    bias = weight.new_zeros(len(weight)) if classifier.bias is None else classifier.bias
    head, lead = last_layer(model.heads[0]), last_layer(model.lead[BACKGROUND])
    assert head.bias is not None and lead.bias is not None
    head.weight.copy_(weight[outputs.channels])
    head.bias.copy_(bias[outputs.channels])
    if outputs.background is None:
        lead.weight.zero_()
        lead.bias.fill_(0.0 if outputs.binary else NEVER)
    else:
        lead.weight.copy_(weight[[outputs.background]])
        lead.bias.copy_(bias[[outputs.background]])


@torch.no_grad()
def _compare(model: Segmenter, original: Tensor, image: Tensor, outputs: Outputs) -> Comparison:
    own = resize(model(image.contiguous(memory_format=torch.channels_last)).logits.contiguous(), image.shape[-2:])
    lead = [] if outputs.background is None else [outputs.background]
    expected = original[:, [*lead, *outputs.channels]]
    if outputs.binary:
        expected = torch.cat([torch.zeros_like(expected), expected], 1)
    own = own[:, own.shape[1] - expected.shape[1] :]
    return Comparison(
        float((own - expected).abs().max()),
        float(expected.abs().max()),
        float((own.argmax(1) == expected.argmax(1)).float().mean()),
    )


def _crop(request: AdoptRequest, known: int | None, model: Segmenter) -> int:
    """Return the side of the crops, a multiple of what the network and a run's configuration need."""
    unit = math.lcm(model.multiple, 16)
    if request.crop is None:
        return unit if model.encoder.fixed else max(1, round((known or _CROP) / unit)) * unit
    if request.crop % unit:
        least = max(1, request.crop // unit)
        raise UserError(
            f"--crop {request.crop}: is no multiple of {unit}, which this network needs; take {least * unit} or "
            f"{(least + 1) * unit}"
        )
    return request.crop


def _info(model: Segmenter, outputs: Outputs, crop: int, method: str) -> StepInfo:
    count = len(outputs.channels)
    return StepInfo(
        architecture=model.architecture,
        head_sizes=[count],
        names=outputs.names,
        dataset_ids=list(range(1 + count)),
        method=method,
        dataset="folder",
        task="learn",
        setting="overlap",
        step=0,
        seed=0,
        compat=None,
        base=count,
        crop=crop,
        test_fill=BACKGROUND_ID,
        lead=list(model.layout.lead),
    )


def _write(
    request: AdoptRequest,
    model: Segmenter,
    outputs: Outputs,
    crop: int,
    compared: Comparison,
    measured: MeasuredBank | None,
) -> Path:
    """Write the run directory under a temporary name and rename it; return its step directory."""
    method = WITH_BANK if measured else METHOD
    info = _info(model, outputs, crop, method)
    nothing = np.zeros([len(info.names)] * 2, np.int64)
    figures = {**summarize(nothing, info.names, info.base), "confusion": nothing.tolist()}
    found = measured.cells if measured else [1] * len(outputs.channels)
    figures["adopted"] = {
        "background": outputs.background is not None or outputs.binary,
        "logit_difference": compared.logits,
        "agreement": compared.agreement,
        "derived": [name for name, cells in zip(info.names[1:], found, strict=True) if not cells],
    }
    bank = measured.bank.state_dict() if measured else {}
    tree = {
        "method": method,
        "recipe": "voc",
        "data": {"dataset": "folder", "crop": crop},
        "task": {"name": "learn", "steps": [info.dataset_ids[1:]]},
        "model": {"pretrained": False},
    }
    out = request.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adopt-", dir=out.parent) as temporary:
        run = Path(temporary) / "run"
        save_imported(run / "step_0", model, info, bank, figures, request.source)
        write_atomic(run / "config.yaml", dump_config(parse_config(tree, "adopt")).encode())
        metrics = {k: v for k, v in read_json(run / "step_0/metrics.json").items() if k not in ("confusion", "files")}
        about = {"method": method, "dataset": "folder", "task": "learn", "setting": "overlap", "seed": 0}
        about |= {"compat": None, "crop": crop, "precision": "32-true", "steps": 1}
        about |= {"notes": [f"adopted from {request.source}"]}
        write_json(run / "results.json", {"run": about, "steps": [metrics]})
        if out.is_dir():
            out.rmdir()
        run.rename(out)
    return request.out / "step_0"
