"""Measure forward and backward passes of a later step whose frozen encoder is also the previous network's.

Usage: python benchmarks/common_encoder.py

Both networks pass over the same images, the new one with gradients of its decoder and heads, in bf16. Compares running
the encoder for each of them with running it once (starseg.engine.shared).
"""

import torch

from starseg.bench.timing import alternate
from starseg.engine.shared import common_encoder, computed_once
from starseg.models import Architecture, make_network

# Network, side of the images in pixels, images of a batch.
CASES = (("tf_efficientnet_lite0", 192, 16), ("resnet101", 256, 4))


def measure(name: str, side: int, batch: int) -> list[float]:
    """Return the seconds with the encoder run twice and once."""
    old, new = (make_network(Architecture(name), [15]) for _ in range(2))
    new.load_state_dict(old.state_dict())
    new.add_head(1)
    new.freeze_encoder()
    old.eval().requires_grad_(False)
    images = new.train().normalize(torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8))
    encoders = common_encoder(new, old)
    assert encoders, "the encoders are equal"

    def run(once: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16), computed_once(encoders if once else ()):
            with torch.no_grad():
                target = old(images).logits
            new(images).logits[:, : target.shape[1]].sub(target).square().mean().backward()

    return alternate([lambda: run(False), lambda: run(True)], 5)


def main() -> None:
    for name, side, batch in CASES:
        twice, once = measure(name, side, batch)
        print(f"{name}, {batch} images of {side} px: {twice:.3f} s, encoder once {once:.3f} s ({twice / once:.2f} x)")


if __name__ == "__main__":
    main()
