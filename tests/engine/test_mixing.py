"""What reaches a method beside images and labels: exemplars mixed into batches, saliency maps, notes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from starseg.config import parse_config
from starseg.contract import tiny_settings
from starseg.data.samples import EpochSampler
from starseg.engine.run_data import open_data
from starseg.engine.runner import train
from starseg.errors import UserError
from starseg.methods import METHODS, method_options

QUIET = Console(quiet=True)


def test_half_of_every_batch_is_exemplars_whatever_the_number_of_processes() -> None:
    one = list(EpochSampler(10, 4, [0, 1], (0, 1), True, exemplars=3))
    assert len(one) == 4
    for batch in one:
        assert [place >= 10 for _, place in batch] == [False, False, True, True]
        assert all(place < 13 for _, place in batch)
    crops = [epoch for batch in one for epoch, place in batch if place >= 10]
    assert len(set(crops)) == len(one), "an exemplar is cropped anew in every batch"
    shares = [list(EpochSampler(10, 4, [0, 1], (0, 1), True, rank, 2, exemplars=3)) for rank in (0, 1)]
    for whole, first, second in zip(one, *shares, strict=True):
        assert sorted(first + second, key=str) == sorted(whole, key=str)


@pytest.fixture
def saliency(shapes: Path, tmp_path: Path) -> Path:
    """Maps that mark exactly what the masks label."""
    folder = tmp_path / "saliency"
    folder.mkdir()
    for path in (shapes / "SegmentationClassAug").glob("*.png"):
        marked = np.asarray(Image.open(path)) % 255 > 0
        Image.fromarray(255 * marked.astype(np.uint8)).save(folder / path.name)
    return folder


def test_saliency_is_cropped_like_the_labels_and_exemplars_show_all_classes(
    shapes: Path, tmp_path: Path, saliency: Path
) -> None:
    settings = tiny_settings("ssul-m", shapes, tmp_path / "run") | {"ssul": {"saliency_dir": str(saliency)}}
    config = parse_config(settings)
    method = METHODS["ssul-m"](method_options("ssul-m", config))
    data = open_data(config, method, QUIET)
    exemplars = type(data.dataset.train)(*(column[:6] for column in vars(data.dataset.train).values()))
    batches = list(data.train_loader(2, [0], drop_last=True, exemplars=exemplars))
    assert len(batches) == data.samples(2, len(exemplars)) // 4 == len(data.positions(2, "train")) // 4
    old_labels = 0
    for batch in batches:
        saliency_maps, exemplar = batch.extras["saliency"], batch.extras["exemplar"]
        assert exemplar.tolist() == [False, False, True, True]
        own = ~exemplar
        labelled = (batch.labels[own] > 0) & (batch.labels[own] != 255)
        assert (saliency_maps[own][labelled] > 0).all(), "what is labelled is marked, pixel by pixel"
        assert not saliency_maps[exemplar].any()
        assert set(batch.labels[own].unique().tolist()) <= {0, 5, 255}
        old_labels += int(((batch.labels[exemplar] % 255 > 0) & (batch.labels[exemplar] < 5)).sum())
    assert old_labels, "exemplars are labelled with old classes too"


def test_ssul_without_saliency_is_marked_in_the_results(shapes: Path, tmp_path: Path, saliency: Path) -> None:
    settings = tiny_settings("ssul", shapes, tmp_path / "run")
    run = train(parse_config(settings), range(1), QUIET)
    (note,) = json.loads((run / "results.json").read_text())["run"]["notes"]
    assert "ssul without saliency maps" in note
    settings |= {"out": str(tmp_path / "with"), "ssul": {"saliency_dir": str(saliency)}}
    run = train(parse_config(settings), range(1), QUIET)
    assert json.loads((run / "results.json").read_text())["run"]["notes"] == []
    with pytest.raises(UserError, match=r"saliency_dir: .* is no folder"):
        train(parse_config({**settings, "ssul": {"saliency_dir": "/nowhere"}}), range(1), QUIET)
    next(saliency.glob("*.png")).unlink()
    with pytest.raises(UserError, match=r"saliency/.*\.png is missing, .* 1 of \d+ training images have none"):
        train(parse_config({**settings, "out": str(tmp_path / "gap")}), range(1), QUIET)
    assert not (tmp_path / "gap").exists()


def test_dft_keeps_the_heads_of_later_steps_beside_the_model(shapes: Path, tmp_path: Path) -> None:
    run = train(parse_config(tiny_settings("dft", shapes, tmp_path / "run")), range(2), QUIET)
    info = json.loads((run / "step_0" / "model.json").read_text())
    assert info["head_sizes"] == [3] and info["lead"] == ["background"]
    other = tiny_settings("dft", shapes, tmp_path / "other")
    lwf = train(parse_config(tiny_settings("lwf", shapes, tmp_path / "lwf")), range(1), QUIET)
    with pytest.raises(UserError, match="DFT needs the heads of all later steps"):
        train(parse_config({**other, "start_from": str(lwf / "step_0")}), range(2), QUIET)


def test_a_base_step_with_other_heads_is_refused(shapes: Path, tmp_path: Path) -> None:
    lwf = train(parse_config(tiny_settings("lwf", shapes, tmp_path / "lwf")), range(1), QUIET)
    settings = tiny_settings("finetune", shapes, tmp_path / "ft") | {"start_from": str(lwf / "step_0")}
    with pytest.raises(UserError, match="differs from this run in lead"):
        train(parse_config(settings), range(1), QUIET)


def test_broken_entry_points_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from starseg import methods

    broken = EntryPoint("mine", "no_such_module_of_mine", methods.ENTRY_POINTS)
    monkeypatch.setattr(methods, "entry_points", lambda group: [broken])
    with pytest.raises(UserError, match="method 'mine' of the installed package"):
        methods.load_entry_points()


def test_memories_and_groups_of_the_methods() -> None:
    sizes = {name: [m.recipes[key].memory_size for key in ("voc", "ade")] for name, m in METHODS.items() if m.memory}
    assert sizes["ssul-m"] == sizes["dkd-m"] == [100, 300]
    assert sizes["star-m"] == [50, 50] and sizes["star"] == [0, 0]
    assert METHODS["ssul"].memory is None and METHODS["mib"].memory is None
    assert METHODS["dft"].recipes["voc"].later_of("15-5").lr == 2e-2
    assert METHODS["plop"].recipes["voc"].later_of("10-1").epochs == 10
    assert torch.tensor([m.layout.conv for m in METHODS.values()]).sum() == 2
