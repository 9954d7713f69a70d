"""Export of a step to ONNX; the file is kept only if it agrees with torch."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize as resize_image

from starseg.errors import UserError
from starseg.inference.files import find_images
from starseg.inference.predictor import Predictor, fitted_size, load, to_tensor
from starseg.models.foreign import NEVER
from starseg.ops.bilinear import resize
from starseg.report.testset import run_data
from starseg.utils.files import write_atomic

OPSET = 18
_CHECKED, _CALIBRATED = 8, 32
# Of the largest logit; float32 kernels differ by some 1e-6.
_LOGIT_TOLERANCE, _MASK_AGREEMENT = 1e-3, 0.999


class Graph(nn.Module):
    """Graph of the ONNX file: logits and dataset ids at the input's size, from raw pixels."""

    ids: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.model, self.rule = predictor.model, predictor.rule
        kind = torch.uint8 if max(predictor.dataset_ids) < 256 else torch.int32
        self.register_buffer("ids", torch.tensor(predictor.dataset_ids, dtype=kind))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [N, C, H, W] and mask [N, H, W] uint8 or int32 of images [N, 3, H, W] uint8."""
        logits = resize(self.model(self.model.normalize(images)).logits, images.shape[-2:])
        return logits, self.ids[self.rule(logits).long()]


@dataclass(frozen=True)
class Agreement:
    """Agreement between an ONNX file and torch.

    Attributes:
        logits: largest absolute difference.
        largest: largest absolute logit, for scale.
        masks: share of the pixels with the same class, 0..1.
        images: how many were compared.
        milliseconds: of onnxruntime for an image.
    """

    logits: float
    largest: float
    masks: float
    images: int
    milliseconds: float

    def __str__(self) -> str:
        return (
            f"max |logit difference| {self.logits:.2g} (largest logit {self.largest:.3g}), "
            f"masks agree on {100 * self.masks:.3f} % of the pixels; {self.images} images, "
            f"{self.milliseconds:.0f} ms each in onnxruntime"
        )


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"export needs the package {error.name}, which is missing; pip install 'starseg[export]'"
        ) from error
    onnxruntime.set_default_logger_severity(3)
    return onnx, onnxruntime


def sample_images(step_dir: Path, given: Sequence[str], count: int) -> list[Tensor]:
    """Return images for checks and calibration: the given ones, or test images of the run's data set, or none.

    Returns:
        At most ``count`` uint8 [3, H, W].
    """
    if given:
        files = find_images(given)
    else:
        try:
            _, _, dataset, _ = run_data(step_dir.resolve().parent)
            files = list(dataset.test.images)
        except UserError:
            return []
    picked = np.unique(np.linspace(0, len(files) - 1, count).astype(int))
    return [to_tensor(files[i]) for i in picked]


def _fitted(predictor: Predictor, images: Sequence[Tensor]) -> list[np.ndarray]:
    """Resize images [1, 3, H, W] as ``starseg predict`` does before the network, or to the file's own size."""
    crop, model = predictor.crop, predictor.model
    if not model.encoder.convolutional:
        sizes = [(crop, crop)] * len(images)
    else:
        sizes = [fitted_size(image.shape[1], image.shape[2], crop, model.multiple) for image in images]
    return [
        resize_image(image, list(size), antialias=True)[None].numpy() for image, size in zip(images, sizes, strict=True)
    ]


def _odd(predictor: Predictor, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first image twice in a batch and, if the file takes it, in sizes that are not multiples of the stride."""
    twice = np.concatenate([batches[0], batches[0][..., ::-1]])
    if not predictor.model.encoder.convolutional:
        return [twice]
    first = torch.from_numpy(batches[0])
    height, width = first.shape[-2:]
    other = resize_image(first, [height * 3 // 4 + 5, width + 27], antialias=True).numpy()
    return [other, twice]


def write_onnx(predictor: Predictor, path: Path) -> None:
    """Trace the graph with a dynamic batch size and, for a convolutional encoder, dynamic height and width.

    A transformer's position embeddings and windows are computed for the size of the training crops.

    torch's exporter by tracing takes a second and gives named dynamic sizes; the one by ``torch.export`` takes minutes
    over the size arithmetic of backbones with "same" padding.
    """
    graph, crop = copy.deepcopy(Graph(predictor)).eval(), predictor.crop
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}, "mask": {0: "batch"}}
    if graph.model.encoder.convolutional:
        example = torch.zeros(2, 3, crop, crop + graph.model.multiple, dtype=torch.uint8)
        for name, first in (("images", 2), ("logits", 2), ("mask", 1)):
            axes[name] |= {first: "height", first + 1: "width"}
    else:
        example = torch.zeros(2, 3, crop, crop, dtype=torch.uint8)
        graph.model.encoder.fix_size(crop)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits", "mask"],
            dynamic_axes=axes,
        )


def _metadata(predictor: Predictor, int8: bool) -> dict[str, str]:
    info, model = predictor.info, predictor.model
    free = model.encoder.convolutional
    rule = getattr(predictor.rule, "func", predictor.rule)
    values = {
        "classes": predictor.classes,
        "dataset_ids": predictor.dataset_ids,
        "input": "uint8 RGB [batch, 3, height, width], not normalised; "
        + ("short side as `crop`" if free else "height and width as `crop`"),
        "size": "any" if free else "crop",
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "normalisation": "(pixel / 255 - mean) / std, done in the graph",
        "crop": predictor.crop,
        "output_stride": model.multiple,
        "rule": (inspect.getdoc(rule) or info.method).splitlines()[0],
        "architecture": asdict(info.architecture),
        "source": {k: getattr(info, k) for k in ("method", "dataset", "task", "setting", "step", "seed")},
        "int8": int8,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _quantize(source: Path, target: Path, batches: Sequence[np.ndarray]) -> None:
    """Quantise the convolutions statically: int8 weights per channel, uint8 activations.

    Weights take 7 bits, as products of 8 bits saturate on processors without VNNI. Depthwise convolutions stay float:
    they hold few weights, and quantised they cost accuracy and time.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quant_pre_process, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch}

    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    nodes = onnx.load(prepared).graph.node
    depthwise = [n.name for n in nodes if any(a.name == "group" and a.i > 1 for a in n.attribute)]
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=depthwise,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def largest_logit(logits: Tensor) -> Tensor:
    """Return the largest absolute logit, apart from that of a background that is never predicted."""
    return torch.where(logits > NEVER / 2, logits, 0).abs().max()


