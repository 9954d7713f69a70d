"""Methods written for version 0.1.0 register, with warnings, and keep the contract."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import starseg
from starseg.config import PUBLISHED, SOUND
from starseg.contract import MethodHarness
from starseg.contract.checks import the_loss_falls
from starseg.data.samples import Batch
from starseg.methods import METHODS, Method, SigmoidMethod, SoftmaxMethod, register_method
from starseg.methods.legacy import Schedule
from starseg.methods.recipes import StepSchedule
from starseg.utils.deprecation import MOVED, RENAMED
from starseg.utils.plugins import load_files

EXAMPLE = Path(__file__).with_name("gentle_of_0_1.txt")
"""The example of docs/new-method.md as it was."""


@pytest.fixture(autouse=True)
def _known_methods() -> Iterator[None]:
    known, modules = dict(METHODS), dict(sys.modules)
    yield
    METHODS.clear()
    METHODS.update(known)
    for name in sys.modules.keys() - modules.keys():
        if name.removeprefix("starseg.") in MOVED or name == "gentle":
            del sys.modules[name]


def test_the_example_of_the_version_before_keeps_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gentle.py"
    path.write_bytes(EXAMPLE.read_bytes())
    monkeypatch.setenv("STARSEG_METHODS", str(path))
    with pytest.warns(DeprecationWarning) as caught:
        load_files("STARSEG_METHODS")
    messages = [str(warning.message) for warning in caught]
    for part in ("starseg.data.step is now", "starseg.distill is now", "starseg.methods.base is now", "SigmoidMethod"):
        assert any(part in message for message in messages), part
    assert {Path(warning.filename) for warning in caught} == {path}
    gentle = METHODS["gentle"]
    assert issubclass(gentle, SigmoidMethod) and gentle.section == "gentle"
    with pytest.warns(DeprecationWarning, match="add_up is now all_reduce_sum"):
        the_loss_falls(MethodHarness("gentle"))


def test_old_hooks_are_adapted() -> None:
    with pytest.warns(DeprecationWarning, match=r"recipes|choices|SigmoidMethod") as caught:

        @register_method("old")
        class Old(Method):
            def defaults(self, dataset: str, task: str | None = None) -> Schedule:
                inherited = super().defaults(dataset, task)  # type: ignore[misc]
                return Schedule(inherited.base, StepSchedule(7, 0.5), 0.25, 9.0)

            def rule(self, published: bool) -> object:  # type: ignore[override]
                return lambda logits: (logits, published)

    assert len(caught) == 3
    recipe = METHODS["old"].recipes["ade"]
    assert (recipe.base.epochs, recipe.later.epochs, recipe.warmup, recipe.options) == (100, 7, 0.25, {"pos_weight": 9})
    method = METHODS["old"](METHODS["old"].Options())
    assert method.rule(PUBLISHED)(Tensor())[1] is True and method.rule(SOUND)(Tensor())[1] is False


def test_the_old_saliency_maps_come_with_the_batches(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"overrides saliency\(\); override extra_maps"):

        @register_method("old")
        class Old(SigmoidMethod):
            def saliency(self, dataset: str) -> Path | None:
                return tmp_path

    assert METHODS["old"](METHODS["old"].Options()).extra_maps() == {"saliency": tmp_path}
    some = torch.zeros(1)
    with pytest.warns(DeprecationWarning, match=r"Batch\.(saliency|exemplar) is now Batch\.extras"):
        batch = Batch(some, some, some, {"saliency": some})
        assert batch.saliency is some and batch.exemplar is None


@pytest.mark.parametrize("module", sorted(MOVED))
def test_moved_modules_are_found(module: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"starseg\.{module} is now starseg\."):
        old = importlib.import_module(f"starseg.{module}")
    assert old.__name__ == f"starseg.{module}"
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = old.nothing_of_that_name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), [(module, name) for module in sorted(RENAMED) for name in RENAMED[module]])
def test_renamed_names_are_found(module: str, name: str) -> None:
    home, new = RENAMED[module][name].split(":")
    place = importlib.import_module(f"starseg.{home}")
    assert getattr(importlib.import_module(f"starseg.{module}"), name) is getattr(place, new)


def test_the_context_s_old_names() -> None:
    _, ctx, _ = MethodHarness("finetune").enter(0, choices=PUBLISHED)
    with pytest.warns(DeprecationWarning, match="StepContext"):
        assert ctx.published and ctx.add_up is ctx.all_reduce_sum


def test_public_names_of_the_version_before() -> None:
    with pytest.warns(DeprecationWarning, match=r"contract\.Rehearsal is now .*MethodHarness"):
        from starseg.contract import Rehearsal
    with pytest.warns(DeprecationWarning, match=r"softmax\.Softmax is now"):
        from starseg.methods.softmax import Softmax
    assert Rehearsal is MethodHarness and Softmax is SoftmaxMethod and starseg.Method is Method
