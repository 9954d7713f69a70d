"""The page on writing a method is correct: its code runs, and the contract finds faults."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starseg.config import parse_config
from starseg.contract import MethodHarness, check_resume, tiny_settings
from starseg.contract.checks import gradients_reach_what_learns, shares_of_a_batch_give_the_loss_of_the_whole
from starseg.data.samples import Batch
from starseg.engine.setup import check_method
from starseg.errors import UserError
from starseg.losses.star import upsample
from starseg.methods import METHODS, SigmoidMethod, StepContext, register_method
from starseg.methods.protocol import Network
from starseg.utils.plugins import load_files

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"


@pytest.fixture(autouse=True)
def _known_methods() -> Iterator[None]:
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


def test_the_code_of_the_page_runs_and_passes_the_contract() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(code.splitlines()) <= 45
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
    assert METHODS["gentle"].section == "gentle"


def test_a_file_named_by_the_environment_registers_its_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own_method.py"
    monkeypatch.setenv("STARSEG_METHODS", str(path))
    with pytest.raises(UserError, match=r"own_method\.py is no Python file"):
        load_files("STARSEG_METHODS")
    path.write_text("import nothing_of_that_name")
    with pytest.raises(UserError, match=r"own_method\.py cannot be loaded: ModuleNotFoundError"):
        load_files("STARSEG_METHODS")
    path.write_text(
        "from starseg.methods import SigmoidMethod, register_method\n"
        "register_method('own')(type('Own', (SigmoidMethod,), {}))"
    )
    command = [sys.executable, "-m", "starseg", "methods", "own"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "own" in done.stdout


def test_the_suite_finds_a_missing_parameter_group() -> None:
    @register_method("faulty-groups")
    class Faulty(SigmoidMethod):
        def param_groups(self, ctx: StepContext) -> list:
            return super().param_groups(ctx)[1:]

    with pytest.raises(AssertionError, match=r"not both: \['encoder"):
        gradients_reach_what_learns(MethodHarness("faulty-groups"))


def test_the_suite_finds_a_mean_over_one_process() -> None:
    @register_method("faulty-mean")
    class Faulty(SigmoidMethod):
        def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
            logits = upsample(new(batch.images).logits, batch.labels)
            return {"bce": torch.nn.functional.softplus(logits).mean()}

    with pytest.raises(AssertionError, match="share"):
        shares_of_a_batch_give_the_loss_of_the_whole(MethodHarness("faulty-mean"))


def test_the_suite_finds_state_that_an_interruption_loses(shapes: Path, tmp_path: Path) -> None:
    @register_method("faulty-memory")
    class Faulty(SigmoidMethod):
        seen = 0

        def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
            self.seen += 1
            return {name: (1 + self.seen / 100) * value for name, value in super().losses(batch, new, old).items()}

    with pytest.raises(AssertionError, match=r"model.safetensors of step 1: another one after a break"):
        check_resume("faulty-memory", shapes, tmp_path)


def test_a_method_may_say_that_it_needs_one_process(shapes: Path, tmp_path: Path) -> None:
    @register_method("alone")
    class Alone(SigmoidMethod):
        one_process = True

        def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
            return {"mean": upsample(new(batch.images).logits, batch.labels).square().mean()}

    shares_of_a_batch_give_the_loss_of_the_whole(MethodHarness("alone"))
    settings = tiny_settings("alone", shapes, tmp_path)
    check_method(parse_config(settings))
    settings["train"]["devices"] = 2
    with pytest.raises(UserError, match=r"train.devices: method alone runs on one process only, got 2"):
        check_method(parse_config(settings))
