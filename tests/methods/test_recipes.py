"""A recipe belongs to a method and a data set; without one, the configuration must give every value."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from starseg.config import Strict, dump_config, parse_config
from starseg.engine.rundir import claim, resolve
from starseg.errors import UserError
from starseg.methods import METHODS, Recipe, SigmoidMethod, StepSchedule, recipes, register_method, register_recipe

FOLDER = {"data": {"dataset": "folder"}, "task": {"name": "own", "steps": [["a"], ["b"]]}}
SCHEDULE = {"base": {"epochs": 3, "lr": 0.1}, "later": {"epochs": 2, "lr": 0.01}, "warmup": 0.0}


def _config(method: str, **changed: Any) -> Any:
    return parse_config({**FOLDER, "method": method, **changed})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(recipes, "_REGISTERED", {})
    return recipes._REGISTERED


@pytest.mark.parametrize(
    ("method", "given", "missing"),
    [
        (
            "star",
            {},
            "train.base.epochs, train.base.lr, train.later.epochs, train.later.lr, train.warmup, memory.size, "
            "star.pos_weight",
        ),
        ("finetune", {"train": SCHEDULE}, "finetune.pos_weight"),
        ("plop", {"train": SCHEDULE, "plop": {"pod": 0.1}}, "plop.pod_logits"),
        ("dkd", {"train": {**SCHEDULE, "base": {"epochs": 3}}}, "train.base.lr, dkd.pos_weight, dkd.later_pos_weight"),
        ("joint", {}, "train.base.epochs, train.base.lr, train.warmup, joint.pos_weight"),
        ("mib", {"task": {"name": "own", "steps": [["a"]]}}, "train.base.epochs, train.base.lr, train.warmup"),
    ],
)
def test_an_error_names_exactly_the_keys_to_give(method: str, given: dict, missing: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(_config(method, **given))
    start = f"no recipe for method {method} on data set 'folder': give "
    others = (
        "recipe=voc or recipe=city_domain or recipe=ade" if method in ("plop", "mib") else "recipe=voc or recipe=ade"
    )
    assert str(caught.value) == f"{start}{missing}, or take another data set's with {others}"


def test_a_method_with_an_option_that_must_be_given() -> None:
    class PupilOptions(Strict):
        teacher: str

    @register_method("pupil")
    class Pupil(SigmoidMethod):
        Options = PupilOptions
        recipes: ClassVar = {}

    try:
        with pytest.raises(
            UserError, match=r"no recipe for method pupil on data set 'folder': give train\.base\.epochs"
        ):
            resolve(_config("pupil", pupil={"teacher": "star"}))
    finally:
        del METHODS["pupil"]


def test_a_configuration_may_give_every_value_itself() -> None:
    resolved = resolve(_config("star", train=SCHEDULE, memory={"size": 0}, star={"pos_weight": 7}))
    assert resolved.method_section("star")["pos_weight"] == 7 and resolved.train.later.epochs == 2


def test_another_data_set_s_recipe_is_taken_where_it_is_named() -> None:
    resolved = resolve(_config("star-m", recipe="ade", train={"later": {"lr": 0.5}}))
    assert (resolved.train.base.epochs, resolved.train.later.epochs, resolved.train.later.lr) == (100, 100, 0.5)
    assert resolved.method_section("star")["pos_weight"] == 30 and resolved.memory.size == 50
    with pytest.raises(UserError, match="recipe: method star has no recipe for data set 'cows'; it has: ade, voc"):
        resolve(_config("star", recipe="cows"))


def test_a_data_set_s_package_registers_recipes(registered: dict) -> None:
    recipe = Recipe(StepSchedule(5, 0.1), StepSchedule(4, 0.2), options={"pos_weight": 9.0})
    register_recipe("star", "folder", recipe)
    assert resolve(_config("star")).method_section("star")["pos_weight"] == 9
    with pytest.raises(UserError, match="no recipe for method star-m"):
        resolve(_config("star-m"))
    with pytest.raises(ValueError, match="already registered"):
        register_recipe("star", "folder", recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posweight": 9.0}, "star takes no option posweight from a recipe; it takes: pos_weight"),
        ({}, "has no pos_weight: add it to the recipe's options, or give star.pos_weight"),
    ],
)
def test_a_recipe_that_does_not_fit_its_method(registered: dict, options: dict, message: str) -> None:
    register_recipe("star", "folder", Recipe(StepSchedule(5, 0.1), StepSchedule(4, 0.2), options=options))
    with pytest.raises(UserError, match=f"the recipe of method star for data set 'folder'.*{message}"):
        resolve(_config("star"))


def test_the_weight_of_dkd_s_later_steps() -> None:
    def weights(recipe: str, **options: float) -> tuple[float, float]:
        section = resolve(_config("dkd", recipe=recipe, dkd=options)).method_section("dkd")
        return section["pos_weight"], section["later_pos_weight"]

    assert weights("voc") == (2, 1) and weights("ade") == (35, 35)
    assert weights("voc", pos_weight=3) == (3, 3)
    assert weights("voc", pos_weight=3, later_pos_weight=4) == (3, 4)


@pytest.mark.parametrize("method", ["plop", "dkd", "ssul"])
def test_a_run_of_the_version_before_goes_on(method: str, tiny: dict, tmp_path: Path) -> None:
    """Its configuration lacks the keys that have become explicit; another value in one of them is a difference."""
    config = parse_config({**tiny, "method": method, "out": str(tmp_path / "run")})
    tree = yaml.safe_load(dump_config(resolve(config)))
    tree.pop("recipe")
    new_keys = {"plop": {"pod": None, "pod_logits": None}, "dkd": {}, "ssul": {}}[method]
    tree[method] = {key: value for key, value in tree[method].items() if key != "later_pos_weight"} | new_keys
    run = config.run_dir
    (run / "step_0").mkdir(parents=True)
    (run / "step_0" / "metrics.json").write_text("{}")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    claim(run, resolve(config)).close()
    if method != "ssul":
        key = {"plop": "pod", "dkd": "later_pos_weight"}[method]
        with pytest.raises(UserError, match=rf"another configuration:\n  {method}.{key}: "):
            claim(run, resolve(parse_config({**tiny, "method": method, "out": str(run), method: {key: 0.5}})))


@pytest.mark.parametrize("method", ["plop", "dkd", "star"])
def test_a_run_of_the_version_before_on_a_folder_goes_on_with_the_recipe_of_voc(method: str, tmp_path: Path) -> None:
    """Version 0.1.0 took VOC's values for a folder, too, and did not save all of them."""
    config = _config(method, recipe="voc", out=str(tmp_path / "run"))
    tree = yaml.safe_load(dump_config(resolve(config)))
    del tree["recipe"], tree["model"]["decoder"]
    later = {"plop": {"pod": None, "pod_logits": None}}.get(method, {})
    tree[method] = {key: value for key, value in tree[method].items() if key != "later_pos_weight"} | later
    run = config.run_dir
    (run / "step_0").mkdir(parents=True)
    (run / "step_0" / "metrics.json").write_text("{}")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    claim(run, resolve(config)).close()
    with pytest.raises(UserError, match=r"another configuration:"):
        claim(run, resolve(_config(method, recipe="ade", out=str(run))))


def test_every_method_has_a_recipe_for_the_published_data_sets() -> None:
    for method in METHODS.values():
        assert {"voc", "ade"} <= method.recipes.keys(), method.name
        for recipe in method.recipes.values():
            assert sorted(recipe.options) == sorted(recipes.recipe_options(method.Options)), method.name
