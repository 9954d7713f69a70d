"""Configurations: validation, overrides and the shipped files."""

from pathlib import Path

import pytest
import yaml

from starseg.config import dump_config, load_config, parse_config
from starseg.data.datasets import DATASETS, data_root
from starseg.engine.rundir import resolve
from starseg.engine.setup import check_method
from starseg.errors import UserError
from starseg.methods import method_options
from starseg.utils.overrides import override

TASK = {"task": {"name": "15-1"}}
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "task: give task.name"),
        ({**TASK, "train": {"base": {"epoch": 3}}}, "train.base.epoch: unknown key; did you mean 'epochs'"),
        ({**TASK, "train": {"batch_size": "many"}}, "train.batch_size: .*integer.*'many'"),
        ({**TASK, "train": {"batch_size": 1}}, "train.batch_size: batch norm needs at least 2"),
        ({**TASK, "data": {"crop": 100}}, "data.crop: 100 is no multiple of model.output_stride"),
        ({**TASK, "seed": -1}, "seed: "),
        ({**TASK, "compat": "paper"}, "compat: .*published.*'paper'"),
        ({"task": {"name": "15-1", "setting": "both"}}, "task.setting: .*overlap.*'both'"),
    ],
)
def test_mistakes_name_the_key(tree: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tree)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: {name: 15-1}\ntrain: {base: {epochs: 3}}\n")
    config = load_config(path, ["train.base.epochs=7", "train.base.lr=1e-2", "star.ocfm=2", "task.setting=disjoint"])
    assert (config.train.base.epochs, config.train.base.lr, config.task.setting) == (7, 0.01, "disjoint")
    assert config.method_section("star") == {"ocfm": 2}
    for bad in ("epochs", "=3", "task.name.x=1", "seed=[1"):
        with pytest.raises(UserError, match="override"):
            load_config(path, [bad])


@pytest.mark.parametrize(
    "text",
    [
        "/d/VOC #2",
        "/d/a: b",
        "&a b",
        "*a",
        "!a b",
        "[a] b",
        "{a}",
        "~",
        "~/a",
        "2024",
        "12:30",
        "2024-01-01",
        "yes",
        "/d/a ",
    ],
)
def test_paths_in_overrides_are_literal(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: {name: 15-1}\ndata: {root: /elsewhere}\n")
    assert str(load_config(path, [f"data.root={text}"]).data.root) == text
    assert str(load_config(path, [f"model.pretrained=/w{text}.pth"]).model.pretrained) == f"/w{text}.pth"


def test_other_text_in_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: {name: 15-1}\ndata: {root: /elsewhere, workers: 1}\n")
    text = ["data.cache=off", "train.precision=32", "task.name=15", "data.workers=auto", "ssul.saliency_dir=/a #2"]
    config = load_config(path, [*text, "data.root='/q #1'", "model.pretrained=false", "train.base={epochs: 3}"])
    assert (config.data.cache, config.train.precision, config.task.name) == ("off", "32", "15")
    assert (config.data.workers, config.model.pretrained, config.train.base.epochs) == ("auto", False, 3)
    assert config.data.root == Path("/q #1") and config.method_section("ssul") == {"saliency_dir": "/a #2"}
    config = load_config(path, ["data.root=null", "data.workers=3", "task.steps=[[cat], [dog]]"])
    assert (config.data.root, config.data.workers, config.task.steps) == (None, 3, [["cat"], ["dog"]])
    for unusual in ("a #2", "a\u2028b", "a\x85b", "a\nb", "caf\udce9", "2024", "null"):
        assert str(load_config(path, [override("out", unusual)]).out) == unusual
    with pytest.raises(UserError, match=r"override 'data\.root=': the value is empty; give one, or data\.root=null"):
        load_config(path, ["data.root="])


@pytest.mark.parametrize("content", [None, "a: [", "- 1\n", b"\xff\xfe"])
def test_unreadable_files(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"c\.yaml"):
        load_config(path)


def test_the_saved_copy_is_the_same_configuration() -> None:
    config = parse_config({**TASK, "star": {"sad": 0.1}, "data": {"root": "/x"}, "compat": "published"})
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.yaml")) + sorted(ROOT.glob("configs/**/*.yaml")))
def test_shipped_configs_are_valid(path: Path) -> None:
    check_method(load_config(path))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_protocol_resolves_to_the_published_one(path: Path) -> None:
    config = load_config(path)
    dataset, task = path.parent.name, DATASETS[path.parent.name].tasks[path.stem]
    assert (config.data.dataset, config.task.name, config.task.setting) == (dataset, path.stem, "overlap")
    assert config.method == ("joint" if path.stem == "joint" else "star")
    assert sum(map(len, task)) == {"voc": 20, "ade": 150}[dataset]
    root, *schedule = {
        "voc": ("datasets/PascalVOC2012", (60, 1e-3), (60, 1e-4), 0.0, 4.0),
        "ade": ("datasets/ADE20K", (100, 2.5e-3), (100, 2.5e-4), 0.2, 30.0),
    }[dataset]
    assert data_root(config.data) == Path(root)
    resolved = resolve(config)
    base, later = ((p.epochs, p.lr) for p in (resolved.train.base, resolved.train.later))
    pos_weight = resolved.method_section(config.method)["pos_weight"]
    assert [base, later, resolved.train.warmup, pos_weight] == schedule
    unset = config.train.model_dump(include={"base", "later", "warmup"})
    assert unset == {"base": {"epochs": None, "lr": None}, "later": {"epochs": None, "lr": None}, "warmup": None}
    assert method_options(config.method, config).pos_weight is None
    assert (config.train.batch_size, config.data.crop, config.model.backbone) == (24, 512, "resnet101.tv_in1k")
    variant = load_config(path, ["task.setting=disjoint", "method=star-m"])
    assert (variant.task.setting, variant.method) == ("disjoint", "star-m")


def test_every_published_protocol_is_shipped() -> None:
    for dataset in ("voc", "ade"):
        shipped = {path.stem for path in (ROOT / "configs" / dataset).glob("*.yaml")}
        assert shipped == {name for name in DATASETS[dataset].tasks if "_" not in name} - {"1-1"}
