"""Where an adopted network comes from: `torchvision:NAME`, `smp:CLASS[:ENCODER]`, or a folder of a library's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from starseg.adoption.weights import count_outputs, load_weights, read_weights
from starseg.errors import UserError
from starseg.models import Architecture
from starseg.models.foreign import huggingface, smp
from starseg.models.foreign import torchvision as tv
from starseg.utils.files import read_json

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_FORMS = (
    "torchvision:NAME, smp:CLASS or smp:CLASS:ENCODER, or a folder that save_pretrained of "
    "segmentation_models.pytorch or transformers wrote"
)


@dataclass(frozen=True)
class Options:
    """What the user says about a network.

    Attributes:
        weights: a file, or the name of torchvision weights.
        classes: number of given classes; None if none are given.
        classifier: name of the classifier, if it is not the library's usual one.
    """

    weights: str | None = None
    classes: int | None = None
    classifier: str | None = None


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
    if folder.is_dir():
        return _open_folder(folder, options)
    library, _, name = source.partition(":")
    if library == "torchvision":
        return _open_torchvision(source, name, options)
    if library == "smp":
        kind, _, encoder = name.partition(":")
        return _open_smp(source, kind, encoder or "resnet34", {}, options)
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


def _architecture(encoder: str, decoder: str, builder: str, outputs: int, **options: Any) -> Architecture:
    given = {key: value for key, value in options.items() if value}
    return Architecture(encoder, decoder, 1, builder, {"outputs": outputs, **IMAGENET, **given})


def _open_torchvision(source: str, name: str, options: Options) -> Foreign:
    known: Sequence[str] | None = None
    state: Mapping[str, Tensor] | None
    if name in tv.names() and (weights := tv.named_weights(name, options.weights)) is not None:
        known = weights.meta["categories"]
        outputs, state = len(known), tv.download(weights)
    else:
        layers = (tv.LOW,) if name.startswith("lraspp") else (tv.CLASSIFIER,)
        tv.check_name(name)
        state, outputs = _outputs(options, layers, source)
    architecture = _architecture(name, "", "torchvision", outputs, classifier=options.classifier)
    network = tv.create(architecture, outputs)
    if state is not None:
        load_weights(network, state, source)
    return Foreign(network, architecture, known)


def _open_smp(source: str, kind: str, encoder: str, config: dict[str, Any], options: Options) -> Foreign:
    smp.library()
    state, outputs = _outputs(options, (smp.CLASSIFIER,), source)
    architecture = _architecture(encoder, kind, "smp", outputs, config=config, classifier=options.classifier)
    network = smp.create(architecture, outputs)
    if state is not None:
        load_weights(network, state, source)
    note = "segmentation_models.pytorch stores no normalisation: ImageNet's mean and std are taken (--mean, --std)"
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
    own = ("_model_class", "encoder_name", "encoder_weights", "classes", "in_channels", "aux_params")
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
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    missing = [key for key in found["missing_keys"] if "auxiliary" not in key]
    if missing or found["mismatched_keys"]:
        names = [*missing, *(key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"])]
        raise UserError(
            f"{folder}: its weights do not fit {kind}: {len(names)} tensors are missing or of another shape, the first "
            f"is {names[0]}; was only the encoder trained?"
        )
    config = json.loads(network.config.to_json_string(use_diff=False))
    labels = network.config.id2label
    names = [str(labels[i]) for i in range(network.config.num_labels)]
    mean, std, crop = _read_processor(folder)
    architecture = _architecture(
        *(network.config.model_type, kind, "transformers", len(names)),
        **{"config": config, "mean": mean, "std": std, "classifier": options.classifier},
    )
    note = () if mean else ("no preprocessor_config.json: ImageNet's mean and std are taken (--mean, --std)",)
    return Foreign(network.float(), architecture, names, crop, note)


def _read_processor(folder: Path) -> tuple[list[float] | None, list[float] | None, int | None]:
    """Return mean and std for pixels in 0..1, and the size of images, from preprocessor_config.json if there is one.

    Raises:
        UserError: the network wants BGR images.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, None, None
    processor = read_json(path)
    if processor.get("do_flip_channel_order"):
        raise UserError(
            f"{path}: do_flip_channel_order: the network wants BGR images; only RGB networks can be adopted"
        )
    # x = (255 p r - mean) / std for a pixel p in 0..1 and the rescale factor r.
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255.0
    normalised = processor.get("do_normalize", True)
    mean = [m / scale for m in (processor.get("image_mean", IMAGENET["mean"]) if normalised else [0.0] * 3)]
    std = [s / scale for s in (processor.get("image_std", IMAGENET["std"]) if normalised else [1.0] * 3)]
    size = processor.get("size")
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return mean, std, int(size) if size else None
