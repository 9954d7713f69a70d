"""The published flags and JSON configurations, in our terms."""

import json
from pathlib import Path

import pytest

from starseg.compat import commands
from starseg.compat.settings import parse_published, read_published, set_key
from starseg.config import load_config
from starseg.engine.rundir import resolve
from starseg.errors import UserError
from starseg.tasks import published_tasks

ROOT = Path(__file__).parents[2]
README = {"voc": (1e-3, 1e-4, 24), "ade": (2.5e-3, 2.5e-4, 24)}
PLACES = {"out": None, "data.root": None, "data.lists": None, "data.workers": None, "eval.batch_size": None}


def _resolved(config: object) -> dict:
    tree = resolve(config).model_dump(mode="json", by_alias=True)
    for key, value in PLACES.items():
        set_key(tree, key, value)
    return tree


@pytest.mark.parametrize("setting", ["overlap", "disjoint"])
@pytest.mark.parametrize(
    ("dataset", "task"),
    [(d, t) for d in README for t in published_tasks(d) if "_" not in t and t not in ("1-1", "joint")],
)
def test_yaml_and_json_with_the_readmes_flags_are_the_same_run(dataset: str, task: str, setting: str) -> None:
    first, later, batch = README[dataset]
    native = _resolved(load_config(ROOT / "configs" / dataset / f"{task}.yaml", [f"task.setting={setting}"]))
    for step, lr in enumerate([first, later]):
        tree = read_published(ROOT / "configs" / f"config_{dataset}.json")
        flags = {"task.name": task, "task.setting": setting, "task.step": step, "train.batch_size": batch}
        for key, value in flags.items():
            set_key(tree, f"data_loader.args.{key}", value)
        set_key(tree, "optimizer.args.lr", lr)
        assert _resolved(parse_published(tree, "test").to_run()) == native


def _config(dataset: str, *argv: str) -> object:
    args = commands._parser(dataset, training=True).parse_args(argv)
    return commands._config(args, dataset)


@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("--save_dir", "elsewhere", "trainer.save_dir"),
        ("--name", "Mine", "name"),
        ("--task_name", "19-1", "data_loader.args.task.name"),
        ("--task_setting", "disjoint", "data_loader.args.task.setting"),
        ("--task_step", 1, "data_loader.args.task.step"),
        ("--lr", 0.5, "optimizer.args.lr"),
        ("--learning_rate", 0.5, "optimizer.args.lr"),
        ("--bs", 7, "data_loader.args.train.batch_size"),
        ("--batch_size", 7, "data_loader.args.train.batch_size"),
        ("--ep", 3, "trainer.epochs"),
        ("--epochs", 3, "trainer.epochs"),
        ("--seed", 9, "seed"),
        ("--mem_size", 50, "data_loader.args.memory.mem_size"),
        ("--pos_weight", 2.0, "hyperparameter.pos_weight"),
        ("--mbce", 3.0, "hyperparameter.mbce"),
        ("--dist_url", "tcp://127.0.0.1:1", "dist_url"),
        ("--multiprocessing_distributed", True, "multiprocessing_distributed"),
        ("--freeze_bn", True, "arch.args.freeze_all_bn"),
    ],
)
def test_every_flag_sets_its_key(flag: str, value: object, key: str) -> None:
    argv = [flag] if value is True else [flag, str(value)]
    tree = _config("voc", "-c", str(ROOT / "configs/config_voc.json"), *argv).model_dump(mode="json")
    for part in key.split("."):
        tree = tree[part]
    assert tree == value


def test_the_batch_size_is_that_of_each_process() -> None:
    config = _config("ade", "-c", str(ROOT / "configs/config_ade.json"), "--bs", "12", "--multiprocessing_distributed")
    assert config.to_run(devices=2).train.batch_size == 24
    assert config.to_run(devices=1).train.batch_size == 12
    single = _config("ade", "-c", str(ROOT / "configs/config_ade.json"), "--bs", "12")
    assert single.to_run(devices=2).train.batch_size == 12


@pytest.mark.parametrize(
    ("dataset", "argv", "message"),
    [
        ("voc", [], "-c/--config: a configuration must be given"),
        ("voc", ["-c", "/nowhere.json"], "/nowhere.json: cannot read"),
        ("voc", ["-c", "{ade}"], "data_loader.type is for ADE20K"),
        ("voc", ["-c", "{voc}", "--task_step", "1"], "add --freeze_bn"),
        ("voc", ["-c", "{voc}", "--freeze_bn"], "step 0 trains batch norm"),
        ("voc", ["-c", "{voc}", "--test"], "take eval_voc.py --test"),
        ("voc", ["-c", "{voc}", "--kd", "1"], "--kd: a weight of DKD"),
        ("ade", ["-c", "{ade}", "--ac", "1"], "--ac: a weight of DKD"),
        ("voc", ["-c", "{voc}", "-d", "gpu0"], '-d/--device: expected "cpu" or indices'),
        ("voc", ["-c", "{voc}", "--task_setting", "sequential"], "task.setting: input should be 'overlap'"),
        ("voc", ["-c", "{voc}", "--dist_url", "file:///x"], "dist_url: expected tcp://HOST:PORT"),
        ("voc", ["-c", "{voc}", "-r", "/nowhere.pth"], "-r/--resume: there is no checkpoint"),
        ("voc", ["-c", "{voc}", "--task_name", "99-1", "-d", "cpu"], "unknown task '99-1'"),
        ("voc", ["-c", "{voc}", "--task_step", "6"], "(--task_step): expected less than 6, as task 15-1 has 6 steps"),
        ("voc", ["-c", "{voc}", "--bs", "1", "-d", "cpu"], "batch norm needs at least 2 images"),
    ],
)
def test_what_is_refused(
    dataset: str, argv: list[str], message: str, capsys: pytest.CaptureFixture, shapes: Path, tmp_path: Path
) -> None:
    places = {d: str(ROOT / "configs" / f"config_{d}.json") for d in ("voc", "ade")}
    filled = [a.format(**places) for a in argv] + ["--data_root", str(shapes), "--save_dir", str(tmp_path / "saved")]
    with pytest.raises(SystemExit) as stopped:
        commands.train(dataset, filled)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("arch.args.norm_act", "iabn_sync", "arch.args.norm_act: input should be 'bn_sync', got 'iabn_sync'"),
        ("arch.args.use_cosine", True, "arch.args.use_cosine: unknown key"),
        ("trainer.epoch", 3, "trainer.epoch: unknown key; did you mean 'epochs'?"),
        ("data_loader.args.test.args.masking_value", 7, "masking_value: expected 0, as published"),
        ("data_loader.args.val.args.transform_args.crop_size", 64, "crop_size: expected 512"),
        ("data_loader.args.val.cross_val", True, "data_loader.args.val.cross_val"),
        ("lr_scheduler.args.warmup_iters", 0.1, "PolyLR has none"),
        ("trainer.early_stop", 5, "trainer.early_stop"),
        ("name.x", 5, "name.x: 'name' is a value"),
    ],
)
def test_values_without_a_meaning_here_are_refused_by_name(key: str, value: object, message: str) -> None:
    tree = json.loads((ROOT / "configs" / "config_voc.json").read_text())
    with pytest.raises(UserError) as refused:
        set_key(tree, key, value)
        parse_published(tree, "config.json")
    assert message in str(refused.value)
