"""`starseg.adopt` and `model:NAME`: networks of the user's own, built again by a file that STARSEG_MODELS names."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import starseg
from adoption.nets import TwoBranches
from adoption.originals import hugging_face, images, logits_of, randomise
from starseg.adoption.adopt import AdoptRequest
from starseg.adoption.adopt import adopt as adopt_source
from starseg.engine.checkpoint import load_info, load_model
from starseg.errors import UserError
from starseg.models.foreign import module
from starseg.ops.bilinear import resize

NETS = Path(__file__).parent / "nets.py"
MEAN, STD = (0.4, 0.5, 0.6), (0.5, 0.4, 0.3)
NAMES = ["background", "a", "b"]
HEAD: dict[str, Any] = {"features": "decode_head.linear_fuse", "classifier": "decode_head.classifier"}


def _network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(TwoBranches(3, **options), (64, 64))


def _expected(network: nn.Module, pixels: torch.Tensor, bgr: bool = False) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    given = (pixels / 255 - mean) / std
    with torch.no_grad():
        return resize(logits_of(network.eval()(given.flip(1) if bgr else given)), pixels.shape[-2:])


@pytest.mark.parametrize(
    "more", [{}, {"bgr": True}, {"options": {"width": 12}}, {"options": {"kernel": 3}, "model": "two_branches"}]
)
def test_a_module_is_adopted(more: dict[str, Any], tmp_path: Path) -> None:
    network = _network(**more.get("options", {}))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    step = starseg.adopt(network, tmp_path / "run", NAMES, mean=MEAN, std=STD, multiple=4, **HEAD, **more)
    pixels = images((64, 96))
    model, info = load_model(step)
    with torch.no_grad():
        own = resize(model.predict(pixels), (64, 96))
        maps = model(model.normalize(pixels), maps=True).maps
    expected = _expected(network, pixels, more.get("bgr", False))
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    assert own.argmax(1).unique().numel() > 1 and torch.equal(own.argmax(1), expected.argmax(1))
    assert info.names == NAMES and info.architecture.encoder == "two_branches" and model.multiple == 4
    assert maps is not None and [m.shape[1] for m in maps] == [more.get("options", {}).get("width", 8)] * 2
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_process_builds_it_again(tmp_path: Path) -> None:
    network = _network()
    step = starseg.adopt(network, tmp_path / "run", NAMES, mean=MEAN, std=STD, multiple=4, crop=64, **HEAD)
    pixels = images((64, 64), 1)
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    command = [sys.executable, "-m", "starseg", "predict", "--precision", "32", str(step)]
    command += [str(tmp_path / "photo.png"), "--out"]
    environment = os.environ | {"STARSEG_MODELS": str(NETS)}
    subprocess.run([*command, str(tmp_path / "masks")], check=True, env=environment)
    mask = np.asarray(Image.open(tmp_path / "masks" / "photo.png"))
    assert np.array_equal(mask, _expected(network, pixels).argmax(1)[0].numpy())
    environment.pop("STARSEG_MODELS")
    failed = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, env=environment)
    said = " ".join(failed.stderr.split())
    assert failed.returncode == 2 and "Traceback" not in said
    assert "model:two_branches: no such model (none is registered); name the Python file" in said
    assert "STARSEG_MODELS=nets.py" in said


def test_a_source_on_the_command_line(tmp_path: Path) -> None:
    network = _network()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    request = AdoptRequest("model:two_branches", tmp_path / "run", str(tmp_path / "w.pth"), "background,a,b")
    request = AdoptRequest(**{**request.__dict__, "mean": MEAN, "std": STD, "multiple": 4})
    step = adopt_source(request, Console(quiet=True))
    pixels = images((64, 96))
    own = resize(load_model(step)[0].predict(pixels), (64, 96))
    torch.testing.assert_close(own, _expected(network, pixels), atol=1e-5, rtol=1e-4)
    assert load_info(step).architecture.options["classifier"] == "decode_head.classifier"


def test_a_network_of_transformers_needs_no_function(tmp_path: Path) -> None:
    network = randomise(hugging_face("Segformer"), (64, 64))
    step = starseg.adopt(network, tmp_path / "run", mean=MEAN, std=STD)
    pixels = images((64, 96))
    own = resize(load_model(step)[0].predict(pixels), (64, 96))
    torch.testing.assert_close(own[:, 1:], _expected(network, pixels), atol=1e-4, rtol=1e-3)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such classifier": (
        {"classifier": "decode_head.last"},
        "--classifier decode_head.last: TwoBranches has no such layer; expected .* such as .*decode_head.classifier",
    ),
    "a classifier of other channels": (
        {"classifier": "decode_head.linear_fuse"},
        "looked for its classifier in decode_head.linear_fuse, which has 8 outputs; the network has 3 and 3 are named",
    ),
    "no such features": (
        {"features": "decode_head.linear_fusion"},
        "--features decode_head.linear_fusion: TwoBranches has no such layer; .* such as decode_head.linear_fuse",
    ),
    "too few classes": ({"classes": ["background", "a"]}, "model 'two_branches' builds another .*|no registered"),
    "classes without names": ({"classes": None}, "TwoBranches does not name its outputs; give classes="),
    "an unknown model": (
        {"model": "three_branches"},
        r"model:three_branches: no such model \(registered are two_branches\); name the Python .* STARSEG_MODELS",
    ),
    "options that are code": ({"options": {"width": nn.ReLU()}}, "options: expected plain JSON values"),
    "options that the function does not take": (
        {"model": "two_branches", "options": {"depth": 3}},
        "model:two_branches: .*nets.py cannot build it with 3 outputs: TypeError: .*depth",
    ),
    "options of another network": (
        {"model": "two_branches", "options": {"width": 9}},
        "model 'two_branches' builds another network than this TwoBranches: the first tensor .* is stem.0.weight",
    ),
    "four numbers for the mean": ({"mean": (0.5,) * 4}, "--mean: expected three numbers"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_use_is_explained(what: str, tmp_path: Path) -> None:
    changes, sentence = WRONG[what]
    arguments = {"classes": NAMES, "multiple": 4, **HEAD, **changes}
    with pytest.raises(UserError, match=sentence):
        starseg.adopt(_network(), tmp_path / "run", **arguments)
    assert not any(tmp_path.iterdir())


def test_modules_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a torch.nn.Module, got a OrderedDict"):
        starseg.adopt(_network().state_dict(), tmp_path / "run", NAMES)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"no registered function builds this Conv2d, .*@starseg.register_model.*STARSEG_MODELS"
    ):
        starseg.adopt(nn.Conv2d(3, 3, 1), tmp_path / "run", NAMES)
    first, last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
    networks = {
        "pooled": (nn.Sequential(first, last, nn.AdaptiveAvgPool2d(1), nn.Flatten()), r"returns a tensor \[1, 3\]"),
        "softmax": (nn.Sequential(first, last, nn.Softmax(1)), "does not predict what the original predicts"),
        "wide": (nn.Sequential(first, nn.Conv2d(4, 3, 5)), "a convolution of 5x5; expected 1x1, or 3x3"),
        "none": (nn.Sequential(nn.ReLU()), "has no convolution; looked for the last one"),
        "list": (nn.ModuleList([first, last]), "cannot be run on images of"),
        "patches": (
            nn.Sequential(first, nn.PixelUnshuffle(28), nn.Conv2d(4 * 28**2, 3, 1)),
            "cannot be run on images of 96 x 128 pixels: .*; name the divisor of its sides with --multiple",
        ),
    }
    for name, (network, sentence) in networks.items():
        starseg.register_model(name)(lambda outputs, network=network: network)
        try:
            with pytest.raises(UserError, match=sentence):
                starseg.adopt(network, tmp_path / "run", NAMES, model=name)
        finally:
            del module.MODELS[name]


def test_a_name_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"register_model: 'two_branches' is registered already, by .*nets.py; take"):
        starseg.register_model("two_branches")(nn.Identity)
    (tmp_path / "broken.py").write_text("import nonsense_module")
    module.load_plugins.cache_clear()
    monkeypatch.setenv("STARSEG_MODELS", str(tmp_path / "broken.py"))
    with pytest.raises(UserError, match=r"STARSEG_MODELS: .*broken.py cannot be loaded: ModuleNotFoundError"):
        module.find_model("mine")
    module.load_plugins.cache_clear()
