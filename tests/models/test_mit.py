"""SegFormer: Mix Transformer and all-MLP decoder equal those of transformers; published weight files load."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from starseg.contract import MethodHarness
from starseg.errors import UserError
from starseg.models import Architecture, Segmenter, make_network
from starseg.models.encoders import load_encoder_weights
from starseg.models.mit import timm_names

# Channels of the last stage and number of parameters in millions of the encoders, from the SegFormer paper (table 1).
PUBLISHED = {"b0": (256, 3.4), "b1": (512, 13.1), "b2": (512, 24.2), "b3": (512, 44.0), "b4": (512, 60.8)}
# Names in transformers and in the published files.
NAMES = (
    (r"stages\.(\d)\.patch_embeddings\.layer_norm", r"patch_embed\1.norm"),
    (r"stages\.(\d)\.patch_embeddings", r"patch_embed\1"),
    (r"stages\.(\d)\.blocks", r"block\1"),
    (r"stages\.(\d)\.layer_norm", r"norm\1"),
    ("attention.sequence_reduction.sequence_reduction", "attn.sr"),
    ("attention.sequence_reduction.layer_norm", "attn.norm"),
    ("attention.q_proj", "attn.q"),
    ("attention.o_proj", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
)


def _published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network of transformers with the names of the published files."""
    found = {}
    for name, value in state.items():
        if "k_proj" in name:
            value = torch.cat([value, state[name.replace("k_proj", "v_proj")]])
            name = name.replace("attention.k_proj", "attn.kv")
        for pattern, theirs in NAMES:
            name = re.sub(pattern, theirs, name)
        if "v_proj" not in name:
            found[re.sub(r"^([a-z_]+)(\d)", lambda match: f"{match[1]}{int(match[2]) + 1}", name)] = value
    return found


def _randomise(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)


@pytest.fixture
def original() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers; pip install 'starseg[transformers]'")
    network = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=3)).eval()
    if not hasattr(network.segformer, "stages"):
        pytest.skip("an earlier version of transformers, with other names of parameters")
    _randomise(network)
    return network


def _network(original: Any, path: Path) -> Segmenter:
    torch.save({**_published(original.segformer.state_dict()), "head.weight": torch.zeros(1000, 256)}, path)
    model = make_network(Architecture("mit_b0", "segformer", 4), [3], pretrained=path).eval()
    head = original.decode_head
    for ours, theirs in zip(model.decoder.project, head.linear_projections, strict=True):
        ours.weight.data, ours.bias.data = theirs.proj.weight.data[:, :, None, None], theirs.proj.bias.data
    # The maps are concatenated from shallow to deep, in SegFormer from deep to shallow.
    model.decoder.fuse[0].weight.data = torch.cat(head.linear_fuse.weight.data.split(256, 1)[::-1], 1)
    model.decoder.fuse[1].load_state_dict(head.batch_norm.state_dict())
    model.heads[0].load_state_dict(head.classifier.state_dict())
    return model


def test_the_network_equals_that_of_transformers(original: Any, tmp_path: Path) -> None:
    """With the weights through a file in the published form, and the published stride of 4."""
    model = _network(original, tmp_path / "mit_b0.pth")
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        ours, theirs = model(images, maps=True), original(images, output_hidden_states=True)
    for own, map_ in zip(ours.maps, theirs.hidden_states[-4:], strict=True):
        torch.testing.assert_close(own, map_, atol=2e-4, rtol=2e-4)
    assert ours.logits.shape == theirs.logits.shape == (2, 3, 24, 16)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("size", "published"), PUBLISHED.items())
def test_sizes_are_the_published_ones(size: str, published: tuple[int, float]) -> None:
    with torch.device("meta"):
        body = timm.create_model(f"mit_{size}", features_only=True)
    width, millions = published
    assert body.feature_info.channels()[-1] == width and body.feature_info.reduction() == [4, 8, 16, 32]
    assert sum(p.numel() for p in body.parameters()) / 1e6 == pytest.approx(millions, rel=0.04)


@pytest.mark.parametrize(
    "method", ["star-basic", "star-lite", "plop", "dkd", "ssul", "dft", "constellation", "segacil"]
)
def test_methods_learn_two_steps(method: str) -> None:
    """STAR learns three in test_encoders.py."""
    run = MethodHarness(method, architecture=Architecture("mit_b0", "segformer"))
    run.walk(2)
    assert run.model is not None and run.model.head_sizes == [3, 1] and run.model.stride == 16
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_names_of_other_files_do_not_change(tmp_path: Path) -> None:
    state = make_network(Architecture("mit_b0"), [1]).encoder.body.state_dict()
    assert timm_names(state).keys() == state.keys()
    torch.save(state, tmp_path / "own.pth")
    load_encoder_weights(make_network(Architecture("mit_b0"), [1]).encoder.body, tmp_path / "own.pth")


def test_weights_that_timm_does_not_have_are_asked_for_as_a_file() -> None:
    with pytest.raises(UserError, match=r"timm has no weights of 'mit_b2'; give a file"):
        make_network(Architecture("mit_b2", "segformer"), [1], pretrained=True)
