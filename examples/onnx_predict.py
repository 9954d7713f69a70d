"""Segment images with an exported model, using onnxruntime, numpy and pillow but not starseg.

python onnx_predict.py model.onnx photo.jpg another.png      writes photo_mask.png and another_mask.png

If one of the masks exists already, the program stops without writing any. Files that cannot be read are reported, and
the exit code is then 1.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

COLOURS = np.random.default_rng(1).integers(40, 256, (256, 3), np.uint8)
COLOURS[0] = 0


def read(file: str) -> Image.Image:
    """Read an image as upright RGB; as in training, transparency becomes white and 16-bit values keep the high byte."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def main(model: str, *files: str) -> int:
    failed = 0
    targets = {Path(file): Path(file).with_name(f"{Path(file).stem}_mask.png") for file in files}
    if there := [str(target) for target in targets.values() if target.exists()]:
        sys.exit(f"{there[0]} is there already and would be overwritten; move it away")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    names = dict(zip(json.loads(about["dataset_ids"]), json.loads(about["classes"]), strict=True))
    crop, stride = int(about["crop"]), int(about["output_stride"])
    for file, target in targets.items():
        try:
            image = read(file)
        except Exception as error:  # Pillow's decoders raise many exception types on damaged files
            failed = 1
            print(f"{file}: cannot read this image ({getattr(error, 'strerror', None) or error})", file=sys.stderr)
            continue
        factor = crop / min(image.size) / stride
        size = [max(1, round(side * factor)) * stride for side in image.size]
        if about.get("size") == "crop":
            size = [crop, crop]
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        (mask,) = session.run(["mask"], {"images": pixels.transpose(2, 0, 1)[None]})
        result = Image.fromarray(mask[0]).resize(image.size, Image.Resampling.NEAREST)
        result.putpalette(COLOURS.tobytes())
        result.save(target)
        ids, counts = np.unique(mask, return_counts=True)
        shares = ", ".join(f"{names[i]} {100 * n / mask.size:.0f} %" for i, n in zip(ids, counts, strict=True))
        print(f"{target}: {shares}")
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if main(*sys.argv[1:]):
        sys.exit(1)
