import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from rich.console import Console

from starseg.config import TrainConfig, parse_config
from starseg.engine.checkpoint import load_bank, load_model
from starseg.engine.evaluate import evaluate_model
from starseg.engine.fit import StepTraining
from starseg.engine.rundir import resolve
from starseg.engine.runner import train
from starseg.engine.state import write_state
from starseg.errors import UserError
from starseg.report.facts import time_split

QUIET = Console(quiet=True)


def _run(settings: dict, steps: range | None = None) -> dict:
    return json.loads((train(parse_config(settings), steps, QUIET) / "results.json").read_text())


@pytest.mark.parametrize("method", ["star", "finetune", "joint", "mib"])
def test_every_method_runs_the_sequence(tiny: dict, method: str) -> None:
    results = _run({**tiny, "method": method})
    run, steps = Path(tiny["out"]), results["steps"]
    assert results["run"]["method"] == method and results["run"]["task"] == "tiny"
    assert list(steps[-1]["iou"]) == ["background", "disc", "square", "triangle", "hexagon", "heart"]
    assert [s["new_classes"] for s in steps][-1][-1] == "heart"
    for entry in steps:
        assert {"step", "iou", "miou", "pixel_accuracy", "seconds", "images", "bank_bytes"} <= set(entry)
        folder = run / f"step_{entry['step']}"
        assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "model.json", "metrics.json", "logs"}
        parts = {"statistics", "data", "new forward", "loss", "backward", "optimizer", "evaluation"}
        parts |= {"old forward"} if entry["step"] and method != "finetune" else set()
        assert set(time_split(folder)) == parts and sum(time_split(folder).values()) <= entry["seconds"] + 0.01
        again = evaluate_model(*load_model(folder), parse_config({**tiny, "method": method}), QUIET)
        assert again["iou"] == entry["iou"]
    assert set(steps[-1]["miou"]) == {"old", "new", "all", "harmonic"}


def test_the_bank_grows_and_keeps_its_old_rows(tiny: dict) -> None:
    _run(tiny)
    banks = [load_bank(Path(tiny["out"]) / f"step_{t}") for t in range(3)]
    assert [len(b["prototypes"]) for b in banks] == [3, 4, 5]
    for before, after in itertools.pairwise(banks):
        for name in ("prototypes", "noise", "norm_mean", "norm_std"):
            assert torch.equal(after[name][: len(before[name])], before[name])


def test_the_same_seed_gives_the_same_run_in_parts_or_at_once(tiny: dict, tmp_path: Path) -> None:
    whole = _run(tiny)
    parts = {**tiny, "out": str(tmp_path / "parts"), "data": {**tiny["data"], "workers": 2, "cache": "ram"}}
    for step in range(3):
        split = _run(parts, range(step, step + 1))
    assert [s["iou"] for s in split["steps"]] == [s["iou"] for s in whole["steps"]]
    models = [load_model(Path(s["out"]) / "step_2")[0].state_dict() for s in (tiny, parts)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])


