"""Every kind of encoder with every decoder: shapes, freezing, training, files, resuming, prediction, export.

A new encoder is one line of :data:`ENCODERS`.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.layers
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer, _create_swin_transformer
from torch import Tensor, nn

import starseg
from starseg.config import parse_config
from starseg.contract import runs
from starseg.contract.checks import gradients_reach_what_learns, the_loss_falls
from starseg.contract.harness import MethodHarness
from starseg.engine.checkpoint import load_info, load_model
from starseg.errors import UserError
from starseg.experiments.train import train
from starseg.models import Architecture, make_network
from starseg.models.architectures import published_keys, upgrade_keys
from starseg.models.builders import BUILDERS, Parts, check_crop, register_builder
from starseg.models.decoders import DECODERS, Linear
from starseg.models.encoders import Encoder, Preprocess
from starseg.ops import fused_layers


@register_model
def starseg_test_swin(pretrained: bool = False, **options: Any) -> SwinTransformer:
    """A Swin of a test's size, which timm has not: four stages, shifted windows of 7, maps as [N, h, w, C]."""
    sizes = {"patch_size": 4, "window_size": 7, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
    return _create_swin_transformer("swin_tiny_patch4_window7_224", pretrained, **sizes, **options)


ENCODERS = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_vit3", "starseg_test_swin", "mit_b0"]
LARGE = [
    *("resnet18", "convnextv2_atto", "pvt_v2_b0", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"),
    *("swinv2_cr_tiny_224", "vit_tiny_patch16_224", "vit_small_patch14_dinov2.lvd142m", "vit_small_patch16_dinov3"),
]
TRANSFORMERS = [("test_vit3", "linear"), ("starseg_test_swin", "fpn"), ("mit_b0", "segformer")]
NORMS = tuple(getattr(timm.layers, name) for name in ("LayerNorm2d", "GroupNorm1", "RmsNorm"))
every_encoder = pytest.mark.parametrize(
    "encoder", [*ENCODERS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
)


@every_encoder
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("stride", [8, 16])
def test_features_lie_on_the_grid_and_every_parameter_learns(encoder: str, decoder: str, stride: int) -> None:
    model = make_network(Architecture(encoder, decoder, stride), [2, 1])
    side = model.multiple * max(1, 64 // model.multiple)
    output = model(torch.randn(2, 3, side, 2 * side), maps=True)
    grid = (side // stride, 2 * side // stride)
    assert output.features.shape == (2, model.width, *grid) and output.logits.shape == (2, model.classes, *grid)
    assert [m.shape[1] for m in output.maps] == model.encoder.channels
    assert [side // m.shape[2] for m in output.maps] == model.encoder.strides
    output.logits.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    with torch.inference_mode():
        odd = model.eval()(torch.randn(1, 3, 107, 75)).logits
    assert odd.shape[:2] == (1, 3) and odd.isfinite().all()


@every_encoder
def test_norms_and_dropout_are_frozen(encoder: str) -> None:
    model = make_network(Architecture(encoder), [2])
    model.freeze_norm()
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, *NORMS))]
    assert norms and not any(p.requires_grad for m in norms for p in m.parameters())
    assert all(p.requires_grad for m in model.modules() if isinstance(m, nn.Conv2d) for p in m.parameters())
    images = torch.randn(2, 3, model.multiple, 2 * model.multiple)
    first, second = (model.train()(images).features for _ in range(2))
    assert torch.equal(first, second), "dropout and drop path are off, statistics fixed"


def test_norms_of_torch_and_timm_are_frozen() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 16, 16), *(norm(8) for norm in NORMS[:2]), nn.GroupNorm(2, 8))
    body.append(nn.Sequential(nn.RMSNorm(4), timm.layers.RmsNorm(4), timm.layers.DropPath(0.5)))
    model = _model_of(body)
    model.freeze_norm()
    assert [name for name, p in model.encoder.named_parameters() if p.requires_grad] == ["body.0.weight", "body.0.bias"]
    assert not model.train().encoder.body[-1][-1].training


class _OneMap(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.body(images)]


def _model_of(body: nn.Module) -> Any:
    architecture = Architecture("own", builder="own")

    def build(given: Architecture, pretrained: object) -> Parts:
        encoder = Encoder(body, [8], [16], Preprocess((0.0,) * 3, (1.0,) * 3))
        encoder.forward = _OneMap(body).forward  # type: ignore[method-assign]
        return Parts(encoder, Linear(encoder, given.stride))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILDERS, "own", build)
        return make_network(architecture, [1])


def test_where_no_batch_norm_is_nothing_is_fused() -> None:
    model = make_network(Architecture("test_vit"), [1])
    convs = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert convs
    assert not any(m.norm for m in convs)
    assert any(isinstance(m, fused_layers.Conv2d) and m.norm for m in model.decoder.modules())


PAIRS = [
    *(("test_resnet", "fpn"), ("test_convnext", "linear"), ("test_vit", "aspp"), *TRANSFORMERS),
    *(pytest.param(name, "fpn", marks=pytest.mark.slow) for name in ("swin_tiny_patch4_window7_224", "pvt_v2_b0")),
]


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
@pytest.mark.parametrize("check", [gradients_reach_what_learns, pytest.param(the_loss_falls, marks=pytest.mark.slow)])
def test_star_learns_three_steps(encoder: str, decoder: str, check: Callable[[MethodHarness], None]) -> None:
    check(MethodHarness("star", architecture=Architecture(encoder, decoder)))


