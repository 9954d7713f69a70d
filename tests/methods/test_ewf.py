"""EWF: the weights after a step are those of the formula."""

import pytest
import torch

from starseg.contract import MethodHarness
from starseg.contract.checks import CHECKS
from starseg.methods.ewf import fusion_share


@pytest.mark.parametrize("base", ["mib", "plop"])
def test_weights_are_fused_after_a_later_step(base: str) -> None:
    run = MethodHarness("ewf", options={"base": base})
    run.walk(1)
    old = {k: v.clone() for k, v in run.model.state_dict().items()}
    method, ctx, optimizer = run.enter(1)
    run.train(method, ctx, optimizer, run.batch(1), 2)
    new = {k: v.clone() for k, v in ctx.model.state_dict().items()}
    run.leave(method, ctx)
    eta = (1 / 4) ** 0.5
    moved = 0
    for name, value in run.model.state_dict().items():
        if name.startswith("heads.1.") or not value.is_floating_point():
            assert torch.equal(value, new[name]), name
        else:
            torch.testing.assert_close(value, (1 - eta) * old[name] + eta * new[name])
            moved += not torch.equal(old[name], new[name])
    assert moved > 10


@pytest.mark.parametrize("base", ["mib", "plop"])
def test_the_losses_are_those_of_the_base_method(base: str) -> None:
    fused, plain = MethodHarness("ewf", options={"base": base, "kd": 3.0}), MethodHarness(base)
    if base == "mib":
        plain.options = {"kd": 3.0}
    values = []
    for run in (fused, plain):
        run.walk(1)
        method, ctx, optimizer = run.enter(1)
        values.append(run.train(method, ctx, optimizer, run.batch(1), 2))
    assert values[0] == values[1]


def test_the_share_of_the_new_weights() -> None:
    assert fusion_share(1, 15) == 0.25
    assert fusion_share(5, 15) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract_over_plop(check: object) -> None:
    check(MethodHarness("ewf", options={"base": "plop"}))
