"""Comparison of methods: shared base steps, the values of the table, its formats."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from starseg.cli.main import main
from starseg.config import change_config, dump_config
from starseg.engine.checkpoint import is_finished, load_model
from starseg.errors import UserError
from starseg.experiments import compare
from starseg.experiments.plan import run_plan, train_runs
from starseg.methods import METHODS, recipes


@pytest.fixture
def config(tiny: dict, tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    del tiny["out"], tiny["method"]
    path.write_text(yaml.safe_dump(tiny))
    return path


def test_methods_share_a_base_step_with_the_same_settings(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = compare.make_plan(config, ["finetune", "mib", "joint", "star-m", "ssul"], [3], out, [])
    starts = {run.run_dir.name: run.start_from for run in plan.runs}
    assert starts == {
        "joint_seed3": None,
        "ssul_seed3": None,
        "star_seed3": None,
        "finetune_seed3": out / "star_seed3" / "step_0",
        "lwf_seed3": None,
        "mib_seed3": out / "lwf_seed3" / "step_0",
        "star-m_seed3": out / "star_seed3" / "step_0",
    }
    assert plan.only_base == {out / "star_seed3", out / "lwf_seed3"}
    lenders = [str(run.start_from.parent) for run in plan.runs if run.start_from]
    places = [str(run.run_dir) for run in plan.runs]
    assert all(places.index(lender) < i for i, run in enumerate(plan.runs) if run.start_from for lender in lenders[:1])
    # Other hyper-parameters of the first step: nothing is shared.
    single = compare.make_plan(config, ["finetune"], [0], out, ["finetune.pos_weight=2"])
    assert [run.run_dir.name for run in single.runs] == ["finetune_seed0"] and not single.only_base
    # Names that YAML reads otherwise when they are not quoted.
    for name in ("runs #2", "a: b", "[x", "\U0001f600"):
        awkward = compare.make_plan(config, ["star", "finetune"], [0], tmp_path / name, [])
        assert [run.run_dir.parent for run in awkward.runs] == 2 * [tmp_path / name]
        assert awkward.runs[1].start_from == tmp_path / name / "star_seed0" / "step_0"
    with pytest.raises(UserError, match="--methods: unknown nobody"):
        compare.make_plan(config, ["nobody"], [0], out, [])


def test_a_method_trains_its_own_base_step_where_the_lender_has_no_recipe(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = METHODS["plop"].recipes["voc"]
    for name in ("plop", "lwf"):
        monkeypatch.setattr(METHODS[name], "recipes", {})
    monkeypatch.setattr(recipes, "_REGISTERED", {("plop", "voc"): recipe})
    plan = compare.make_plan(config, ["plop"], [0], tmp_path / "out", [])
    assert [(run.run_dir.name, run.start_from) for run in plan.runs] == [("plop_seed0", None)]
    with pytest.raises(UserError, match="no recipe for method lwf"):
        compare.make_plan(config, ["lwf"], [0], tmp_path / "out", [])


def test_a_footnote_is_printed_once(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = tmp_path / f"ssul_seed{seed}"
        run.mkdir()
        content = {"run": {"method": "ssul", "steps": 1, "notes": ["without saliency maps"]}, "steps": [{}]}
        (run / "results.json").write_text(json.dumps(content))
    assert compare.footnotes(compare.finished_runs([tmp_path / "ssul_seed0", tmp_path / "ssul_seed1"])) == [
        "without saliency maps"
    ]


def test_results_of_earlier_versions_lack_the_size_of_the_network(tmp_path: Path) -> None:
    step = {"step": 0, "miou": dict.fromkeys(compare.GROUPS, 10.0), "iou": {"background": 10.0}, "seconds": 1.0}
    for seed, known in ((0, {}), (1, {"network_bytes": 70, "exemplar_bytes": 6})):
        run = tmp_path / f"star_seed{seed}"
        run.mkdir()
        content = {"run": {"method": "star", "steps": 1}, "steps": [step | {"bank_bytes": 8} | known]}
        (run / "results.json").write_text(json.dumps(content))
    old, both = (compare.finished_runs(tmp_path.glob(name)) for name in ("*_seed0", "*_seed?"))
    assert [compare.summary(old)[0][column] for column in compare.STORED] == ["-", "8", "0"]
    assert [compare.summary(both)[0][column] for column in compare.STORED] == ["70", "8", "3"]


def test_compare_end_to_end(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["starseg", "compare", str(config), "--out", str(out), *argv])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    run("--methods", "finetune,joint", "--seeds", "0,1")
    rows = list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))
    assert {row["method"]: row["seeds"] for row in rows} == {"finetune": "2", "joint": "2"}
    assert all("±" in row["all"] for row in rows)
    again = run("--methods", "star", "--seeds", "0")
    assert "step 0: finished already" in again
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO((out / "compare.csv").read_text()))}
    assert list(rows) and rows["star"]["seeds"] == "1" and rows["joint"]["forgetting"] == "-"
    results = json.loads((out / "star_seed0" / "results.json").read_text())["steps"]
    assert float(rows["star"]["all"]) == pytest.approx(results[-1]["miou"]["all"], abs=0.05)
    assert int(rows["star"]["bank bytes"]) == results[-1]["bank_bytes"] > int(rows["finetune"]["bank bytes"]) == 0
    weights = (out / "star_seed0" / "step_2" / "model.safetensors").stat().st_size
    assert int(rows["star"]["network bytes"]) == weights and rows["star"]["image bytes"] == "0"
    learnt = [results[1]["iou"]["hexagon"], results[2]["iou"]["heart"]]
    assert float(rows["star"]["plasticity"]) == pytest.approx(sum(learnt) / 2, abs=0.05)
    assert (out / "compare.tex").read_text().count(r"\\") == 4
    assert (out / "compare.md").read_text().startswith("| method | seeds | old | new | all |")
    assert len((out / "curves.csv").read_text().splitlines()) == 1 + 2 * 3 + 2 * 1 + 3
    page = (out / "report.html").read_text()
    for row in rows.values():
        cells = "".join(f"<td>{value}</td>" for column, value in row.items() if column != "method")
        assert f'<th scope="row">{row["method"]}</th>{cells}' in page
    assert all(f'<th scope="col">{column}</th>' in page for column in ("seeds", *compare.COLUMNS))
    assert "mIoU of all classes after each step, by run" in page and page.count('<h2 class="run"') == 5
    with pytest.raises(UserError, match="no finished run"):
        compare.write_comparison(tmp_path / "nothing", Console(quiet=True))


def test_methods_that_freeze_their_network_have_a_ceiling(config: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["segacil.width=16", "constellation.epochs=1", "constellation.crops=1"]
    plan = compare.make_plan(config, ["segacil", "constellation", "ssul-m", "star"], [0], out, options)
    compare.add_ceilings(plan)
    found = {plan.name(run): run.model.frozen_from for run in plan.ceilings}
    methods = ("constellation", "segacil", "ssul-m")
    assert found == {f"{method}_seed0/ceiling": out / f"{method}_seed0" / "step_0" for method in methods}
    given = tmp_path / "base" / "step_0"
    plan = compare.make_plan(config, ["segacil", "star"], [0], out, [*options, f"model.frozen_from={given}"])
    compare.add_ceilings(plan)
    assert [run.model.frozen_from for run in (*plan.runs, *plan.ceilings)] == 3 * [given]
    plan = compare.make_plan(config, ["segacil", "constellation", "star"], [0], out, options)
    compare.add_ceilings(plan)
    assert not run_plan(plan, Console(quiet=True))
    compare.write_comparison(out, Console(quiet=True))
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO((out / "compare.csv").read_text()))}
    assert rows["star"]["ceiling"] == rows["star"]["% of ceiling"] == "-" and len(rows) == 3
    for method in ("segacil", "constellation"):
        run, row = out / f"{method}_seed0", rows[method]
        every = [json.loads((place / "results.json").read_text())["steps"] for place in (run, run / "ceiling")]
        assert [len(steps) for steps in every] == [3, 1]
        reached, ceiling = (steps[-1]["miou"]["all"] for steps in every)
        assert float(row["ceiling"]) == pytest.approx(ceiling, abs=0.05)
        assert float(row["% of ceiling"]) == pytest.approx(100 * reached / ceiling, abs=0.05)
        first, joint = (load_model(place / "step_0")[0] for place in (run, run / "ceiling"))
        assert all(map(torch.equal, first.decoder.state_dict().values(), joint.decoder.state_dict().values()))
        assert joint.head_sizes == [5] and every[1][0]["miou"].keys() == every[0][0]["miou"].keys()


def test_a_failing_run_does_not_keep_the_others_from_the_table(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    argv = ["starseg", "compare", str(config), "--out", str(tmp_path / "out"), "--methods", "star,finetune"]
    monkeypatch.setattr(sys, "argv", [*argv, "star.mbce=1e38", "star.pos_weight=1e38"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "failed: star_seed0: step 0" in said and "precision" not in said
    assert (tmp_path / "out" / "compare.md").read_text().count("finetune") == 1


def test_runs_under_other_conditions_are_not_compared(config: Path, tmp_path: Path) -> None:
    run = compare.make_plan(config, ["finetune"], [0], tmp_path, []).runs[0]
    run.run_dir.mkdir()
    (run.run_dir / "config.yaml").write_text(dump_config(run))
    compare.make_plan(config, ["joint"], [0], tmp_path, ["data.workers=2"])
    with pytest.raises(UserError, match=r"other conditions \(star_seed0\):\n  data.crop: 64 there, 32 now"):
        compare.make_plan(config, ["joint"], [0], tmp_path, ["data.crop=32"])


def test_several_jobs_give_the_same_results(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [compare.make_plan(config, ["finetune", "joint"], [0], tmp_path / name, []) for name in "ab"]
    torch.set_num_threads(1)
    for plan, jobs in zip(plans, (1, 2), strict=True):
        assert train_runs(plan, Console(quiet=True), jobs) == {}
    monkeypatch.setattr("starseg.experiments.plan._Job", None)
    assert train_runs(plans[1], Console(quiet=True), 2) == {}, "finished runs need no process"
    others = [change_config(run, ["train.warmup=0.5"]) for run in plans[1].runs]
    failed = train_runs(replace(plans[1], runs=others), Console(quiet=True), 2)
    assert len(failed) == len(others) and all("train.warmup" in str(error) for error in failed.values())
    found = [[compare.figures(run.run_dir)["all"] for run in plan.runs if plan.steps(run) is None] for plan in plans]
    assert found[0] == found[1] and len(found[0]) == 2
    assert "step 0" in (tmp_path / "b" / "joint_seed0.log").read_text()


def test_failing_jobs_do_not_keep_the_others_from_the_table(config: Path, tmp_path: Path) -> None:
    overrides = ["star.mbce=1e38", "star.pos_weight=1e38"]
    plan = compare.make_plan(config, ["star", "star-m", "joint"], [0], tmp_path, overrides)
    failed = train_runs(plan, Console(quiet=True), 2)
    assert "step 0" in str(failed["star_seed0"]) and set(failed) == {"star_seed0", "star-m_seed0"}
    assert is_finished(tmp_path / "joint_seed0" / "step_0")


def test_jobs_of_several_processes_are_refused(config: Path, tmp_path: Path) -> None:
    plan = compare.make_plan(config, ["star"], [0], tmp_path, ["train.devices=2"])
    with pytest.raises(UserError, match="--jobs: runs of several processes"):
        train_runs(plan, Console(quiet=True), 2)