@pytest.mark.parametrize(
    ("encoder", "decoder"), [*TRANSFORMERS[1:], pytest.param(*TRANSFORMERS[0], marks=pytest.mark.slow)]
)
def test_a_run_resumes_bit_by_bit_and_predicts(
    encoder: str, decoder: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = runs.tiny_settings

    def with_encoder(*args: Any) -> dict[str, Any]:
        return settings(*args) | {"model": {"backbone": encoder, "decoder": decoder, "pretrained": False}}

    monkeypatch.setattr(runs, "tiny_settings", with_encoder)
    runs.check_resume("star", shapes, tmp_path)
    step = tmp_path / "straight" / "step_1"
    model, info = load_model(step)
    assert info.architecture == model.architecture == Architecture(encoder, decoder)
    mask = starseg.load(step, "cpu").predict(np.zeros((75, 120, 3), np.uint8))
    assert mask.shape == (75, 120)
    windows = starseg.load(step, "cpu").predict(np.zeros((75, 120, 3), np.uint8), window=True, scales=(0.7, 1.3))
    assert windows.shape == (75, 120)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("test_convnext", "fpn"), *TRANSFORMERS, pytest.param("test_resnet", "linear", marks=pytest.mark.slow)],
)
def test_onnx_agrees(encoder: str, decoder: str, step_dir: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime; pip install 'starseg[export]'")
    pytest.importorskip("onnx", reason="needs onnx; pip install 'starseg[export]'")
    from starseg.inference.onnx import export_onnx

    _replace_network(step_dir, Architecture(encoder, decoder))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(tmp_path / "a.png")
    agreement = export_onnx(step_dir, tmp_path / "m.onnx", Console(quiet=True), images=[str(tmp_path / "a.png")])
    assert agreement.masks >= 0.999
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    free = (encoder, decoder) not in TRANSFORMERS
    assert about["size"] == ("any" if free else "crop") and json.loads(about["architecture"])["decoder"] == decoder
    (mask,) = session.run(["mask"], {"images": np.zeros((3, 3, 64, 100 if free else 64), np.uint8)})
    assert mask.shape == (3, 64, 100 if free else 64)


def _replace_network(step_dir: Path, architecture: Architecture) -> None:
    """Another network, of random weights, in a step directory."""
    about = json.loads((step_dir / "model.json").read_text())
    model = make_network(architecture, about["head_sizes"])
    for head in model.heads:
        nn.init.normal_(head.weight, std=3.0)
    about["architecture"] = vars(architecture)
    (step_dir / "model.json").write_text(json.dumps(about))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, step_dir / "model.safetensors")
    (step_dir / "metrics.json").write_text("{}")


def test_files_of_the_first_versions_load(step_dir: Path) -> None:
    model, info = load_model(step_dir)
    about = json.loads((step_dir / "model.json").read_text())
    network = about.pop("architecture")
    about |= {"format": 1, "backbone": network["encoder"], "output_stride": network["stride"]}
    state = published_keys(load_file(step_dir / "model.safetensors"))
    assert {name.split(".")[0] for name in state} == {"backbone", "aspp", "heads"}
    assert upgrade_keys(state).keys() == model.state_dict().keys()
    (step_dir / "model.json").write_text(json.dumps(about))
    save_file(state, step_dir / "model.safetensors")
    (step_dir / "metrics.json").write_text("{}")
    again, info_again = load_model(step_dir)
    assert info_again == info
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("encoder", "crop", "message"),
    [
        ("vit_small_patch14_dinov2", 512, "no multiple of 112.*14 for the strides.*16 for model.output.*448 and 560"),
        ("starseg_test_swin", 48, "no multiple of 32.*32 for the strides 4, 8, 16, 32.*32 and 64"),
    ],
)
def test_a_crop_that_does_not_fit_is_refused(encoder: str, crop: int, message: str) -> None:
    model = make_network(Architecture(encoder), [1])
    with pytest.raises(UserError, match=rf"data\.crop: {crop} is {message}"):
        check_crop(model, crop)
    check_crop(model, model.multiple * 2)


def test_a_run_with_such_a_crop_writes_nothing(tiny: dict) -> None:
    tiny |= {"model": {"backbone": "starseg_test_swin", "pretrained": False}, "data": {**tiny["data"], "crop": 48}}
    with pytest.raises(UserError, match=r"data\.crop: 48"):
        train(parse_config(tiny), console=Console(quiet=True))
    assert not Path(tiny["out"]).exists()


def test_a_builder_of_another_library(step_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILDERS, "plain", lambda a, pretrained: BUILDERS["timm"](replace(a, options={}), pretrained))
    _replace_network(step_dir, Architecture("test_resnet", "linear", 8, "plain", {"of": "ours"}))
    assert load_info(step_dir).architecture.options == {"of": "ours"}
    assert load_model(step_dir)[0].stride == 8
    monkeypatch.delitem(BUILDERS, "plain")
    with pytest.raises(UserError, match="no builder 'plain' is registered here; known: timm"):
        load_model(step_dir)
    with pytest.raises(ValueError, match="registered already"):
        register_builder("timm")(BUILDERS["timm"])
