"""`starseg.adopt`: a step directory of a network in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from starseg.adoption.adopt import AdoptRequest, adopt_network, check_request
from starseg.adoption.sources import Foreign, Options, describe_module, describe_transformers
from starseg.errors import UserError
from starseg.models import Architecture
from starseg.models.builders import FILES, load_plugins
from starseg.models.foreign import huggingface, module

_JSON = (str, int, float, bool, type(None), list, dict)


def adopt(
    network: nn.Module,
    out: str | Path,
    classes: Sequence[str] | str | None = None,
    *,
    classifier: str | None = None,
    features: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    background: bool = True,
    multiple: int | None = None,
    bgr: bool = False,
    crop: int | None = None,
    photos: str | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Make a step directory of any semantic segmentation network (docs/adopt.md).

    Other processes build the network again with the function that ``starseg.register_model`` registers; its name is
    found where it is the network's class, or the only one that builds a network with the same tensors. A network of
    transformers needs none.

    Args:
        network: takes normalised images [N, 3, H, W] and returns logits [N, outputs, h, w], alone, first in a tuple,
            or as "out" or "logits". It is left as it is.
        out: run directory to make.
        classes: names of the outputs, the background first.
        classifier: name of the last convolution, 1x1 or 3x3; by default the last one in the network.
        features: name of a layer whose output becomes a further map, beside the classifier's input, for methods that
            distil maps, and for the description of new classes.
        mean: of RGB pixels in 0..1; by default ImageNet's.
        std: likewise.
        background: whether the first output is the background.
        multiple: divisor that the sides of images must have.
        bgr: whether the network takes BGR images.
        crop: side in pixels of the images at which the network predicts.
        photos: a folder or pattern of unlabelled images, from which a prototype bank is measured.
        model: name under which the function is registered.
        options: keyword arguments of the function, plain JSON values.

    Returns:
        The step directory.

    Raises:
        UserError: the network cannot be adopted or built again, or does not predict what the original predicts.
    """
    names = classes if classes is None or isinstance(classes, str) else ",".join(classes)
    request = AdoptRequest(
        *(type(network).__name__, Path(out), None, names, background, classifier),
        mean=tuple(mean) if mean is not None else None,
        std=tuple(std) if std is not None else None,
        crop=crop,
        photos=photos,
        features=features,
        multiple=multiple,
        bgr=bgr,
    )
    if not isinstance(network, nn.Module):
        raise UserError(f"starseg.adopt: expected a torch.nn.Module, got a {type(network).__name__}")
    check_request(request)
    console = Console()
    known = Options(None, len(names.split(",")) if names else None, classifier, features, multiple)
    foreign = _copy(network, known, model, dict(options or {}), console)
    return adopt_network(foreign, request, console)


def _copy(network: nn.Module, known: Options, name: str | None, config: dict[str, Any], console: Console) -> Foreign:
    """Build the network again, as other processes will, and copy its weights."""
    kind = type(network).__name__
    if name is None and type(network).__module__.startswith("transformers."):
        huggingface.check_class(kind, known.classifier)
        own: Any = network
        copied = describe_transformers(type(network)(own.config), None, known.classifier)
        copied.network.load_state_dict(network.state_dict())
        return copied
    if known.classes is None:
        raise UserError(f"starseg.adopt: {kind} does not name its outputs; give classes=[...], the background first")
    if not all(isinstance(value, _JSON) for value in config.values()):
        raise UserError(f"options: expected plain JSON values, which model.json can hold, got {config}")
    load_plugins()
    name = name or _find(network, known.classes, config)
    file = module.source_file(module.find_model(name))
    fresh = module.create(Architecture(name, "", 1, "module", {"config": config}), known.classes)
    if (wrong := module.misfit(fresh, network.state_dict())) is not None:
        raise UserError(
            f"model {name!r} builds another network than this {kind}: the first tensor that is missing or of another "
            f"shape is {wrong}; register the function that builds it, or give its options={{...}}"
        )
    fresh.load_state_dict(network.state_dict())
    _check_same(network, fresh, name)
    if file is not None:
        console.print(f"note: other commands find {name!r} with {FILES}={file}", soft_wrap=True)
    return describe_module(fresh.float(), name, known.classes, known, config)


def _find(network: nn.Module, outputs: int, config: dict[str, Any]) -> str:
    """Return the name of the registered function that builds a network.

    Raises:
        UserError: none does, or several do.
    """
    if found := [name for name, build in module.MODELS.items() if build is type(network)]:
        return found[0]
    fitting = []
    for name in module.MODELS:
        try:
            fresh = module.create(Architecture(name, "", 1, "module", {"config": config}), outputs)
        except UserError:
            continue
        if type(fresh) is type(network) and module.misfit(fresh, network.state_dict()) is None:
            fitting.append(name)
    if len(fitting) == 1:
        return fitting[0]
    kind = type(network).__name__
    if fitting:
        raise UserError(f"starseg.adopt: {' and '.join(fitting)} build the same tensors; give model=...")
    raise UserError(
        f"starseg.adopt: no registered function builds this {kind}, which other processes need; put one into a Python "
        f"file, as in {module.HOW}, and name the file in {FILES}, or import it"
    )


@torch.no_grad()
def _check_same(network: nn.Module, fresh: nn.Module, name: str) -> None:
    """Check that settings outside the weights (dilations, activations) are equal too, by their printed form."""
    if (mine := repr(network)) != (other := repr(fresh)):
        lines = zip(mine.splitlines(), other.splitlines(), strict=False)
        first = next(((a.strip(), b.strip()) for a, b in lines if a != b), ("", ""))
        raise UserError(
            f"model {name!r} builds another network than this {type(network).__name__}: {first[1]} instead of "
            f"{first[0]}; register the function that builds it, or give its options={{...}}"
        )
