"""`starseg adopt` explains wrong uses in one sentence: what was given, what was expected, what to do."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from adoption.originals import hugging_face, images
from starseg.adoption.adopt import AdoptRequest, adopt
from starseg.engine.checkpoint import load_info, load_model
from starseg.errors import UserError
from starseg.models.foreign import torchvision as tv

LRASPP = "torchvision:lraspp_mobilenet_v3_large"
Change = Callable[[AdoptRequest, Path], AdoptRequest]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good weights of LR-ASPP with 3 outputs (good.pth), and files that are wrong in some way."""
    folder = tmp_path_factory.mktemp("files")
    state = tv.create(tv_architecture("lraspp_mobilenet_v3_large"), 3).state_dict()
    torch.save(state, folder / "good.pth")
    torch.save(nn.Linear(2, 2), folder / "code.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save(dict(list(state.items())[:-4]), folder / "headless.pth")
    torch.save(state | {"backbone.0.0.weight": torch.zeros(2, 3, 3, 3)}, folder / "other.pth")
    torch.save(
        state | {"extra.weight": torch.quantize_per_tensor(torch.rand(2), 0.1, 0, torch.qint8)}, folder / "q.pth"
    )
    (folder / "text.pth").write_text("weights")
    (folder / "damaged.safetensors").write_bytes(b"12345")
    (folder / "empty").mkdir()
    for name, config in {
        "neither": {"hidden_size": 3},
        "smp_without_weights": {"_model_class": "Unet", "classes": 2},
        "detector": {"architectures": ["DetrForObjectDetection"], "model_type": "detr"},
        "panoptic": {"architectures": ["OneFormerForUniversalSegmentation"], "model_type": "oneformer"},
        "classifier": {"architectures": ["ViTForImageClassification"], "model_type": "vit"},
        "queries": {"architectures": ["EomtForUniversalSegmentation"], "model_type": "eomt"},
        "eight_bits": {
            "architectures": ["SegformerForSemanticSegmentation"],
            "model_type": "segformer",
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        },
        "grey": {"_model_class": "Unet", "classes": 2, "in_channels": 1},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "good.pth", folder / "grey" / "model.safetensors")
    return folder


def tv_architecture(name: str):
    from starseg.models import Architecture

    return Architecture(name, builder="torchvision")


def _with(**changes: object) -> Change:
    return lambda request, files: replace(request, **changes)  # type: ignore[arg-type]


def _weights(name: str) -> Change:
    return lambda request, files: replace(request, weights=str(files / name))


def _folder(name: str) -> Change:
    return lambda request, files: replace(request, source=str(files / name), weights=None)


WRONG: dict[str, tuple[Change, str]] = {
    "an unknown library": (
        _with(source="keras:unet"),
        "keras:unet: no such folder or library; expected torchvision:NAME",
    ),
    "a classification network": (
        _with(source="torchvision:resnet50"),
        "is a classification or detection network; expected a segmentation network: deeplabv3_mobilenet_v3_large",
    ),
    "an unknown network": (_with(source="torchvision:unet"), "torchvision:unet: is unknown to torchvision; expected"),
    "a file as the source": (
        lambda request, files: replace(request, source=str(files / "good.pth")),
        "is a file of weights alone; give torchvision:NAME, .* as SOURCE, and the file as --weights",
    ),
    "a detection network of torchvision": (
        _with(source="torchvision:fasterrcnn_resnet50_fpn"),
        "fasterrcnn_resnet50_fpn: is a classification or detection network; expected a segmentation network",
    ),
    "a TFLite file": (
        _with(source="deeplab.tflite"),
        r"deeplab.tflite: .tflite files hold a graph for prediction, often quantised; give the float network in",
    ),
    "an ONNX file": (_with(source="unet.onnx"), "unet.onnx: .onnx files hold a graph for prediction"),
    "a hub name without an owner": (_with(source="hub:segformer"), "hub:segformer: expected hub:OWNER/NAME, such as"),
    "a model of no file": (
        _with(source="model:mine"),
        r"model:mine: no such model \(.*\); name the Python file that registers it in STARSEG_MODELS, as in "
        r"STARSEG_MODELS=nets.py: @starseg.register_model",
    ),
    "features of a library's network": (
        _with(features="classifier"),
        "--features: torchvision:.* is split as its library demands; only model:NAME takes --features",
    ),
    "a divisor of a library's network": (_with(multiple=8), "--multiple: .* only model:NAME takes --multiple"),
    "neither weights nor classes": (
        _with(weights=None, classes=None),
        "give --weights FILE, or --classes for a network",
    ),
    "no names": (_with(classes=None), "--classes: torchvision:lraspp.* does not name its 3 outputs; give 3 names"),
    "too few names": (_with(classes="background,a"), "got 2 names, but .* has 3 outputs; name every output"),
    "an empty name": (_with(classes="background,,b"), "name 2 of 3 is empty; name every output"),
    "a name twice": (_with(classes="background,a,A"), "'a' occurs twice; give every output a name of its own"),
    "no such file": (_weights("none.pth"), "none.pth: no such file; give a .pth, .pt, .bin or .safetensors file"),
    "pickled code": (_weights("code.pth"), "holds Python objects besides tensors, which are not unpickled .* save the"),
    "no state dict": (_weights("list.pth"), "holds no state dict .*; save model.state_dict"),
    "no weights at all": (_weights("text.pth"), "text.pth: (holds Python objects|damaged, or no file of weights)"),
    "damaged weights": (_weights("damaged.safetensors"), "damaged, or no file of weights"),
    "an encoder alone": (
        _weights("headless.pth"),
        "holds no classifier.low_classifier, the classifier of this network",
    ),
    "weights of another network": (_weights("other.pth"), "do not fit LRASPP: 1 tensors are .* first is backbone.0.0"),
    "quantised weights": (_weights("q.pth"), "quantised weights cannot be adopted; give the float network"),
    "an empty folder": (_folder("empty"), "holds no config.json; expected torchvision:NAME"),
    "a configuration of nothing": (_folder("neither"), "names neither _model_class .* nor architectures"),
    "no such classifier": (
        _with(classifier="head.last"),
        "holds no head.last, the classifier of this network; its last convolutions are .*classifier.high_classifier",
    ),
    "one of two classifiers": (
        _with(classifier="classifier.low_classifier"),
        "does not predict what the original predicts .*name another layer with --classifier",
    ),
    "two numbers for the mean": (_with(mean=(0.5, 0.5)), "--mean: expected three numbers for pixels in 0..1"),
    "a mean for pixels in 0..255": (_with(mean=(123.0, 116.0, 103.0)), "--mean: .*divide mean and std by 255"),
    "a std of 0": (_with(std=(0.0, 1.0, 1.0)), "--std: expected three numbers for pixels in 0..1"),
    "a crop of no multiple": (_with(crop=100), "--crop 100: is no multiple of 16, .*take 96 or 112"),
    "a place that is taken": (lambda request, files: replace(request, out=files), "exists already; give a free place"),
}
OPTIONAL: dict[str, tuple[str, Change, str]] = {
    "an unknown smp class": (
        "segmentation_models_pytorch",
        _with(source="smp:SegNet", weights=None),
        "smp:SegNet: expected one of Unet, UnetPlusPlus",
    ),
    "an unknown smp encoder": (
        "segmentation_models_pytorch",
        _with(source="smp:Unet:resnet19", weights=None),
        "segmentation_models.pytorch cannot build it: .*resnet19",
    ),
    "an encoder that its class does not take": (
        "segmentation_models_pytorch",
        _with(source="smp:DPT:resnet18", weights=None),
        "smp:DPT:resnet18: segmentation_models.pytorch cannot build it: Only Timm encoders are supported for DPT",
    ),
    "an smp folder without weights": (
        "segmentation_models_pytorch",
        _folder("smp_without_weights"),
        "holds no model.safetensors; save it with save_pretrained",
    ),
    "grey images": ("segmentation_models_pytorch", _folder("grey"), "takes images of 1 channels; only RGB"),
    "a detection network": (
        "transformers",
        _folder("detector"),
        "DetrForObjectDetection: expected a semantic segmentation network, one of Segformer",
    ),
    "a classification network of transformers": (
        "transformers",
        _folder("classifier"),
        "ViTForImageClassification: expected a semantic segmentation network, one of Segformer",
    ),
    "a network that wants words": (
        "transformers",
        _folder("panoptic"),
        "OneFormer.*: wants a task in words beside the image; take a network that wants the image alone, one of",
    ),
    "a folder without weights": (
        "transformers",
        _folder("queries"),
        r"queries: transformers cannot load it: (Error no file named model.safetensors|.*scipy)",
    ),
    "a quantised network of transformers": (
        "transformers",
        _folder("eight_bits"),
        r"its weights are quantised \(bitsandbytes\), which cannot be adopted; give the float network",
    ),
}


def _refused(change: Change, sentence: str, files: Path, tmp_path: Path) -> None:
    request = AdoptRequest(LRASPP, tmp_path / "run", str(files / "good.pth"), "background,a,b")
    with pytest.raises(UserError, match=sentence):
        adopt(change(request, files), Console(quiet=True))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_use_is_explained(what: str, files: Path, tmp_path: Path) -> None:
    _refused(*WRONG[what], files, tmp_path)


@pytest.mark.parametrize("what", OPTIONAL)
def test_a_wrong_use_of_another_library_is_explained(what: str, files: Path, tmp_path: Path) -> None:
    package, change, sentence = OPTIONAL[what]
    pytest.importorskip(package)
    _refused(change, sentence, files, tmp_path)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, files: Path, tmp_path: Path) -> None:
    for package, extra, change in (
        ("segmentation_models_pytorch", "smp", _with(source="smp:Unet", weights=None)),
        ("transformers", "transformers", _folder("queries")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        _refused(
            change, rf"needs the package {package}, which is missing; pip install 'starseg\[{extra}\]'", files, tmp_path
        )


def test_missing_and_doubled_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    hugging_face("Segformer").save_pretrained(folder)
    request = AdoptRequest(str(folder), tmp_path / "run")
    processor = folder / "preprocessor_config.json"
    processor.write_text("[1]")
    with pytest.raises(UserError, match="expected the settings of an image processor, got a list"):
        adopt(request, Console(quiet=True))
    processor.unlink()
    with pytest.raises(UserError, match=r"--weights: the weights of .* lie in it; leave --weights out"):
        adopt(replace(request, weights="w.pth"), Console(quiet=True))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="net: transformers cannot load it: "):
        adopt(request, Console(quiet=True))


def test_a_model_of_the_hub_is_downloaded_without_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "cache"
    hugging_face("Segformer").save_pretrained(folder)
    wanted: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        wanted.extend([name, *allow_patterns])
        if name == "nobody/nothing":
            raise hub.errors.LocalEntryNotFoundError("offline")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    step = adopt(AdoptRequest("hub:owner/segformer", tmp_path / "run"), Console(quiet=True))
    assert load_info(step).names[1:] == ["wall", "road", "sky"]
    assert wanted[0] == "owner/segformer" and not any(name.endswith((".bin", ".py", "*")) for name in wanted)
    with pytest.raises(
        UserError, match=r"hub:nobody/nothing: cannot be downloaded \(LocalEntryNotFoundError\); download"
    ):
        adopt(AdoptRequest("hub:nobody/nothing", tmp_path / "no"), Console(quiet=True))


def test_a_colour_order_is_not_guessed(tmp_path: Path) -> None:
    """The same network as BGR and as RGB predicts differently; nothing but the user's word decides."""
    folder = tmp_path / "net"
    hugging_face("Segformer").save_pretrained(folder)
    pixels = images((64, 64), 1)
    rgb, bgr = (
        load_model(adopt(AdoptRequest(str(folder), tmp_path / str(flag), bgr=flag), Console(quiet=True)))[0]
        for flag in (False, True)
    )
    assert not torch.allclose(rgb.predict(pixels), bgr.predict(pixels))
    assert rgb.mean.flatten().tolist() == bgr.mean.flatten().tolist()


def test_a_step_directory_needs_no_adoption(step_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="is a step directory of starseg already; `starseg learn` and `predict` take it"
    ):
        adopt(AdoptRequest(str(step_dir), tmp_path / "run"), Console(quiet=True))
