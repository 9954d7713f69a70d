"""The page on writing a method holds what it says: its code runs, and the suite finds faults."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from starseg.contract import Rehearsal, gradients_reach_what_learns, shares_of_a_batch_give_the_loss_of_the_whole
from starseg.data.step import Batch
from starseg.losses import upsample
from starseg.methods import METHODS, Method, StepContext, register_method
from starseg.methods.base import Network

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"


@pytest.fixture(autouse=True)
def _known_methods() -> Iterator[None]:
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


def test_the_page_s_code_runs_and_keeps_the_contract() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(code.splitlines()) <= 45
    exec(compile(code, str(PAGE), "exec"), {"__name__": "my_package.gentle"})
    assert METHODS["gentle"].section == "gentle"


def test_the_suite_finds_a_group_left_out() -> None:
    @register_method("faulty-groups")
    class Faulty(Method):
        def param_groups(self, ctx: StepContext) -> list:
            return super().param_groups(ctx)[1:]

    with pytest.raises(AssertionError, match=r"not both: \['backbone"):
        gradients_reach_what_learns(Rehearsal("faulty-groups"))


def test_the_suite_finds_a_mean_of_one_process() -> None:
    @register_method("faulty-mean")
    class Faulty(Method):
        def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
            logits = upsample(new(batch.images).logits, batch.labels)
            return {"bce": torch.nn.functional.softplus(logits).mean()}

    with pytest.raises(AssertionError, match="share"):
        shares_of_a_batch_give_the_loss_of_the_whole(Rehearsal("faulty-mean"))
