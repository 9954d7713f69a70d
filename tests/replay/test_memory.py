"""Exemplar memory: the selection's properties, and STAR-M's use of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from starseg.config import parse_config
from starseg.data.datasets import Split
from starseg.engine.exemplars import Memory, locate
from starseg.engine.setup import check_method
from starseg.errors import UserError
from starseg.experiments.train import train
from starseg.replay.memory import Exemplar, choose, merge, round_robin
from starseg.utils.files import read_json

CANDIDATES = st.lists(st.sets(st.integers(1, 5)), max_size=30).map(
    lambda shown: [Exemplar(f"image{i}", tuple(sorted(s))) for i, s in enumerate(shown)]
)


@given(CANDIDATES, st.integers(0, 40), st.integers(0, 9))
def test_a_memory_is_as_large_as_it_can_be_and_balanced(candidates: list[Exemplar], size: int, seed: int) -> None:
    chosen = choose(candidates, [1, 2, 3], size, seed)
    useful = [e for e in candidates if {1, 2, 3} & set(e.classes)]
    assert len(chosen) == len(set(chosen)) == min(size, len(useful))
    assert set(chosen) <= set(useful)
    per_class = round_robin(candidates, [1, 2, 3], size)
    taken = {c: len(e) for c, e in per_class.items()}
    left = set(candidates) - {e for chosen in per_class.values() for e in chosen}
    for c in taken:
        # A class falls behind another by more than one only when it has no candidate left.
        if max(taken.values()) - taken[c] > 1:
            assert not [e for e in left if c in e.classes]


def test_merge_combines_the_classes_of_an_image() -> None:
    assert merge([Exemplar("a", (3,)), Exemplar("b", ()), Exemplar("a", (1, 3))]) == [
        Exemplar("a", (1, 3)),
        Exemplar("b", ()),
    ]


@pytest.fixture
def star_m(tiny: dict, tmp_path: Path) -> dict:
    # The masks' order of steps is permuted on purpose: memories hold dataset ids.
    tiny["task"]["steps"] = [["heart", "square", "triangle"], ["hexagon"], ["disc"]]
    return {**tiny, "method": "star-m", "memory": {"size": 6, "copy": True}, "star": {"pos_weight": 3}}


def test_star_m_keeps_images_of_old_classes(star_m: dict) -> None:
    console = Console(record=True, width=120)
    run = train(parse_config(star_m), console=console)
    text = console.export_text()
    assert "step 1: 6 old images as exemplars" in text
    images = {t: read_json(run / f"step_{t}" / "metrics.json") for t in range(3)}
    assert [images[t]["exemplars"] for t in range(3)] == [0, 6, 6]
    assert images[2]["exemplar_bytes"] > 1000 and images[0]["exemplar_bytes"] == 0
    memory = json.loads((run / "step_2" / "memory.json").read_text())
    assert list(memory) == ["step_1", "step_2"]
    for step, old in (("step_1", {5, 2, 3}), ("step_2", {5, 2, 3, 4})):
        entries = memory[step]["memory_candidates"]
        assert len(entries) == 6 and all(set(classes) & old for _, classes in entries)
        assert memory[step]["memory_list"] == sorted(name for name, _ in entries)
        assert {c for _, classes in entries for c in classes} >= old - {4}
    copies = sorted(p.name for p in (run / "step_2" / "memory" / "images").iterdir())
    assert copies == sorted(Path(name.split()[0]).name for name, _ in memory["step_2"]["memory_candidates"])


def test_a_step_run_alone_draws_the_same_memory(star_m: dict, tmp_path: Path) -> None:
    whole = train(parse_config(star_m), range(2), Console(quiet=True))
    single = parse_config({**star_m, "out": str(tmp_path / "alone")})
    shutil.copytree(whole / "step_0", tmp_path / "alone" / "step_0")
    shutil.copy(whole / "config.yaml", tmp_path / "alone")
    train(single, range(1, 2), Console(quiet=True))
    assert read_json(single.run_dir / "step_1" / "memory.json") == read_json(whole / "step_1" / "memory.json")


def test_a_method_without_a_memory_refuses_one(tiny: dict) -> None:
    with pytest.raises(UserError, match=r"memory\.size: method finetune keeps no images"):
        check_method(parse_config({**tiny, "method": "finetune", "memory": {"size": 5}}))
    assert np.isclose(parse_config({**tiny, "memory": {"size": 5}}).memory.size, 5)


def test_copies_of_images_with_the_same_stem_are_apart(tmp_path: Path) -> None:
    names = [
        "masks/a/1",
        "masks/b/1",
        "my photo 1",
        "my photo 2",
        "x.1",
        "x.2",
        "2007_000033",
        "/JPEGImages/q.jpg /M/q.png",
    ]
    images, masks = ([tmp_path / f"{i}.{kind}" for i in range(len(names))] for kind in ("jpg", "png"))
    for file in (*images, *masks):
        file.write_text(file.name)
    files = Split(tuple(images), tuple(masks), tuple(names))
    Memory(tuple(Exemplar(name, (1,)) for name in names), files).save(
        tmp_path / "step_1", tmp_path / "step_0", 1, copy=True
    )
    found = locate(names, Split((), (), ()), tmp_path / "step_1")
    assert [path.read_text() for path in (*found.images, *found.masks)] == [file.name for file in (*images, *masks)]
    assert [path.name for path in found.images[-2:]] == ["2007_000033.jpg", "q.jpg"]
