"""`starseg export --to`: a grown network in the form of its library, which loads it without starseg."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn

import starseg
from adoption.nets import TwoBranches
from adoption.originals import Original, images, logits_of, randomise
from starseg.adoption.adopt import AdoptRequest, adopt
from starseg.cli.main import main
from starseg.engine.checkpoint import load_info, load_model, save_step
from starseg.errors import UserError
from starseg.inference.library import export_library
from starseg.inference.onnx import export_onnx
from starseg.inference.predictor import load, step_rule
from starseg.inference.program import export_program
from starseg.models import make_network
from starseg.models.classifiers import BACKGROUND, last_layer
from starseg.ops.bilinear import resize

QUIET = Console(quiet=True)
Make = Callable[[str], Original]
FAST = ["torchvision:lraspp_mobilenet_v3_large", "smp:Unet", "transformers:Segformer"]
SLOW = ["torchvision:deeplabv3_mobilenet_v3_large", "torchvision:fcn_resnet50", "smp:FPN", "smp:PSPNet", "smp:DPT"]
SLOW += ["smp:DeepLabV3Plus", "transformers:UperNet", "transformers:MobileNetV2", "transformers:MobileViT"]
SLOW += ["transformers:Beit", "transformers:DPT", "transformers:MobileViTV2", "transformers:Data2VecVision"]
SLOW += ["transformers:UperNetSwin", "torchvision:deeplabv3_resnet50", "smp:UnetPlusPlus", "smp:MAnet", "smp:Linknet"]
SLOW += ["smp:PAN", "smp:DeepLabV3", "smp:UPerNet", "smp:Segformer"]


def _grown(step: Path, classes: int = 1, method: str = "lwf") -> Path:
    """Add a step with new classes, whose rows are random, beside an adopted step."""
    model, info = load_model(step)
    torch.manual_seed(1)
    scale = last_layer(model.heads[0]).weight.detach().std()
    model.add_head(classes)
    nn.init.normal_(last_layer(model.heads[-1]).weight, std=float(scale))
    side = info.crop if model.encoder.fixed else 128
    with torch.no_grad():
        logits = model(model.normalize(images((side, side)))).logits
        # The new classes win on half of the pixels.
        last_layer(model.heads[-1]).bias += (logits[:, :-classes].amax(1) - logits[:, -classes:].amax(1)).median()
    new = [f"new {index}" for index in range(classes)]
    changes = {"names": [*info.names, *new], "dataset_ids": [*info.dataset_ids, *range(100, 100 + classes)]}
    info = replace(info, head_sizes=[*info.head_sizes, classes], step=1, method=method, **changes)
    metrics = {"step": 1, "new_classes": new, "images": 12, "seconds": 1.0, "iou": {}, "miou": {}}
    save_step(step.parent / "step_1", model, info, {}, metrics)
    return step.parent / "step_1"


def _load(folder: Path, original: Original) -> nn.Module:
    """Load an export as a user of the library would, without starseg."""
    if original.source.startswith("torchvision"):
        outputs = len(json.loads((folder / "classes.json").read_text())["classes"])
        name = original.source.partition(":")[2]
        network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=outputs)
        network.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
        return network.eval()
    if original.classes is not None:
        import segmentation_models_pytorch as smp

        return smp.from_pretrained(str(folder)).eval()
    return type(original.network).from_pretrained(folder).eval()


def _compare(step: Path, folder: Path, original: Original) -> None:
    pixels = images(original.size)
    found = original._replace(network=_load(folder, original)).logits(pixels)
    model, info = load_model(step)
    with torch.no_grad():
        logits = resize(model.predict(pixels).contiguous(), original.size)
    assert found.shape[1] == len(info.names) - (original.classes is None)
    expected = logits[:, -found.shape[1] :]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    ids = step_rule(info)(logits) - int(original.classes is None)
    assert (found.argmax(1) == ids).float().mean() > 0.9999
    assert found.shape[1] - 1 in ids, "the new class is never predicted"


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_library_loads_a_grown_network(name: str, original: Make, tmp_path: Path) -> None:
    network = original(name)
    step = _grown(adopt(AdoptRequest(network.source, tmp_path / "run", network.weights, network.classes), QUIET))
    card = export_library(step, name.partition(":")[0], tmp_path / "export", QUIET).read_text()
    _compare(step, tmp_path / "export", network)
    assert "| 1 | new 0 | lwf | 12 | 20" in card and f"| 0 | {', '.join(load_info(step).names[1:4])} |" in card
    assert "trained elsewhere: " in card and "Compared with starseg: max |logit difference|" in card
    if network.classes is None:
        config = json.loads((tmp_path / "export/config.json").read_text())
        assert config["id2label"] == {"0": "wall", "1": "road", "2": "sky", "3": "new 0"}
        assert config["label2id"]["new 0"] == 3


def test_the_walk_goes_round(original: Make, tmp_path: Path) -> None:
    """An export is adopted again, with the same predictions, names and normalisation."""
    network = original("transformers:Segformer")
    step = _grown(adopt(AdoptRequest(network.source, tmp_path / "run"), QUIET), classes=2)
    export_library(step, "transformers", tmp_path / "export", QUIET)
    again = adopt(AdoptRequest(str(tmp_path / "export"), tmp_path / "again"), QUIET)
    assert load_info(again).names == load_info(step).names
    pixels = images(network.size, 1)
    (first, _), (second, _) = load_model(step), load_model(again)
    torch.testing.assert_close(first.predict(pixels), second.predict(pixels), atol=1e-4, rtol=1e-4)
    assert first.preprocess == second.preprocess


def test_a_transformers_export_has_its_image_processor(original: Make, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    network = original("transformers:Segformer")
    step = adopt(AdoptRequest(network.source, tmp_path / "run"), QUIET)
    export_library(step, "transformers", tmp_path / "export", QUIET)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "export", use_fast=False)
    assert tuple(processor.image_mean) == network.mean and tuple(processor.image_std) == network.std


def test_a_step_of_star_is_exported(original: Make, shapes: Path, tmp_path: Path) -> None:
    """Sigmoid heads: the background's logit is 0, so that the largest output is STAR's prediction."""
    network = original("torchvision:lraspp_mobilenet_v3_large")
    request = AdoptRequest(network.source, tmp_path / "run", network.weights, network.classes, crop=96)
    step = _grown(adopt(replace(request, photos=str(shapes / "JPEGImages")), QUIET), method="star")
    export_library(step, "torchvision", tmp_path / "export", QUIET)
    pixels = images((96, 128))
    found = network._replace(network=_load(tmp_path / "export", network)).logits(pixels)
    model, info = load_model(step)
    ids = step_rule(info)(resize(model.predict(pixels).contiguous(), (96, 128)))
    assert torch.all(found[:, 0] == 0) and (found.argmax(1) == ids).float().mean() > 0.9999


def test_a_network_of_ones_own_is_exported(tmp_path: Path) -> None:
    network = randomise(TwoBranches(3, kernel=3), (64, 64))
    options = {"kernel": 3}
    step = _grown(starseg.adopt(network, tmp_path / "run", ["background", "a", "b"], multiple=4, options=options))
    card = export_library(step, "model", tmp_path / "export", QUIET).read_text()
    assert "two_branches(4, kernel=3)  # your function" in card
    loaded = TwoBranches(4, kernel=3).eval()
    loaded.load_state_dict(torch.load(tmp_path / "export/weights.pth", weights_only=True))
    model, _ = load_model(step)
    pixels = images((64, 96))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded(model.normalize(pixels))), model.predict(pixels))


PROGRAM = """
import json, sys, torch
assert "starseg" not in sys.modules
extra = {"classes.json": ""}
network = torch.export.load(sys.argv[1], extra_files=extra).module()
logits, mask = network(torch.load(sys.argv[2], weights_only=True))
assert not any(name.startswith("starseg") for name in sys.modules)
torch.save((mask, json.loads(extra["classes.json"])["classes"]), sys.argv[3])
"""


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:lraspp_mobilenet_v3_large",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("smp:Unet", "transformers:Segformer")),
    ],
)
def test_a_program_runs_without_starseg(name: str, original: Make, tmp_path: Path) -> None:
    network = original(name)
    request = AdoptRequest(network.source, tmp_path / "run", network.weights, network.classes, crop=96)
    step = _grown(adopt(request, QUIET))
    card = export_program(step, tmp_path / "model.pt2", QUIET)
    side = load_info(step).crop
    pixels = images((side, side), 3)
    torch.save(pixels, tmp_path / "images.pt")
    files = [str(tmp_path / file) for file in ("model.pt2", "images.pt", "mask.pt")]
    subprocess.run([sys.executable, "-c", PROGRAM, *files], check=True, cwd=tmp_path)
    mask, classes = torch.load(tmp_path / "mask.pt", weights_only=True)
    predictor = load(step, "cpu", "32")
    table = torch.tensor(predictor.dataset_ids)
    expected: Tensor = table[predictor.rule(resize(predictor.logits(pixels).contiguous(), (side, side)))]
    assert classes == predictor.classes and (mask == expected).float().mean() > 0.9999
    assert "| 1 | new 0 | lwf | 12 | 20" in card.read_text()


def test_what_has_no_such_form_is_explained(original: Make, step_dir: Path, tmp_path: Path) -> None:
    network = original("torchvision:lraspp_mobilenet_v3_large")
    step = adopt(AdoptRequest(network.source, tmp_path / "run", network.weights, network.classes), QUIET)
    with pytest.raises(UserError, match=r"--to smp: .* holds a network of torchvision; take --to torchvision"):
        export_library(step, "smp", tmp_path / "no", QUIET)
    with pytest.raises(
        UserError, match=r"holds a network of timm; take --to program, or --out model.onnx without --to"
    ):
        export_library(step_dir, "smp", tmp_path / "no", QUIET)
    with pytest.raises(UserError, match="exists already; give a free place"):
        export_library(step, "torchvision", tmp_path, QUIET)
    with pytest.raises(UserError, match=r"--out .*model.onnx: a program of torch.export is a .pt2 file; give --out"):
        export_program(step, tmp_path / "model.onnx", QUIET)
    info = load_info(step)
    wrong = {
        "no single 1x1 convolution, as the library's is; take --to program": {"hidden": 8},
        "its channels unknown have no place there": {"lead": [BACKGROUND, "unknown"]},
    }
    for number, (sentence, changes) in enumerate(wrong.items()):
        other = replace(info, **changes)
        folder = tmp_path / f"other_{number}"
        save_step(folder, make_network(info.architecture, [3], other.layout), other, {}, {"step": 0})
        with pytest.raises(UserError, match=sentence):
            export_library(folder, "torchvision", tmp_path / "no", QUIET)
    assert not (tmp_path / "no").exists()


def test_a_network_of_queries_has_no_such_form(original: Make, tmp_path: Path) -> None:
    step = adopt(AdoptRequest(original("transformers:Eomt").source, tmp_path / "run"), QUIET)
    with pytest.raises(
        UserError, match=r"--to transformers: Eomt.* classifies queries, .*; take --to program, or --out"
    ):
        export_library(step, "transformers", tmp_path / "no", QUIET)
    # Its masks of attention depend on numbers in a buffer, which torch.export cannot follow; ONNX's tracer can.
    with pytest.raises(
        UserError, match=r"torch.export cannot trace this network .*; take --out model.onnx without --to"
    ):
        export_program(step, tmp_path / "model.pt2", QUIET)
    pytest.importorskip("onnxruntime")
    found = export_onnx(step, tmp_path / "model.onnx", QUIET)
    assert found.masks > 0.999


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--to keras --out x", "--to: expected torchvision, smp, transformers, model or program, got 'keras'; ONNX"),
        ("--to smp", "--to smp: give --out FOLDER"),
        ("--to program", "--to program: give --out model.pt2"),
        ("--to smp --out x --int8", "--to smp: takes no --int8, --images or --hub, which are for other forms"),
    ],
)
def test_wrong_options_are_explained(
    arguments: str, sentence: str, step_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["starseg", "export", str(step_dir), *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
