"""A published checkpoint with the golden weights is read and written under its own names (docs/reference/golden.md)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity.golden import check_close, document, tensors
from parity.test_model import generated
from starseg.compat.settings import parse_published, read_published, set_key
from starseg.compat.weights import load_checkpoint, save_published
from starseg.data.datasets import DATASETS
from starseg.ops.bilinear import resize
from starseg.replay.bank import PrototypeBank

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Classes of each head of the golden network; task "15-1" is replaced by one that has them."""
    sizes = document("state_dict_keys")["classes"]
    ids = iter(range(1, 1 + sum(sizes)))
    steps = tuple(tuple(next(ids) for _ in range(size)) for size in sizes)
    spec = DATASETS["voc"]
    monkeypatch.setitem(DATASETS, "voc", replace(spec, tasks={**spec.tasks, "15-1": steps}))
    return sizes


def test_keys_shapes_and_outputs(sizes: list[int], tmp_path: Path, shapes: Path) -> None:
    keys = document("state_dict_keys")
    state = {k["name"]: torch.from_numpy(generated(k["name"], k["shape"], keys["salt"])) for k in keys["keys"]}
    torch.save({"arch": "DeepLabV3", "epoch": 60, "state_dict": state, "monitor_best": 0}, tmp_path / "weight.pth")
    tree = read_published(ROOT / "configs" / "config_voc.json")
    names = shapes / "classes.txt"
    (tmp_path / "data").mkdir()
    for part in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets"):
        (tmp_path / "data" / part).symlink_to(shapes / part)
    assert names.is_file()  # its copy is left out: without it the classes are VOC's
    set_key(tree, "data_loader.args.root", str(tmp_path / "data"))
    set_key(tree, "data_loader.args.task.name", "15-1")
    model, info = load_checkpoint(tmp_path / "weight.pth", parse_published(tree, "golden"))
    classes = sum(sizes)
    assert (info.head_sizes, info.step) == (sizes, len(sizes) - 1)
    assert info.dataset_ids == list(range(1 + classes))
    g = tensors("model_io", "in0/")
    with torch.inference_mode():
        check_close(resize(model(g["image"]).logits, g["image"].shape[-2:]), g["logits"], 1e-4)

    vectors, numbers = torch.zeros(classes, 256), torch.zeros(classes)
    zeros = PrototypeBank(torch.zeros(1 + classes), vectors, vectors, numbers, numbers)
    save_published(tmp_path, 60, model.state_dict(), zeros.state_dict())
    written = torch.load(tmp_path / "checkpoint-epoch60.pth", weights_only=True)["state_dict"]
    assert list(written) == list(state)
    assert all(torch.equal(written[k], state[k]) for k in state)
