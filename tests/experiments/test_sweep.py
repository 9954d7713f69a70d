"""Sweeps: the grid, shared base steps, tuning on held-out training images, the final comparison."""

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from starseg.cli.main import main
from starseg.config import override, parse_config
from starseg.errors import UserError
from starseg.experiments.sweep import Point, make_sweep, parse_grid
from starseg.experiments.train import train
from starseg.experiments.tuning import run_sweep, tune
from starseg.methods import METHODS

LATER = "train.later.lr=0.001,0.002"
NO_RECIPE = ("data.dataset=folder", "train.later.lr=null", "train.warmup=0", "memory.size=0", "star.pos_weight=4")


@pytest.fixture
def config(tiny: dict, tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    del tiny["out"], tiny["method"]
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.fixture
def run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    def run(*argv: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["starseg", "compare", str(config), "--out", str(tmp_path / "out"), *argv])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert (stopped.value.code or 0) == code, said.err
        return said.out + said.err

    return run


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_values_are_read_as_the_configuration_reads_them() -> None:
    grid = parse_grid(["train.base.lr=0.01,null", "star.replay=[1,2],{a: b},x", "memory.size=0"])
    assert grid == {"train.base.lr": [0.01, None], "star.replay": [[1, 2], {"a": "b"}, "x"], "memory.size": [0]}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.root=a,b", "data.root: is no key that can be swept"),
        ("out=a,b", "out: is no key"),
        ("task.name=15-1,15-5", "task.name: is no key"),
        ("seed=0,1", "seed: is no key"),
        ("train.base=1", "train.base: is no key that can be swept; did you mean 'train.base.lr'"),
        ("train.base.rate=1", "train.base.rate: is no key"),
        ("constelation.x=1", "constelation.x: is no key"),
        ("star=1", "star: is no key"),
        ("=1", "expected KEY=V1,V2"),
        ("train.base.lr", "expected KEY=V1,V2,..., such as"),
        ("train.base.lr=", "expected KEY=V1,V2,..., such as"),
        ("train.base.lr=0.1]", "values as in YAML"),
        ("star.replay=2020-01-01", "values as in YAML"),
        ("train.base.lr=0.1,0.10", "gives a value twice"),
    ],
)
def test_a_malformed_sweep_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--sweep .*{message}"):
        parse_grid([assignment])


def test_a_key_is_given_once() -> None:
    with pytest.raises(UserError, match=r"--sweep train\.base\.lr: given twice"):
        parse_grid(["train.base.lr=0.1", "train.base.lr=0.2"])


