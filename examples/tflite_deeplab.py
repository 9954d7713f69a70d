"""A real network to adopt: a quantised TFLite file of DeepLabV3-MobileNetV2, turned into a network of transformers.

    pip install tflite 'starseg[transformers]'
    python examples/tflite_deeplab.py deeplabv3_mnv2_pascal_quant.tflite --out deeplab_voc
    starseg adopt deeplab_voc --out voc

The file is that of google-coral/test_data (Apache-2.0): 21 classes of PASCAL VOC, weights and activations of 8 bits.
Weights are dequantised as scale x (value - zero point); batch norms are folded into them. Activations are not
rounded to 8 bits here, so that the predictions differ a little from those of the file. `--check PHOTOS` measures how
much; it needs the package ai-edge-litert, which runs the file.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tflite
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

from starseg.data.datasets.voc import VOC_NAMES

SIDE = 513
MEAN = STD = 128 / 255  # the input's scale is 1/128, its zero point 128


def _tensor(model: tflite.Model, index: int) -> np.ndarray:
    """Return a constant of the file as float32."""
    graph = model.Subgraphs(0)
    tensor = graph.Tensors(index)
    kind = {tflite.TensorType.UINT8: np.uint8, tflite.TensorType.INT32: np.int32}[tensor.Type()]
    data = model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes()
    values = np.frombuffer(data, kind).reshape(tensor.ShapeAsNumpy()).astype(np.float64)
    quantisation = tensor.Quantization()
    return ((values - quantisation.ZeroPoint(0)) * quantisation.Scale(0)).astype(np.float32)


def convolutions(path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weight [O, I, h, w] and bias [O] of the convolutions of a file, in the order in which they run."""
    model = tflite.Model.GetRootAs(path.read_bytes(), 0)
    graph = model.Subgraphs(0)
    kinds = (tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOperator.DEPTHWISE_CONV_2D)
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        codes = model.OperatorCodes(operator.OpcodeIndex())
        code = max(codes.BuiltinCode(), codes.DeprecatedBuiltinCode())
        if code in kinds:
            weight, bias = (torch.from_numpy(_tensor(model, index)) for index in operator.InputsAsNumpy()[1:])
            # [O, h, w, I], and of a depthwise convolution [1, h, w, O].
            yield weight.permute((0, 3, 1, 2) if code == kinds[0] else (3, 0, 1, 2)).contiguous(), bias


def _layers(network: MobileNetV2ForSemanticSegmentation) -> list[nn.Module]:
    """Return the layers with a convolution, in the order of the file."""
    body, head = network.mobilenet_v2, network.segmentation_head
    stem = [body.conv_stem.first_conv, body.conv_stem.conv_3x3, body.conv_stem.reduce_1x1]
    blocks = [layer for block in body.layer for layer in (block.expand_1x1, block.conv_3x3, block.reduce_1x1)]
    return [*stem, *blocks, head.conv_aspp, head.conv_pool, head.conv_projection, head.classifier]


@torch.no_grad()
def convert(path: Path) -> MobileNetV2ForSemanticSegmentation:
    """Return a file's network."""
    names = dict(enumerate(VOC_NAMES))
    config = MobileNetV2Config(output_stride=16, id2label=names, label2id={name: i for i, name in names.items()})
    network = MobileNetV2ForSemanticSegmentation(config).eval()
    layers, found = _layers(network), list(convolutions(path))
    if len(layers) != len(found):
        raise SystemExit(f"{path}: has {len(found)} convolutions, DeepLabV3-MobileNetV2 has {len(layers)}")
    for layer, (weight, bias) in zip(layers, found, strict=True):
        assert layer.convolution.weight.shape == weight.shape
        layer.convolution.weight.copy_(weight)
        norm = layer.normalization
        if norm is None:
            layer.convolution.bias.copy_(bias)
        else:  # the identity, with the bias
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.bias.copy_(bias)
    network.mobilenet_v2.conv_1x1.convolution.weight.zero_()  # not used for segmentation
    return network


@torch.no_grad()
def check(path: Path, network: nn.Module, photos: Path) -> None:
    """Print the share of pixels with the class that the file itself predicts, on photos of 513 x 513 pixels."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    given, returned = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    same = objects = both = pixels = 0
    files = sorted(file for file in photos.iterdir() if file.suffix in (".jpg", ".png"))
    for file in files:
        image = np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE)))
        interpreter.set_tensor(given["index"], image[None])
        interpreter.invoke()
        expected = torch.from_numpy(interpreter.get_tensor(returned["index"])[0].astype(np.int64))
        tensor = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 - MEAN) / STD
        logits = nn.functional.interpolate(network(tensor).logits, (SIDE, SIDE), mode="bilinear", align_corners=True)
        own = logits.argmax(1)[0]
        same, pixels = same + int((own == expected).sum()), pixels + own.numel()
        objects += int(((own > 0) | (expected > 0)).sum())
        both += int(((own > 0) & (own == expected)).sum())
    print(
        f"{len(files)} photos: the same class on {100 * same / pixels:.2f} % of the pixels, and on "
        f"{100 * both / max(1, objects):.2f} % of those where either finds an object"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of transformers to write")
    parser.add_argument("--check", type=Path, help="folder of photos on which to compare with the file")
    arguments = parser.parse_args()
    network = convert(arguments.file)
    network.save_pretrained(arguments.out)
    processor = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "size": {"shortest_edge": SIDE}}
    (arguments.out / "preprocessor_config.json").write_text(json.dumps(processor))
    print(f"written: {arguments.out}")
    if arguments.check:
        check(arguments.file, network, arguments.check)


if __name__ == "__main__":
    main()