def test_compiled_networks_train_alike(tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile, but not translated to machine code, which would take minutes."""
    _run(tiny, range(2))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = {**tiny, "out": str(tmp_path / "compiled"), "train": {**tiny["train"], "compile": True}}
    _run({**compiled, "start_from": str(Path(tiny["out"]) / "step_0")}, range(2))
    plain, traced = (load_model(Path(s["out"]) / "step_1")[0].state_dict() for s in (tiny, compiled))
    for name, want in plain.items():
        torch.testing.assert_close(traced[name], want, rtol=1e-3, atol=1e-4)


def test_old_heads_stay_put_unless_published(tiny: dict, tmp_path: Path) -> None:
    for compat in (None, "published"):
        settings = {**tiny, "compat": compat, "out": str(tmp_path / f"run-{compat}")}
        _run(settings, range(2))
        heads = [load_model(Path(settings["out"]) / f"step_{t}")[0].heads[0].weight for t in range(2)]
        assert torch.equal(*heads) == (compat is None)


def test_finished_steps_are_skipped_and_a_broken_one_is_run_again(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    real = StepTraining.run

    def interrupted(self: StepTraining, *args: object) -> None:
        if self.ctx.step == 1:
            raise KeyboardInterrupt
        real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(StepTraining, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(tiny)
    run = Path(tiny["out"])
    done = (run / "step_0" / "model.safetensors").stat().st_mtime_ns
    assert len(json.loads((run / "results.json").read_text())["steps"]) == 1
    monkeypatch.undo()
    assert len(_run(tiny)["steps"]) == 3
    assert (run / "step_0" / "model.safetensors").stat().st_mtime_ns == done


def test_a_broken_step_goes_on_with_the_images_it_began_with(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny["data"]["root"], root)
    tiny["data"]["root"] = str(root)
    images = root / "ImageSets/Segmentation/train_aug.txt"
    whole = images.read_text()

    def interrupted(folder: Path, state: dict) -> None:
        write_state(folder, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("starseg.engine.runner.write_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(tiny, range(1))
    images.write_text("\n".join(whole.splitlines()[:30]))
    with pytest.raises(UserError, match=r"step_0/resume\.ckpt: step 0 was begun with other training images"):
        _run(tiny, range(1))
    images.write_text(whole)
    folder = Path(tiny["out"]) / "step_0"
    console = Console(record=True)
    train(parse_config(tiny), range(1), console)
    assert "step 0: going on" in console.export_text() and (folder / "metrics.json").is_file()


def test_a_state_that_names_no_images_is_gone_on_from(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, state: dict) -> None:
        write_state(folder, {k: v for k, v in state.items() if k != "images"})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("starseg.engine.runner.write_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(tiny, range(1))
    assert len(_run(tiny, range(1))["steps"]) == 1


def test_a_permuted_order_is_reported_in_names(tiny: dict) -> None:
    steps = [["heart", "disc", "triangle"], ["hexagon"], ["square"]]
    results = _run({**tiny, "task": {"name": "permuted", "steps": steps, "setting": "disjoint"}, "data": tiny["data"]})
    assert list(results["steps"][-1]["iou"]) == ["background", "heart", "disc", "triangle", "hexagon", "square"]
    info = json.loads((Path(tiny["out"]) / "step_2" / "model.json").read_text())
    assert info["dataset_ids"] == [0, 5, 1, 3, 4, 2]


def test_step_0_can_come_from_another_run(tiny: dict, tmp_path: Path) -> None:
    _run(tiny, range(1))
    source = Path(tiny["out"]) / "step_0"
    adopted = {**tiny, "method": "finetune", "out": str(tmp_path / "ft"), "start_from": str(source)}
    (tmp_path / "ft" / "step_0" / "logs").mkdir(parents=True)  # left by a run that was killed before its first save
    assert len(_run(adopted)["steps"]) == 3
    assert not (tmp_path / "ft" / "step_0" / "logs").exists()
    other = {**adopted, "out": str(tmp_path / "ft2"), "data": {**tiny["data"], "crop": 32}}
    with pytest.raises(UserError, match=r"start_from: .* differs from this run in crop"):
        _run(other)


def test_star_refuses_a_step_without_bank(tiny: dict, tmp_path: Path) -> None:
    _run({**tiny, "method": "finetune"}, range(1))
    with pytest.raises(UserError, match="needs the prototype bank"):
        _run({**tiny, "out": str(tmp_path / "s"), "start_from": str(Path(tiny["out"]) / "step_0")})


def test_mistakes_are_found_before_training(tiny: dict, tmp_path: Path) -> None:
    def refused(message: str, steps: range | None = None, **changed: object) -> None:
        with pytest.raises(UserError, match=message):
            _run({**tiny, **changed}, steps)

    refused(r"step \d: \d+ training images, fewer than train.batch_size", train={"batch_size": 37})
    refused("task tiny has steps 0-2, asked for 2-3", range(2, 4))
    refused("step 1 needs step 0", range(1, 2))
    refused(
        "no training image shows heart",
        task={"steps": [["disc"], ["heart"]]},
        data=_without(tiny, tmp_path),
    )


def _without(tiny: dict, tmp_path: Path) -> dict:
    """The data set with the heart's images left out of the training list."""
    import numpy as np
    from PIL import Image

    root = tmp_path / "noheart"
    shutil.copytree(tiny["data"]["root"], root)
    lines = (root / "ImageSets/Segmentation/train_aug.txt").read_text().splitlines()
    kept = [line for line in lines if not (np.asarray(Image.open(root / line.split()[1].lstrip("/"))) == 5).any()]
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(kept))
    return {**tiny["data"], "root": str(root)}


def test_a_directory_belongs_to_one_configuration(tiny: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.backbone"):
        _run({**tiny, "model": {"backbone": "resnet1001"}})
    _run(tiny, range(1))
    with pytest.raises(UserError, match=r"another configuration:\n  train.base.lr: 0.01 there, 0.02 now"):
        _run({**tiny, "train": {**tiny["train"], "base": {"epochs": 1, "lr": 0.02}}})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        _run({**tiny, "out": str(foreign)})
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_a_config_yaml_of_one_s_own_is_not_overwritten(tiny: dict, tmp_path: Path) -> None:
    own = tmp_path / "proj" / "config.yaml"
    own.parent.mkdir()
    own.write_text("# my notes\n" + yaml.safe_dump(tiny))
    before = own.read_text()
    with pytest.raises(UserError, match=r"proj/config\.yaml: .*overwritten.*--out"):
        _run({**tiny, "out": str(own.parent)}, range(1))
    assert own.read_text() == before and list(own.parent.iterdir()) == [own]
    # A run's copy without its hidden files is a run still.
    run = Path(tiny["out"])
    _run(tiny, range(1))
    (run / ".lock").unlink()
    _run(tiny, range(1))


def test_a_diverging_loss_stops_with_its_terms(tiny: dict) -> None:
    with pytest.raises(UserError, match=r"step 0, epoch 1, iteration \d+: a loss is no finite number: .*(nan|inf)"):
        _run({**tiny, "train": {**tiny["train"], "base": {"epochs": 2, "lr": 1e30}}})
    assert not (Path(tiny["out"]) / "step_0" / "metrics.json").exists()


def test_a_loss_scale_is_that_of_its_step(tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that begins in a new process ends as one that follows another."""

    def half(config: TrainConfig) -> Fabric:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    monkeypatch.setattr("starseg.engine.runner.make_fabric", half)
    once, twice = (parse_config({**tiny, "out": str(tmp_path / name)}) for name in ("once", "twice"))
    train(once, range(2), Console(quiet=True))
    for step in range(2):
        train(twice, range(step, step + 1), Console(quiet=True))
    files = [(config.run_dir / "step_1" / "model.safetensors").read_bytes() for config in (once, twice)]
    assert files[0] == files[1]


def test_a_run_keeps_where_its_data_lie(tiny: dict) -> None:
    """So that it is scored and shown from any folder."""
    config = parse_config({**tiny, "data": {"root": "photos"}})
    assert resolve(config).data.root == Path.cwd() / "photos"
