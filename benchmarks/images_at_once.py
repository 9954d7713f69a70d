"""Measure CPU inference time by the number of images processed at once (docs/performance.md).

Usage: python benchmarks/images_at_once.py
"""

import torch

from starseg.bench.timing import alternate
from starseg.models import Architecture, Segmenter, make_network

# Network, side of the images in pixels, numbers of images processed at once.
CASES = (
    ("resnet101", 512, (4, 1)),
    ("tf_efficientnet_lite0", 512, (4, 1)),
    ("tf_efficientnet_lite0", 192, (24, 7, 1)),
)


@torch.inference_mode()
def main() -> None:
    for name, side, sizes in CASES:
        model = make_network(Architecture(name), [20]).eval()
        images = model.normalize(torch.randint(0, 256, (max(sizes), 3, side, side), dtype=torch.uint8))

        def run(at_once: int, model: Segmenter = model, images: torch.Tensor = images) -> None:
            for part in images.split(at_once):
                model(part)

        seconds = alternate([lambda n=n: run(n) for n in sizes], 5)
        shown = (f"{1000 * s / max(sizes):.1f} ms ({n} at once)" for n, s in zip(sizes, seconds, strict=True))
        print(f"{name}, {side} px, an image: {', '.join(shown)}")


if __name__ == "__main__":
    main()
