"""A frozen encoder that the network in training has in common with the previous one, and that runs once per batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from starseg.models import Segmenter
from starseg.models.encoders import Encoder


def common_encoder(model: Segmenter, old: Segmenter | None) -> tuple[Encoder, ...]:
    """Return the encoders of both networks if that of the first is frozen and equals the other; else nothing."""
    if old is None or not model.encoder_frozen:
        return ()
    own, other = model.encoder.state_dict(), old.encoder.state_dict()
    equal = own.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in own.items())
    return (model.encoder, old.encoder) if equal else ()


@contextmanager
def computed_once(encoders: Sequence[Encoder]) -> Iterator[None]:
    """Within the context, let equal encoders compute the maps of the same images only once.

    They compute them again if the images or the maps have changed in place, or in another precision.
    """
    kept: list[Tensor] = []  # the images, so that no others can take their place in memory
    maps: list[Tensor] = []
    state: object = None

    def current(images: Tensor) -> object:
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        versions = [tensor._version for tensor in (images, *maps)]
        return images.data_ptr(), images.shape, images.stride(), autocast, versions

    def forward(images: Tensor) -> list[Tensor]:
        nonlocal state
        if current(images) != state:
            kept[:], maps[:] = [images], type(encoders[0]).forward(encoders[0], images)
            state = current(images)
        return list(maps)

    for encoder in encoders:
        encoder.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward
