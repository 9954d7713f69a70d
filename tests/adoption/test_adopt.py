"""Networks of other libraries become step directories that predict what the libraries predict."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import starseg
from adoption.originals import Original, images, randomise
from starseg.adoption.adopt import NEVER, AdoptRequest, adopt
from starseg.cli.main import main
from starseg.engine.checkpoint import load_info, load_model
from starseg.engine.evaluate import evaluate_model, open_weights
from starseg.errors import UserError
from starseg.experiments import compare
from starseg.experiments.plan import train_runs
from starseg.inference.onnx import export_onnx
from starseg.models.foreign.split import Patches, pointwise
from starseg.ops.bilinear import resize
from starseg.utils.files import read_json

QUIET = Console(quiet=True)
Make = Callable[[str], Original]
FAST = ["torchvision:deeplabv3_mobilenet_v3_large", "torchvision:lraspp_mobilenet_v3_large", "smp:Unet", "smp:FPN"]
FAST += ["smp:Segformer", "transformers:Segformer", "transformers:UperNet", "transformers:Beit", "transformers:DPT"]
FAST += ["transformers:MobileViT", "transformers:Mask2Former", "transformers:Eomt"]
SLOW = ["torchvision:deeplabv3_resnet50", "torchvision:fcn_resnet50", "smp:UnetPlusPlus", "smp:MAnet", "smp:Linknet"]
SLOW += ["smp:PAN", "smp:DeepLabV3", "smp:DeepLabV3Plus", "smp:UPerNet", "transformers:MobileNetV2"]
SLOW += ["smp:PSPNet", "smp:DPT", "transformers:MobileViTV2", "transformers:MaskFormer"]
SLOW += [
    "transformers:Data2VecVision",
    "transformers:UperNetSwin",
    "torchvision:deeplabv3_resnet101",
    "torchvision:fcn_resnet101",
]


def _request(original: Original, out: Path) -> AdoptRequest:
    return AdoptRequest(original.source, out, original.weights, original.classes, crop=None)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_predictions_are_those_of_the_library(name: str, original: Make, tmp_path: Path) -> None:
    """The largest differences found were 3e-6 of the largest logit; 1e-4 is asserted."""
    network = original(name)
    pixels = images(network.size)
    expected = network.logits(pixels)
    model, info = load_model(adopt(_request(network, tmp_path / "run"), QUIET))
    with torch.no_grad():
        own = resize(model.predict(pixels).contiguous(), network.size)
    if network.classes is None:
        assert info.names == ["background", "wall", "road", "sky"]
        assert torch.all(own[:, 0] == NEVER)
        own = own[:, 1:]
    assert (own - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (own.argmax(1) == expected.argmax(1)).float().mean() > 0.9999
    assert expected.argmax(1).unique().numel() > 1, "a network that always predicts the same class tests nothing"


def test_an_adopted_network_is_one_like_any_other(
    original: Make, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    network = original("torchvision:lraspp_mobilenet_v3_large")
    arguments = ["adopt", network.source, "--weights", network.weights, "--classes", "background,disc,square,heart"]
    for command in (
        [*arguments, "--crop", "64", "--out", "run"],
        ["predict", "run/step_0", str(shapes / "JPEGImages"), "--out", "found", "--overlays"],
        ["report", "run", "--out", "report.html"],
        ["export", "run/step_0", "--hub", "hub"],
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["starseg", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, capsys.readouterr().err
    output = " ".join(capsys.readouterr().out.split())
    assert "3 classes (disc, square, heart), and background 168 features, one per 8 x 8 pixels; crop 64" in output
    image = next((shapes / "JPEGImages").glob("*.jpg"))
    mask = np.asarray(Image.open(tmp_path / "found" / f"{image.stem}.png"))
    assert np.array_equal(mask, starseg.load(tmp_path / "hub", "cpu").predict(image))
    assert read_json(tmp_path / "run/results.json")["run"]["notes"] == [f"adopted from {network.source}"]


def test_methods_are_compared_on_an_adopted_network(original: Make, tiny: dict, tmp_path: Path) -> None:
    step = adopt(replace(_request(original("torchvision:lraspp_mobilenet_v3_large"), tmp_path / "run"), crop=64), QUIET)
    config, out = tmp_path / "tiny.yaml", tmp_path / "compared"
    config.write_text(json.dumps({key: value for key, value in tiny.items() if key not in ("out", "method")}))
    plan = compare.make_plan(config, ["star", "mib"], [0], out, [f"model.frozen_from={step}"])
    assert not train_runs(plan, QUIET)
    body = load_model(step)[0].encoder.state_dict()
    for method in ("star", "mib"):
        state = load_model(out / f"{method}_seed0" / "step_2")[0].encoder.state_dict()
        assert all(torch.equal(value, body[key]) for key, value in state.items())


def test_an_adopted_network_is_evaluated_on_a_data_set(original: Make, shapes: Path, tmp_path: Path) -> None:
    network = original("torchvision:lraspp_mobilenet_v3_large")
    names = ",".join((shapes / "classes.txt").read_text().split()[:4])
    step = adopt(replace(_request(network, tmp_path / "run"), classes=names, crop=64), QUIET)
    found = evaluate_model(*open_weights(step, ["data.dataset=voc", f"data.root={shapes}"]), QUIET)
    assert list(found["iou"]) == names.split(",")
    assert found["miou"]["all"] is not None


@pytest.mark.parametrize("name", ["torchvision:lraspp_mobilenet_v3_large", "smp:Unet", "transformers:Segformer"])
def test_onnx(name: str, original: Make, tmp_path: Path) -> None:
    """The exporter itself compares the file with torch, also at sizes other than the traced one."""
    pytest.importorskip("onnxruntime")
    step = adopt(replace(_request(original(name), tmp_path / "run"), crop=96), QUIET)
    found = export_onnx(step, tmp_path / "model.onnx", QUIET)
    assert found.logits < 1e-4 * found.largest and found.masks > 0.999


def test_a_network_with_one_output_has_two_classes(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = randomise(smp.Unet("resnet18", encoder_weights=None, classes=1), (64, 64))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "unet.pth")
    request = AdoptRequest("smp:Unet:resnet18", tmp_path / "run", str(tmp_path / "unet.pth"), "background,road")
    model, _ = load_model(adopt(request, QUIET))
    image = images((64, 64), 1).float() / 64 - 2
    with torch.no_grad():
        assert torch.equal(model(image).logits.argmax(1) > 0, network(image)[:, 0] > 0)


def test_names_of_background_and_classes_follow_the_arguments(original: Make, tmp_path: Path) -> None:
    network = original("torchvision:lraspp_mobilenet_v3_large")
    request = replace(_request(network, tmp_path / "run"), classes="other,a,b,c")
    info = load_info(adopt(request, QUIET))
    assert (info.names, info.dataset_ids, info.base, info.head_sizes) == (
        ["other", "a", "b", "c"],
        [0, 1, 2, 3],
        3,
        [3],
    )
    info = load_info(adopt(replace(request, background=False, out=tmp_path / "without"), QUIET))
    assert info.names == ["background", "other", "a", "b", "c"]


def test_weights_of_several_forms_are_read(original: Make, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = original("torchvision:deeplabv3_mobilenet_v3_large")
    state = {f"module.{key}": value for key, value in network.network.state_dict().items()}
    torch.save({"epoch": 3, "model": state | {"module.aux_classifier.4.bias": torch.zeros(4)}}, tmp_path / "a.pth")
    save_file(network.network.state_dict(), tmp_path / "b.safetensors")
    pixels = images((64, 64), 1)
    found = []
    for name in ("a.pth", "b.safetensors"):
        request = replace(_request(network, tmp_path / name[0]), weights=str(tmp_path / name))
        found.append(load_model(adopt(request, QUIET))[0].predict(pixels))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_3x3_classifier_is_pointwise_on_patches() -> None:
    classifier, features = nn.Conv2d(5, 3, 3, padding=1), torch.randn(2, 5, 7, 6)
    before, joined = pointwise(classifier)
    assert isinstance(before, Patches)
    torch.testing.assert_close(joined(before(features)), classifier(features))


def test_another_classifier_is_named(original: Make, tmp_path: Path) -> None:
    """A network whose head was extended by hand: any layer of it can be named."""
    network = original("transformers:Segformer")
    pixels = images((96, 128), 1)
    expected = network.logits(pixels)
    request = replace(_request(network, tmp_path / "run"), classifier="decode_head.classifier")
    model, info = load_model(adopt(request, QUIET))
    assert info.architecture.options["classifier"] == "decode_head.classifier"
    torch.testing.assert_close(
        resize(model.predict(pixels).contiguous(), (96, 128))[:, 1:], expected, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(UserError, match=r"is a SegformerMLP; expected the name of its last convolution, such as"):
        adopt(replace(request, out=tmp_path / "no", classifier="decode_head.linear_projections.0"), QUIET)
