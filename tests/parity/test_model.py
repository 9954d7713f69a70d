"""The network with generated weights (docs/reference/golden.md, model_io.npz)."""

import hashlib
import re
import zlib

import numpy as np
import pytest
import torch

from parity.golden import check_close, document, tensors
from starseg.config import PUBLISHED
from starseg.engine.fit import make_optimizer
from starseg.methods import METHODS, StepContext
from starseg.models import Architecture, Segmenter, make_network
from starseg.models.architectures import published_keys
from starseg.ops.bilinear import resize
from starseg.tasks import TaskSequence


def generated(key: str, shape: list[int], salt: str) -> np.ndarray:
    g = np.random.default_rng(zlib.crc32((salt + key).encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_mean"):
        value = 0.1 * g.standard_normal(shape)
    elif key.endswith("running_var"):
        value = g.uniform(0.5, 1.5, shape)
    elif len(shape) == 4:
        value = np.sqrt(2 / np.prod(shape[1:])) * g.standard_normal(shape)
    elif len(shape) == 1 and key.endswith(".weight"):
        value = g.uniform(*((0.1, 0.3) if ".bn3." in key else (0.5, 1.5)), shape)
    else:
        value = 0.1 * g.standard_normal(shape)
    return value.astype(np.float32)


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the published names."""
    return {re.sub(r"^heads\.", "cls.", name): value for name, value in published_keys(state).items()}


@pytest.fixture(scope="module")
def model() -> Segmenter:
    keys = document("state_dict_keys")
    network = make_network(Architecture("resnet101"), keys["classes"])
    own = published(network.state_dict())
    assert {k: list(v.shape) for k, v in own.items()} == {k["name"]: k["shape"] for k in keys["keys"]}
    assert sum(p.numel() for p in network.parameters()) == keys["n_parameters"]
    for entry in keys["keys"]:
        value = generated(entry["name"], entry["shape"], keys["salt"])
        assert hashlib.sha256(value.tobytes()).hexdigest()[:16] == entry["sha256_16"]
        own[entry["name"]].copy_(torch.from_numpy(value))
    return network.eval()


@pytest.mark.parametrize("index", range(len(document("model_layer_stats")["runs"])))
@torch.inference_mode()
def test_outputs(model: Segmenter, index: int) -> None:
    run = document("model_layer_stats")["runs"][index]
    g = tensors("model_io", f"in{run['input']}/")
    extra = g["fake_features"].T if "fake_features" in g else None
    output = model(g["image"], extra, maps=True)
    check_close(output.features, g["x_pl"], 1e-4)
    check_close(output.logits, g["logits_small"], 1e-4)
    check_close(resize(output.logits, g["image"].shape[-2:]), g["logits"], 1e-4)
    if extra is not None:
        check_close(output.extra_logits.T, g["logits_fake"], 1e-4)
        cells = output.logits.movedim(1, -1)[g["region_bg"].bool()]
        check_close(cells.T, g["logits_extra_bg"], 1e-4)
    maps = [*output.maps[-4:], output.maps[-1], output.features]
    for layer, actual in zip(run["layers"], maps, strict=True):
        assert list(actual.shape) == layer["shape"]
        summary = [actual.mean(), actual.std(unbiased=False), actual.min(), actual.max()]
        check_close(torch.stack(summary), torch.tensor([layer[k] for k in ("mean", "std", "min", "max")]), 1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_optimizer_groups(frozen: bool) -> None:
    stats, sizes = document("model_layer_stats"), document("state_dict_keys")["classes"]
    network = make_network(Architecture("resnet101"), sizes)
    ids = iter(range(1, 1 + sum(sizes)))
    steps = tuple(tuple(next(ids) for _ in range(n)) for n in sizes)
    names = tuple(map(str, range(1 + sum(sizes))))
    task = TaskSequence("golden", steps, names)
    ctx = StepContext(task, len(sizes) - 1, network, network, 1, iter, torch.Generator(), PUBLISHED)
    method = METHODS["star"](METHODS["star"].Options())
    if frozen:
        method.freeze(ctx)
    groups = {g["name"]: g["params"] for g in make_optimizer(method, ctx, 1e-3, 1e-4).param_groups}
    want = stats["param_groups"][f"freeze_all_bn={frozen}"]
    pairs = {"encoder": "backbone", "decoder": "aspp", "old heads": "old_classifier", "new head": "new_classifier"}
    for ours, theirs in pairs.items():
        assert len(groups[ours]) == want[theirs]["n_tensors"]
        assert sum(p.numel() for p in groups[ours]) == want[theirs]["n_elements"]
        assert sum(p.ndim == 1 for p in groups[ours]) == want[theirs]["n_1d"]


def test_batch_norm_and_dropout_settings() -> None:
    stats, network = document("model_layer_stats"), make_network(Architecture("resnet101"), [1])

    def norms(part: torch.nn.Module) -> list[torch.nn.BatchNorm2d]:
        return [m for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    assert sorted({m.momentum for m in norms(network.encoder)}) == stats["bn"]["momentum_backbone"]
    assert sorted({m.momentum for m in norms(network.decoder)}) == stats["bn"]["momentum_elsewhere"]
    assert sorted({m.eps for m in norms(network)}) == stats["bn"]["eps"]
    assert sorted({m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)}) == stats["dropout_p"]
