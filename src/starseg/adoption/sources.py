"""Where an adopted network comes from.

A source is `torchvision:NAME`, `smp:CLASS[:ENCODER]`, `model:NAME`, `hub:OWNER/NAME`, or a folder of a library's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from starseg.adoption.hub import download
from starseg.adoption.weights import count_outputs, load_weights, read_weights
from starseg.errors import UserError
from starseg.models import Architecture
from starseg.models.foreign import huggingface, module, smp
from starseg.models.foreign import torchvision as tv
from starseg.utils.files import read_json

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_FORMS = (
    "torchvision:NAME, smp:CLASS or smp:CLASS:ENCODER, model:NAME of STARSEG_MODELS, hub:OWNER/NAME, or a folder that "
    "save_pretrained of segmentation_models.pytorch or transformers wrote"
)


@dataclass(frozen=True)
class Options:
    """What the user says about a network.

    Attributes:
        weights: a file, or the name of torchvision weights.
        classes: number of given classes; None if none are given.
        classifier: name of the classifier, if it is not the library's usual one.
        features: name of a layer whose output becomes a further map of the encoder; for `model:NAME`.
        multiple: divisor that the sides of images must have; for `model:NAME`.
    """

    weights: str | None = None
    classes: int | None = None
    classifier: str | None = None
    features: str | None = None
    multiple: int | None = None


@dataclass(frozen=True)
class Foreign:
    """A network of another library, with its weights.

    Attributes:
        network: the network.
        architecture: describes it, with a stride that is not known yet.
        names: names of its outputs, if its files tell.
        crop: side in pixels of the images that it was made for, if its files tell.
        notes: what the user should know.
    """

    network: nn.Module
    architecture: Architecture
    names: Sequence[str] | None = None
    crop: int | None = None
    notes: tuple[str, ...] = ()


def open_source(source: str, options: Options) -> Foreign:
    """Open the network that ``source`` names.

    Raises:
        UserError: no such network, an optional package is missing, or files are missing or do not fit.
    """
    folder = Path(source)
    library, _, name = source.partition(":")
    for option in ("features", "multiple"):
        if library != "model" and getattr(options, option) is not None:
            raise UserError(f"--{option}: {source} is split as its library demands; only model:NAME takes --{option}")
    if folder.is_dir():
        return _open_folder(folder, options)
    if library == "model":
        return _open_model(source, name, options)
    if library == "hub":
        return _open_folder(download(name), options)
    if library == "torchvision":
        return _open_torchvision(source, name, options)
    if library == "smp":
        kind, _, encoder = name.partition(":")
        return _open_smp(source, kind, encoder or "resnet34", {}, options)
    if folder.suffix == ".tflite" or folder.suffix == ".onnx":
        raise UserError(
            f"{source}: {folder.suffix} files hold a graph for prediction, often quantised; give the float network in "
            f"PyTorch that it was made of, as {_FORMS}"
        )
    if folder.is_file():
        raise UserError(f"{source}: is a file of weights alone; give {_FORMS} as SOURCE, and the file as --weights")
    raise UserError(f"{source}: no such folder or library; expected {_FORMS}")


def _outputs(options: Options, layers: tuple[str, ...], source: str) -> tuple[dict[str, Tensor] | None, int]:
    """Read the weight file, if there is one, and return it with the number of outputs."""
    if options.weights:
        path = Path(options.weights)
        state = read_weights(path)
        return state, count_outputs(state, (options.classifier,) if options.classifier else layers, path)
    if options.classes is None:
        raise UserError(f"{source}: give --weights FILE, or --classes for a network with random weights")
    return None, options.classes


def _architecture(encoder: str, decoder: str, builder: str, outputs: int, options: Mapping[str, Any]) -> Architecture:
    """Return an architecture whose stride is not known yet, with those options that have a value."""
    given = {key: value for key, value in options.items() if value}
    return Architecture(encoder, decoder, 1, builder, {"outputs": outputs, **IMAGENET, **given})


def _open_torchvision(source: str, name: str, options: Options) -> Foreign:
    known: Sequence[str] | None = None
    state: Mapping[str, Tensor] | None
    if name in tv.names() and (weights := tv.named_weights(name, options.weights)) is not None:
        known = weights.meta["categories"]
        outputs, state = len(known), tv.download(weights)
    else:
        layers: tuple[str, ...] = (tv.LOW,) if name.startswith("lraspp") else (tv.CLASSIFIER,)
        tv.check_name(name)
        state, outputs = _outputs(options, layers, source)
    architecture = _architecture(name, "", "torchvision", outputs, {"classifier": options.classifier})
    network = tv.create(architecture, outputs)
    if state is not None:
        load_weights(network, state, source)
    return Foreign(network, architecture, known)


def _open_smp(source: str, kind: str, encoder: str, config: dict[str, Any], options: Options) -> Foreign:
    smp.library()
    state, outputs = _outputs(options, (smp.CLASSIFIER, smp.DPT_CLASSIFIER), source)
    architecture = _architecture(encoder, kind, "smp", outputs, {"config": config, "classifier": options.classifier})
    network = smp.create(architecture, outputs)
    if state is not None:
        load_weights(network, state, source)
    note = "segmentation_models.pytorch stores no normalisation: ImageNet's mean and std are taken (--mean, --std)"
    return Foreign(network, architecture, notes=(note,))


def _open_model(source: str, name: str, options: Options) -> Foreign:
    module.find_model(name)
    state = read_weights(Path(options.weights)) if options.weights else None
    if options.classes is None and not (state and options.classifier):
        raise UserError(f"{source}: give --classes, which name its outputs")
    if state and options.classifier:
        outputs = count_outputs(state, (options.classifier,), Path(str(options.weights)))
    else:
        outputs = options.classes or 0
    network = module.create(Architecture(name, "", 1, "module"), outputs)
    if state is not None:
        load_weights(network, state, source)
    return describe_module(network, name, outputs, options)


def describe_module(
    network: nn.Module, name: str, outputs: int, options: Options, config: Mapping[str, Any] | None = None
) -> Foreign:
    """Describe a network that a registered function builds.

    Args:
        network: the network.
        name: of the function.
        outputs: number of outputs.
        options: what the user says about it.
        config: keyword arguments of the function.

    Raises:
        UserError: the name is not registered, or the network has no convolution.
    """
    classifier = options.classifier or module.last_convolution(network, outputs)
    file = module.source_file(module.find_model(name))
    given: dict[str, Any] = {"classifier": classifier, "features": options.features, "multiple": options.multiple}
    given |= {"config": dict(config or {}), "file": Path(file).name if file else None}
    architecture = _architecture(name, "", "module", outputs, given)
    note = "a network of your own: ImageNet's mean and std are taken (--mean, --std)"
    return Foreign(network, architecture, notes=(note,))


def _open_folder(folder: Path, options: Options) -> Foreign:
    path = folder / "config.json"
    if (folder / "model.json").is_file():
        raise UserError(
            f"{folder}: is a step directory of starseg already; `starseg learn` and `predict` take it as it is"
        )
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.json; expected {_FORMS}")
    config = read_json(path)
    if isinstance(config, dict) and "_model_class" in config:
        return _open_smp_folder(folder, config, options)
    if isinstance(config, dict) and config.get("architectures"):
        if quantised := config.get("quantization_config"):
            raise UserError(
                f"{path}: its weights are quantised ({quantised.get('quant_method', 'quantization_config')}), which "
                "cannot be adopted; give the float network it was made of"
            )
        return _open_transformers(folder, str(config["architectures"][0]), options)
    raise UserError(
        f"{path}: names neither _model_class (segmentation_models.pytorch) nor architectures (transformers); expected "
        f"{_FORMS}"
    )


def _open_smp_folder(folder: Path, config: dict[str, Any], options: Options) -> Foreign:
    weights = options.weights or str(folder / "model.safetensors")
    if not Path(weights).is_file():
        raise UserError(f"{folder}: holds no model.safetensors; save it with save_pretrained, or give --weights FILE")
    if config.get("in_channels", 3) != 3:
        raise UserError(f"{folder}: takes images of {config['in_channels']} channels; only RGB networks can be adopted")
    kind, encoder = str(config["_model_class"]), str(config.get("encoder_name", "resnet34"))
    # An activation changes the logits, but not which is the largest.
    own = ("_model_class", "encoder_name", "encoder_weights", "classes", "in_channels", "aux_params", "activation")
    rest = {key: value for key, value in config.items() if key not in own}
    return _open_smp(str(folder), kind, encoder, rest, Options(weights, options.classes, options.classifier))


def _open_transformers(folder: Path, kind: str, options: Options) -> Foreign:
    transformers = huggingface.library()
    huggingface.check_class(kind, options.classifier)
    if options.weights:
        raise UserError(f"--weights: the weights of {folder} lie in it; leave --weights out")
    cls = getattr(transformers, kind, None)
    if cls is None:
        raise UserError(
            f"{kind}: this version of transformers ({transformers.__version__}) has no such class; update it"
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        network, found = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: transformers cannot load it: {said}") from error
    missing = [key for key in found["missing_keys"] if "auxiliary" not in key]
    if missing or found["mismatched_keys"]:
        names = [*missing, *(key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"])]
        raise UserError(
            f"{folder}: its weights do not fit {kind}: {len(names)} tensors are missing or of another shape, the first "
            f"is {names[0]}; was only the encoder trained?"
        )
    return describe_transformers(network, read_processor(folder), options.classifier)


def describe_transformers(network: nn.Module, processor: Mapping[str, Any] | None, classifier: str | None) -> Foreign:
    """Describe a network of transformers.

    Args:
        network: the network.
        processor: settings of its image processor, if they are known.
        classifier: name of the classifier, if it is not the library's usual one.
    """
    model: Any = network
    config = json.loads(model.config.to_json_string(use_diff=False))
    labels = model.config.id2label
    names = [str(labels[i]) for i in range(model.config.num_labels)]
    mean, std, crop = _normalisation(processor) if processor else (None, None, None)
    given = {"config": config, "mean": mean, "std": std, "classifier": classifier, "processor": processor}
    given |= {"bgr": bool(processor and processor.get("do_flip_channel_order"))}
    architecture = _architecture(model.config.model_type, type(network).__name__, "transformers", len(names), given)
    note = () if mean else ("no preprocessor_config.json: ImageNet's mean and std are taken (--mean, --std)",)
    return Foreign(network.float(), architecture, names, crop, note)


def read_processor(folder: Path) -> dict[str, Any] | None:
    """Read preprocessor_config.json of a folder, or None if there is none.

    Raises:
        UserError: it is no dictionary.
    """
    path = folder / "preprocessor_config.json"
    processor = read_json(path) if path.is_file() else None
    if processor is not None and not isinstance(processor, dict):
        raise UserError(f"{path}: expected the settings of an image processor, got a {type(processor).__name__}")
    return processor


def _normalisation(processor: Mapping[str, Any]) -> tuple[list[float], list[float], int | None]:
    """Return mean and std of RGB pixels in 0..1, and the size of images, from the settings of an image processor."""
    # x = (255 p r - mean) / std for a pixel p in 0..1 and the rescale factor r.
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255.0
    bgr = processor.get("do_flip_channel_order")
    normalised = processor.get("do_normalize", not bgr)
    mean = [m / scale for m in (processor.get("image_mean", IMAGENET["mean"]) if normalised else [0.0] * 3)]
    std = [s / scale for s in (processor.get("image_std", IMAGENET["std"]) if normalised else [1.0] * 3)]
    size = processor.get("crop_size") if bgr and processor.get("do_center_crop") else processor.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    step = -1 if bgr else 1
    return mean[::step], std[::step], int(size) if size else None