def test_mistakes_are_found_before_training(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(message: str, *sweep: str, methods: tuple[str, ...] = ("star", "mib"), overrides: tuple = ()) -> None:
        with pytest.raises(UserError, match=message):
            make_sweep(config, methods, [0], out, overrides, sweep)

    refused("--methods: unknown nobody", LATER, methods=("star", "nobody"))
    refused(r"train\.base\.lr: input should be greater than 0, got -1", "train.base.lr=0.1,-1")
    refused(r"star\.nothing: unknown key", "star.nothing=1,2")
    refused(r"--sweep plop\.pod: concerns none of the compared methods \(star, mib\)", "plop.pod=1,2")
    refused(r"--sweep train\.later\.lr: concerns none", LATER, methods=("joint",))
    refused("no recipe for method star.* give train.later.lr,", LATER, methods=("star",), overrides=NO_RECIPE)
    refused("start_from: a sweep trains step 0", LATER, overrides=("start_from=somewhere",))
    assert not out.exists()
    (out / "star_seed0").mkdir(parents=True)
    (out / "star_seed0" / "config.yaml").touch()
    refused("holds a comparison without --sweep", LATER)


def test_a_key_concerns_the_methods_that_use_it(config: Path, tmp_path: Path) -> None:
    sweep = ["memory.size=0,5", "plop.pod=0.1,0.2", LATER]
    methods = ["star-m", "plop", "joint", "mib", "segacil", "constellation"]
    points = make_sweep(config, methods, [0], tmp_path / "out", [], sweep).points
    keys = {method: {key for point in found for key in point.setting} for method, found in points.items()}
    later = "train.later.lr"
    concerned = {"star-m": {"memory.size", later}, "plop": {"plop.pod", later}, "mib": {later}}
    assert keys == concerned | {"joint": set(), "segacil": set(), "constellation": set()}
    assert [len(found) for found in points.values()] == [4, 4, 1, 2, 1, 1]
    assert [dict(point.setting) for point in points["plop"][:2]] == [
        {"plop.pod": 0.1, "train.later.lr": 0.001},
        {"plop.pod": 0.1, "train.later.lr": 0.002},
    ]


def test_folder_names_are_readable_and_safe() -> None:
    assert Point("star", {}).name == "default"
    # Independent of the order of the options, so that the same setting is trained once.
    assert Point("star", {"b": 1, "a": None}).name == Point("star", {"a": None, "b": 1}).name == "a=null,b=1"
    odd = [Point("star", {"a": value}).name for value in ("x/y", "x\\y", "x y", [1, 2], "é", "z" * 300)]
    assert len(set(odd)) == len(odd) and all(name.replace(",", "").isascii() and len(name) < 120 for name in odd)
    assert not any(set(name) & set("/\\ []") for name in odd)


def test_points_that_differ_in_later_settings_share_step_0(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    methods = ["finetune", "star", "mib", "plop", "joint"]
    sweep = make_sweep(config, methods, [3, 4], out, [], ["train.base.lr=0.01,0.02", LATER, "star.mbce=1,2"])
    plan = sweep.tuning.plan([point for found in sweep.points.values() for point in found], [3])
    bases = {plan.name(run) for run in plan.runs if run.run_dir in plan.only_base}
    # mib and plop start from LwF's step 0, finetune from STAR's without options; `star.mbce` concerns STAR's step 0.
    assert bases == {
        *(f"sweep/{owner}/base_step/train.base.lr={lr}/seed3" for owner in ("lwf", "star") for lr in (0.01, 0.02)),
        *(f"sweep/star/base_step/star.mbce={x},train.base.lr={lr}/seed3" for x in (1, 2) for lr in (0.01, 0.02)),
    }
    own = [run for run in plan.runs if run.run_dir not in plan.only_base]
    assert len(own) == 4 + 8 + 4 + 4 + 2 and {run.seed for run in own} == {3}
    places = [run.run_dir for run in plan.runs]
    for index, run in enumerate(plan.runs):
        assert run.data.validation == 0.2
        if run.start_from:
            base = plan.runs[places.index(run.start_from.parent)]
            assert places.index(base.run_dir) < index and base.train.base == run.train.base and not base.start_from
        else:
            assert run.method == "joint" or run.run_dir in plan.only_base
    final = sweep.final.plan([sweep.points["mib"][1]], sweep.seeds)
    assert [plan.name(run) for run in final.runs] == [
        f"best/{rest}/seed{seed}"
        for seed in (3, 4)
        for rest in ("lwf/base_step/train.base.lr=0.01", "mib/train.base.lr=0.01,train.later.lr=0.002")
    ]
    assert all(run.data.validation is None for run in final.runs)


CHANGED = {
    "star": {"ocfm": 1, "sad": 1, "old_threshold": 0.7, "norm_noise": "vector", "replay": 0.5},
    "ssul": {"threshold": 0.5},
    "dkd": {"kd": 1, "dkd": 1, "later_pos_weight": 2},
    "constellation": {
        "pseudo": 0.9,
        "draws": 100,
        "replay": 0.5,
        "reject": False,
        "shift": 0.5,
        "refit": False,
        "warm_start": False,
        "soft_targets": False,
    },
    "adapter": {"ocfm": 1, "sad": 1, "old_threshold": 0.7, "norm_noise": "vector", "replay": 0.5, "adc": False},
    "star-basic": {"ocfm": 1, "sad": 1, "old_threshold": 0.7, "replay": 0.5},
    "segacil": {"uncertainty": 0.1},
    "constellation-extend": {
        "within": -1,
        "refine": True,
        "tune_copy": True,
        "margin": 1.0,
        "averaging": 0.5,
        "penalty": 1.0,
        "photos": "photos.txt",
        "epochs": 2,
        "lr": 0.2,
        "crops": 2,
        "window": 3,
        "width": 16,
        "floor": 0.1,
        "modes": 2,
        "background_modes": 2,
        "factors": 1,
        "pseudo": 0.9,
        "balance": 0.5,
        "draws": 100,
        "replay": 0.5,
        "reject": False,
        "shift": 0.5,
    },
}


@pytest.mark.parametrize("method", CHANGED)
def test_later_options_have_no_effect_on_step_0(method: str, tiny: dict, tmp_path: Path) -> None:
    section, small = METHODS[method].section, dict(METHODS[method].contract_options)
    tiny |= {"method": method, section: small}
    plain = train(parse_config(tiny), range(1), Console(quiet=True)) / "step_0"
    changed = {section: small | CHANGED[method], "out": str(tmp_path / "changed")}
    other = train(parse_config(tiny | changed), range(1), Console(quiet=True)) / "step_0"
    for name in ("model.safetensors", "bank.safetensors"):
        assert (plain / name).is_file() == (other / name).is_file()
        assert not (plain / name).is_file() or (plain / name).read_bytes() == (other / name).read_bytes()


def test_all_later_options_are_tested() -> None:
    declared = {name: method.later_options for name, method in METHODS.items() if method.base_step == name}
    assert {name: set(options) for name, options in declared.items() if options} == {
        name: set(options) for name, options in CHANGED.items()
    }
    assert all(method.later_options <= set(method.Options.model_fields) for method in METHODS.values())


def test_a_sweep_over_later_options_trains_step_0_once(config: Path, tmp_path: Path) -> None:
    sweep = make_sweep(config, ["star", "star-m"], [0], tmp_path / "out", [], ["star.ocfm=1,2"])
    plan = sweep.tuning.plan([point for found in sweep.points.values() for point in found], [0])
    assert [plan.name(run) for run in plan.runs] == [
        "sweep/star/base_step/default/seed0",
        *(f"sweep/{method}/star.ocfm={value}/seed0" for method in ("star", "star-m") for value in (1, 2)),
    ]


def test_a_step_0_is_shared_by_methods_whose_options_have_other_sections(config: Path, tmp_path: Path) -> None:
    keys = ["star.pos_weight=1,4", "star-lite.pos_weight=1,4", "star-lite.noise=dist,angle"]
    sweep = make_sweep(config, ["star", "star-lite"], [0], tmp_path / "out", ["star.pos_weight=3"], keys)
    plan = sweep.tuning.plan([point for found in sweep.points.values() for point in found], [0])
    bases = {run.run_dir for run in plan.runs if run.run_dir in plan.only_base}
    assert bases == {tmp_path / f"out/sweep/star/base_step/star.pos_weight={weight}/seed0" for weight in (1, 4)}
    assert {run.start_from.parent for run in plan.runs if run.start_from} == bases


def test_points_with_other_encoder_rates_have_their_own_step_0(config: Path, tmp_path: Path) -> None:
    keys = ["train.encoder_lr=0,0.1,1", LATER]
    sweep = make_sweep(config, ["mib", "joint"], [0], tmp_path / "out", [], keys)
    plan = sweep.tuning.plan([point for found in sweep.points.values() for point in found], [0])
    bases = [run for run in plan.runs if run.run_dir in plan.only_base]
    assert [(run.method, run.train.encoder_lr) for run in bases] == [("lwf", 0), ("lwf", 0.1), ("lwf", 1)]
    assert len(plan.runs) == 3 + 6 + 3


def test_the_tuning_never_reads_the_test_images(config: Path, shapes: Path, tmp_path: Path) -> None:
    root = shutil.copytree(shapes, tmp_path / "data")
    unreadable = [*root.glob("JPEGImages/val_*"), *root.glob("SegmentationClass/val_*")]
    assert len(unreadable) == 24
    for path in unreadable:
        path.write_bytes(b"no image")
    overrides = [override("data.root", str(root))]
    sweep = make_sweep(config, ["joint"], [0], tmp_path / "out", overrides, ["train.base.lr=0.01,0.02"])
    tuned = tune(sweep, Console(quiet=True))
    assert list(tuned.best) == ["joint"] and not tuned.failed
    with pytest.raises(UserError, match="val_"):
        run_sweep(sweep, Console(quiet=True))


def test_sweep_end_to_end(run: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["--methods", "finetune,joint", "--seeds", "0,1", "--sweep", LATER, "--sweep", "train.base.lr=0.01,0.02"]
    said = run(*argv)
    assert len(list(out.glob("sweep/**/results.json"))) == 2 + 4 + 2
    rows = table(out / "sweep.csv")
    assert [(row["method"], row["train.later.lr"], row["train.base.lr"]) for row in rows] == [
        *(("finetune", later, base) for later in ("0.001", "0.002") for base in ("0.01", "0.02")),
        *(("joint", "-", base) for base in ("0.01", "0.02")),
    ]
    for method in ("finetune", "joint"):
        own = [row for row in rows if row["method"] == method]
        best = max(float(row["validation mIoU"]) for row in own)
        (chosen,) = [row for row in own if row["chosen"] == "yes"]
        assert float(chosen["validation mIoU"]) == best and all(float(row["seconds"]) >= 0 for row in own)
    results = {row["method"]: row for row in table(out / "compare.csv")}
    assert {method: row["seeds"] for method, row in results.items()} == {"finetune": "2", "joint": "2"}
    assert all("±" in row["all"] for row in results.values())
    finals = list(out.glob("best/finetune/train*/seed*"))
    assert sorted(place.name for place in finals) == ["seed0", "seed1"]
    for place in finals:
        content = json.loads((place / "results.json").read_text())
        assert "held-out" not in str(content["run"]["notes"]) and len(content["steps"]) == 3
    tuned = json.loads(next(out.glob("sweep/finetune/train*/seed0/results.json")).read_text())
    assert "evaluated on held-out training images (data.validation 0.2)" in tuned["run"]["notes"][0]
    page, text = (out / "report.html").read_text(), (out / "compare.md").read_text()
    for shown in (page, text, " ".join(said.split())):
        assert (
            "trained with seed 0 and evaluated on 20% of the training images" in shown
            and "s in the tuning and" in shown
        )
    assert '<h2 id="sweep">Sweep</h2>' in page and page.count("<td>yes</td>") == 2
    assert text.count("| yes |") == 2
    again = run(*argv)
    assert "learning" not in again and again.count("step 2: finished already") == 4 + 2
    assert table(out / "sweep.csv") == rows
    assert "holds a comparison with --sweep" in run("--methods", "star", code=2)
    assert "other conditions" in run(*argv, "data.validation=0.3", code=2)


def test_a_diverging_point_is_left_out(run: Callable[..., str], tmp_path: Path) -> None:
    argv = ["--methods", "star,joint", "--sweep", "star.pos_weight=3e38,4"]
    said = run(*argv)
    assert "failed: sweep/star/base_step/star.pos_weight=3e38/seed0" in said
    rows = table(tmp_path / "out" / "sweep.csv")
    assert [(row["method"], row["validation mIoU"], row["chosen"]) for row in rows][2] == ("joint", "-", "yes")
    assert rows[0]["validation mIoU"] == "failed" and rows[1]["chosen"] == "yes"


def test_a_method_without_a_finished_point_is_reported(run: Callable[..., str], tmp_path: Path) -> None:
    said = run("--methods", "star,joint", "--sweep", "star.pos_weight=2e38,3e38", code=1)
    assert "failed: star: no grid point finished" in said
    assert [row["method"] for row in table(tmp_path / "out" / "compare.csv")] == ["joint"]


def test_equal_points_leave_the_first(run: Callable[..., str], tmp_path: Path) -> None:
    # Distillation has no effect on a task of one step.
    run("--methods", "plop", "--sweep", "plop.pod=0.1,0.2", "task.steps=[[disc, square, triangle, hexagon, heart]]")
    rows = table(tmp_path / "out" / "sweep.csv")
    assert rows[0]["validation mIoU"] == rows[1]["validation mIoU"] and rows[0]["chosen"] == "yes"


def test_a_shortlist_tunes_later_steps_from_the_best_settings_of_step_0(
    run: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = ["--methods", "finetune,star,joint", "--shortlist", "1", "--sweep", "train.encoder_lr=0,1", "--sweep", LATER]
    said = run(*argv)
    first = {
        path.parent.parent.name: json.loads(path.read_text()) for path in out.glob("sweep/star/base_step/*/*/r*.json")
    }
    scores = {name.removeprefix("train.encoder_lr="): each["steps"][0]["miou"]["all"] for name, each in first.items()}
    assert scores.keys() == {"0", "1"} and all(len(each["steps"]) == 1 for each in first.values())
    best, other = sorted(scores, key=lambda value: -scores[value])
    rows = table(out / "sweep.csv")
    for method in ("finetune", "star"):
        left_out, *kept = [row for row in rows if row["method"] == method]
        assert (left_out["train.encoder_lr"], left_out["train.later.lr"]) == (other, "-")
        assert (left_out["step 0 mIoU"], left_out["validation mIoU"], left_out["chosen"]) == (
            f"{scores[other]:.2f}",
            "-",
            "",
        )
        assert [row["train.later.lr"] for row in kept] == ["0.001", "0.002"]
        assert {(row["train.encoder_lr"], row["step 0 mIoU"]) for row in kept} == {(best, f"{scores[best]:.2f}")}
        assert sorted(row["chosen"] for row in kept) == ["", "yes"]
        assert len(list(out.glob(f"sweep/{method}/train*"))) == 2
    assert [row["step 0 mIoU"] for row in rows if row["method"] == "joint"] == ["-", "-"]
    assert "tuning of step 0" in said and "tuned only from the setting of step 0 with" in " ".join(said.split())
    again = run(*argv)
    assert "learning" not in again and table(out / "sweep.csv") == rows


def test_a_shortlist_needs_a_sweep(run: Callable[..., str]) -> None:
    assert "--shortlist: tunes with the values of --sweep" in run("--methods", "star", "--shortlist", "2", code=2)


def test_a_shortlist_leaves_out_a_diverging_step_0(run: Callable[..., str], tmp_path: Path) -> None:
    argv = ["--methods", "star", "--shortlist", "1", "--sweep", "star.pos_weight=3e38,4"]
    assert "failed: sweep/star/base_step/star.pos_weight=3e38/seed0" in run(*argv)
    rows = table(tmp_path / "out" / "sweep.csv")
    assert (rows[0]["step 0 mIoU"], rows[0]["chosen"]) == ("failed", "")
    assert rows[1]["star.pos_weight"] == "4" and rows[1]["chosen"] == "yes" and len(rows) == 2
