"""`starseg learn` with methods other than STAR: each one continues from a step, or says why it cannot."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from starseg.config import load_config
from starseg.contract import MethodHarness
from starseg.engine.checkpoint import StepInfo, load_info
from starseg.errors import UserError
from starseg.finetuning.prepare import default_method, open_source_step
from starseg.finetuning.run import LearnRequest, learn
from starseg.methods import METHODS

CONTINUE_FROM = {
    "star": {"adapter", "finetune", "star", "star-lite", "star-m"},
    "finetune": {"finetune"},
    "mib": {"constellation-extend", "ewf", "ilt", "lwf", "mib", "plop"},
    "ssul": {"ssul", "ssul-m"},
    "dkd": {"dkd", "dkd-m"},
}


@pytest.mark.parametrize("name", CONTINUE_FROM)
def test_which_methods_continue_from_a_step(name: str) -> None:
    run = MethodHarness(name)
    run.walk(1)
    layout = METHODS[name].layout
    info = StepInfo(
        architecture=run.architecture,
        head_sizes=[3],
        names=list(run.task.class_names(0)),
        dataset_ids=list(run.task.dataset_ids(0)),
        method=name,
        dataset="voc",
        task="rehearsal",
        setting="overlap",
        step=0,
        seed=0,
        compat=None,
        base=3,
        crop=64,
        test_fill=0,
        lead=list(layout.lead),
        conv_heads=layout.conv,
        hidden=layout.hidden,
    )
    reasons = {other: default_method(other).can_continue(info, run.state) for other in METHODS}
    assert {other for other, reason in reasons.items() if reason is None} == CONTINUE_FROM[name]
    assert "all classes in one step" in str(reasons["joint"]) and "heads of all steps" in str(reasons["dft"])


def test_mib_continues_where_lwf_began(shapes: Path, tmp_path: Path) -> None:
    images, masks = shapes / "JPEGImages", shapes / "SegmentationClassAug"
    for path in images.iterdir():
        target = masks / f"{path.stem}.png"
        if not target.is_file():
            target = shapes / "SegmentationClass" / target.name
        for source, name in ((path, "photos"), (target, "masks")):
            copy = tmp_path / name / source.name
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(source.read_bytes())
    quiet, folders = Console(quiet=True), (tmp_path / "photos", tmp_path / "masks")
    (tmp_path / "all.txt").write_text("background\ndisc\nsquare\ntriangle\nhexagon\nheart\n")
    request = LearnRequest(None, *folders, str(tmp_path / "all.txt"), tmp_path / "first", "lwf", "test_resnet", False)
    first = learn(LearnRequest(**{**vars(request), "crop": 64, "epochs": 1}), quiet)
    assert first is not None and load_info(first).lead == ["background"]
    with pytest.raises(UserError, match=r"star cannot continue from it: .* or ewf or ilt or lwf or mib or plop"):
        open_source_step(first, "star")
    (tmp_path / "more.txt").write_text("background\ndisc\nsquare\ntriangle\nhexagon\nstar\n")
    request = LearnRequest(first, *folders, str(tmp_path / "more.txt"), tmp_path / "run", "mib", epochs=1)
    done = learn(request, quiet)
    assert done is not None and load_info(done).names[-1] == "star" and load_info(done).method == "mib"
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.recipe == "voc" and config.method_section("mib") == {"kd": 10.0, "alpha": 1.0}


def test_replay_is_scaled_by_the_method() -> None:
    star = METHODS["star"](METHODS["star"].Options(replay=0.5))
    assert star.scale_replay(0.5) == {"replay": 0.25} and star.replay_counts() is None
    run = MethodHarness("star")
    run.walk(1)
    star.load_state_dict(run.state)
    assert torch.equal(star.replay_counts(), run.state["counts"])
    assert METHODS["mib"](METHODS["mib"].Options()).scale_replay(0.5) == {}