def compare(
    path: Path, reference: Callable[[Tensor], tuple[Tensor, Tensor]], batches: Sequence[np.ndarray]
) -> Agreement:
    """Run an ONNX file and torch on the same uint8 batches [N, 3, H, W]."""
    _, onnxruntime = _packages()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = largest = seconds = 0.0
    same = pixels = 0
    for batch in batches:
        with torch.inference_mode():
            expected, mask = (t.numpy() for t in reference(torch.from_numpy(batch)))
        start = time.monotonic()
        got, got_mask = session.run(["logits", "mask"], {"images": batch})
        seconds += time.monotonic() - start
        if got.shape != expected.shape or got_mask.shape != mask.shape:
            return Agreement(float("inf"), largest, 0.0, len(batches), 0.0)
        logits = max(logits, float(np.abs(got - expected).max()))
        largest = max(largest, float(largest_logit(torch.from_numpy(expected))))
        same, pixels = same + int((got_mask == mask).sum()), pixels + mask.size
    images = sum(map(len, batches))
    return Agreement(logits, largest, same / pixels, images, 1000 * seconds / images)


def export_onnx(
    step_dir: Path, out: Path, console: Console, int8: bool = False, images: Sequence[str] = ()
) -> Agreement:
    """Export a step to ONNX and compare it with torch; a float file that disagrees is deleted.

    Args:
        step_dir: what to export.
        out: the .onnx file.
        console: where the agreement is printed.
        int8: quantise the convolutions, calibrated on half of the sample images; agreement is measured on the others.
        images: files, folders or patterns to check (and calibrate) on; by default test images of the run's data set,
            and where that is gone noise.

    Returns:
        The agreement of the file at ``out``.

    Raises:
        UserError: a package is missing, the file disagrees, or ``int8`` without images.
    """
    onnx, _ = _packages()
    predictor = load(step_dir, "cpu", "32")
    sample = sample_images(step_dir, images, _CALIBRATED + _CHECKED if int8 else _CHECKED)
    if int8 and len(sample) < 4:
        raise UserError(f"--int8 is calibrated on images, found {len(sample)}; give 4 or more with --images")
    if not sample:
        console.print("no images at hand (give some with --images): checked on noise", highlight=False)
        sample = list(torch.randint(0, 256, (2, 3, predictor.crop, predictor.crop * 5 // 4), dtype=torch.uint8))
    batches = _fitted(predictor, sample)
    checked, calibrated = (batches[::2][:_CHECKED], batches[1::2]) if int8 else (batches, [])
    out.parent.mkdir(parents=True, exist_ok=True)
    graph = Graph(predictor).eval()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        path = Path(folder) / "float.onnx"
        write_onnx(predictor, path)
        result = compare(path, graph, [*checked, *_odd(predictor, checked)])
        if result.logits > _LOGIT_TOLERANCE * max(1, result.largest) or result.masks < _MASK_AGREEMENT:
            raise UserError(f"{step_dir}: the ONNX file disagrees with torch, so it was not kept: {result}")
        console.print(f"float32: {path.stat().st_size / 2**20:.1f} MB, {result}", highlight=False, soft_wrap=True)
        if int8:
            float_path, path = path, Path(folder) / "int8.onnx"
            _quantize(float_path, path, calibrated)
            result = compare(path, graph, checked)
            console.print(f"int8: {path.stat().st_size / 2**20:.1f} MB, {result}", highlight=False, soft_wrap=True)
        model = onnx.load(path)
        onnx.helper.set_model_props(model, _metadata(predictor, int8))
        write_atomic(out, model.SerializeToString())
    console.print(f"model: {out}", highlight=False, soft_wrap=True)
    return result
