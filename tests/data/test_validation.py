"""The validation split: cut deterministically, stratified by class, from training images only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from starseg.config import DataConfig, load_config, override, parse_config
from starseg.data import validation
from starseg.data.datasets import open_dataset
from starseg.data.index import class_index
from starseg.data.validation import open_splits
from starseg.engine.run_data import open_data
from starseg.engine.setup import make_method
from starseg.errors import UserError


def test_the_held_out_images_take_the_place_of_the_test_images(shapes: Path) -> None:
    plain, cut = open_dataset(DataConfig(root=shapes)), open_splits(DataConfig(root=shapes, validation=0.25))
    assert open_splits(DataConfig(root=shapes)) == plain
    assert set(cut.train.ids) | set(cut.test.ids) == set(plain.train.ids)
    assert not set(cut.train.ids) & set(cut.test.ids)
    assert not set(cut.test.images) & set(plain.test.images) and set(cut.test.masks) <= set(plain.train.masks)
    assert len(cut.test) == pytest.approx(12, abs=3) and open_splits(DataConfig(root=shapes, validation=0.25)) == cut
    for split in (cut.train, cut.test):
        assert (class_index(cut, split)[:, 1:6] > 0).any(0).all()


def test_a_data_set_of_single_images_is_refused(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(DataConfig(root=shapes))
    one = replace(
        dataset,
        train=type(dataset.train)(*(x[:1] for x in (dataset.train.images, dataset.train.masks, dataset.train.ids))),
    )
    monkeypatch.setattr(validation, "open_dataset", lambda _: one)
    with pytest.raises(UserError, match=r"data\.validation: none of the 1 training images"):
        open_splits(DataConfig(root=shapes, validation=0.25))


def test_published_lists_select_among_the_remaining_training_images(tiny: dict, shapes: Path, tmp_path: Path) -> None:
    plain = open_dataset(DataConfig(root=shapes))
    folder = tmp_path / "lists" / "voc"
    folder.mkdir(parents=True)
    np.save(folder / "overlap_tiny_train_00.npy", np.array(plain.train.ids[:40]))
    np.save(folder / "overlap_tiny_test_00.npy", np.array(plain.test.ids[:1]))
    tiny["data"] |= {"lists": str(tmp_path / "lists"), "validation": 0.25}
    config = parse_config(tiny)
    data = open_data(config, make_method(config), Console(quiet=True))
    chosen = {data.dataset.train.ids[i] for i in data.positions(0, "train")}
    assert chosen == set(plain.train.ids[:40]) - set(data.dataset.test.ids)
    assert len(data.positions(0, "test")) > 1
    np.save(folder / "overlap_tiny_train_00.npy", np.array(["nobody"]))
    with pytest.raises(UserError, match="lists 'nobody'"):
        data.positions(0, "train")


def test_the_share_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: {name: 15-1}")
    for share in (0, 1, -0.1):
        with pytest.raises(UserError, match=r"data\.validation: input should be"):
            load_config(path, [override("data.validation", share)])
