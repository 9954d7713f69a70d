"""Small networks of other libraries with random weights, saved in each library's own way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

NAMES = ("wall", "road", "sky")
IDS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
DETR = {"layers": 1, "ffn_dim": 16, "attention_heads": 2}
QUERIES = {"MaskFormer": "MaskFormerForInstanceSegmentation"}
QUERIES |= {name: f"{name}ForUniversalSegmentation" for name in ("Mask2Former", "Eomt")}


class Original(NamedTuple):
    """A network, what `starseg adopt` is given of it, the sides of images it takes, and its mean and std."""

    network: nn.Module
    source: str
    weights: str | None
    classes: str | None
    size: tuple[int, int] = (96, 128)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    bgr: bool = False

    def logits(self, pixels: Tensor) -> Tensor:
        """The library's logits at the size of uint8 images [N, 3, H, W]."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        with torch.no_grad():
            images = (pixels / 255 - mean) / std
            found = logits_of(self.network(images.flip(1) if self.bgr else images))
        return nn.functional.interpolate(found, pixels.shape[-2:], mode="bilinear", align_corners=False)


def randomise(network: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Set weights with which signals neither vanish nor explode, and running statistics that fit them."""
    for name, module in network.named_modules():
        if name.endswith(".bn3"):  # of a ResNet: residual branches that are small do not amplify rounding
            nn.init.constant_(module.weight, 0.2)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(2):
            network.train()(images(size).float() / 64 - 2)
        found = logits_of(network.eval()(images(size).float() / 64 - 2))
        if isinstance(predictor := getattr(network, "class_predictor", None), nn.Linear):  # queries of several classes
            predictor.weight *= 10
            scores = network(images(size).float() / 64 - 2).class_queries_logits
            predictor.bias -= scores.mean((0, 1))
            return network
        # No class is predicted everywhere.
        last = [m for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and "aux" not in name]
        classifier = next(m for m in reversed(last) if m.out_channels == found.shape[1])
        assert classifier.bias is not None
        classifier.bias -= found.mean((0, 2, 3))
    return network


def images(size: tuple[int, int], count: int = 2) -> Tensor:
    """Smooth random images [N, 3, H, W] uint8."""
    coarse = torch.rand(count, 3, size[0] // 16, size[1] // 16)
    return (nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).byte()


def logits_of(result: Any) -> Tensor:
    """The logits in what a library's network returns; of a network of queries, its post-processing's semantic map."""
    if hasattr(result, "masks_queries_logits"):
        masks = result.masks_queries_logits
        if type(result).__name__.startswith(("Mask2Former", "Eomt")):
            side = (384, 384) if type(result).__name__.startswith("Mask2Former") else (64, 64)
            masks = nn.functional.interpolate(masks, size=side, mode="bilinear", align_corners=False)
        return torch.einsum("bqc,bqhw->bchw", result.class_queries_logits.softmax(-1)[..., :-1], masks.sigmoid())
    return result if isinstance(result, Tensor) else result["out"] if "out" in result else result["logits"]


def _torchvision(name: str, folder: Path) -> Original:
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    torch.save(randomise(network, (96, 128)).state_dict(), folder / "w.pth")
    return Original(network, f"torchvision:{name}", str(folder / "w.pth"), "background,a,b,c")


def _smp(kind: str, folder: Path) -> Original:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")
    options: dict[str, Any] = {"encoder_name": "resnet18"}
    if kind == "DPT":
        options = {"encoder_name": "tu-vit_tiny_patch16_224", "decoder_fusion_channels": 16}
        options |= {"decoder_intermediate_channels": [8, 8, 8, 8]}
    network = getattr(smp, kind)(encoder_weights=None, classes=4, **options)
    size = {"PAN": (128, 256), "DPT": (224, 224)}.get(kind, (96, 128))
    randomise(network, size).save_pretrained(folder / "net")
    return Original(network, str(folder / "net"), None, "background,a,b,c", size)


def hugging_face(kind: str) -> nn.Module:
    """A small network of transformers with three classes, none of which is the background."""
    t = pytest.importorskip("transformers", reason="needs transformers")
    stages = [f"stage{i}" for i in range(1, 5)]
    vit = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    pyramid = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4}
    swin = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4, "image_size": 64}
    detr = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in DETR.items()}
    configs: dict[str, Callable[[], Any]] = {
        "Segformer": lambda: t.SegformerConfig(**pyramid, decoder_hidden_size=32, num_attention_heads=[1] * 4, **IDS),
        "UperNet": lambda: t.UperNetConfig(
            backbone_config=t.ConvNextConfig(**pyramid, out_features=stages),
            **{"hidden_size": 32, "auxiliary_channels": 16, "auxiliary_in_channels": 24},
            **IDS,
        ),
        "UperNetSwin": lambda: t.UperNetConfig(
            backbone_config=t.SwinConfig(**swin, out_features=stages),
            **{"hidden_size": 32, "auxiliary_channels": 16, "auxiliary_in_channels": 32},
            **IDS,
        ),
        "MobileNetV2": lambda: t.MobileNetV2Config(output_stride=16, **IDS),
        "Beit": lambda: t.BeitConfig(
            **vit, num_hidden_layers=4, out_indices=[1, 2, 3, 4], use_relative_position_bias=True, **IDS
        ),
        "Data2VecVision": lambda: t.Data2VecVisionConfig(**vit, use_relative_position_bias=True, **IDS),
        "MobileViT": lambda: t.MobileViTConfig(
            **{"image_size": 64, "hidden_sizes": [16] * 3, "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32]},
            **{"num_attention_heads": 2, "aspp_out_channels": 16, "output_stride": 16},
            **IDS,
        ),
        "MobileViTV2": lambda: t.MobileViTV2Config(
            **{"image_size": 64, "base_attn_unit_dims": [16] * 3, "n_attn_blocks": [1] * 3, "width_multiplier": 0.25},
            aspp_out_channels=16,
            **IDS,
        ),
        "MaskFormer": lambda: t.MaskFormerConfig(
            backbone_config=t.SwinConfig(**swin, out_features=stages),
            decoder_config=t.DetrConfig(d_model=16, num_queries=8, **detr),
            **{"fpn_feature_size": 32, "mask_feature_size": 32},
            **IDS,
        ),
        "Mask2Former": lambda: t.Mask2FormerConfig(
            backbone_config=t.SwinConfig(**swin, out_features=stages),
            **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16},
            **{"dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2},
            num_queries=8,
            **IDS,
        ),
        "Eomt": lambda: t.EomtConfig(
            **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
            **{"num_blocks": 1, "num_queries": 8, "num_upscale_blocks": 1},
            **IDS,
        ),
        "DPT": lambda: t.DPTConfig(
            **{**vit, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False},
            **{"neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16},
            **IDS,
        ),
    }
    if kind in QUERIES:
        pytest.importorskip("scipy", reason="transformers needs it for networks of queries")
    name = QUERIES.get(kind, f"{kind.removesuffix('Swin')}ForSemanticSegmentation")
    return getattr(t, name)(configs[kind]())


def _transformers(kind: str, folder: Path) -> Original:
    network = hugging_face(kind)
    size = {"Mask2Former": (384, 384)}.get(kind, (96, 128))
    if kind in ("Beit", "Data2VecVision", "DPT", "Eomt"):
        size = (64, 64)
    randomise(network, size).save_pretrained(folder / "net")
    mean, std, bgr = [0.4, 0.5, 0.6], [0.5, 0.4, 0.3], kind.startswith("MobileViT")
    processor: dict[str, Any] = {"image_mean": mean, "image_std": std, "size": {"height": size[0], "width": size[0]}}
    if bgr:
        mean, std, processor = [0.0] * 3, [1.0] * 3, {"do_flip_channel_order": True, "size": {"shortest_edge": 96}}
    (folder / "net" / "preprocessor_config.json").write_text(json.dumps(processor))
    return Original(network, str(folder / "net"), None, None, size, tuple(mean), tuple(std), bgr)


LIBRARIES: dict[str, Callable[[str, Path], Original]] = {
    "torchvision": _torchvision,
    "smp": _smp,
    "transformers": _transformers,
}
