"""The encoder's own learning rate (train.encoder_lr), and a frozen encoder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.optim import SGD

from starseg.config import load_config, parse_config
from starseg.contract import MethodHarness, check_resume
from starseg.data.samples import Batch
from starseg.engine.checkpoint import load_model
from starseg.engine.fit import StepTraining, make_optimizer
from starseg.engine.shared import computed_once
from starseg.errors import UserError
from starseg.experiments.train import train
from starseg.methods import METHODS, Method, StepContext
from starseg.models.encoders import Encoder, make_encoder

FAST = ("star", "plop", "ssul", "ewf", "joint", "constellation", "segacil")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(METHODS)]


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_encoder_keeps_its_weights_in_all_steps(name: str, tiny: dict, tmp_path: Path) -> None:
    encoder = make_encoder("test_resnet", 16, False)
    torch.save(encoder.body.state_dict(), tmp_path / "encoder.pth")
    tiny["train"] |= {"encoder_lr": 0}
    tiny |= {
        "method": name,
        "model": {"backbone": "test_resnet", "pretrained": str(tmp_path / "encoder.pth")},
        METHODS[name].section: dict(METHODS[name].contract_options),
    }
    if name == "constellation":
        tiny[name] = {"base": "trained", "epochs": 1, "crops": 1, "draws": 16}
    run = train(parse_config(tiny), console=Console(quiet=True))
    assert load_config(run / "config.yaml").train.encoder_lr == 0
    steps = sorted(run.glob("step_*"))
    assert len(steps) == (1 if name == "joint" else 3)
    for step in steps:
        found = load_model(step)[0].encoder.body.state_dict()
        assert all(torch.equal(found[key], value) for key, value in encoder.body.state_dict().items())
    decoders = [load_model(step)[0].decoder.state_dict() for step in steps]
    moved = any(not torch.equal(decoders[0][key], value) for key, value in decoders[-1].items())
    assert moved == (name not in ("joint", "constellation-extend") and not METHODS[name].freezes)


def _steps(name: str) -> Iterator[tuple[Method, StepContext, SGD]]:
    """The context of each step of a method that trains something, and the optimizer without a factor."""
    run = MethodHarness(name)
    for step in range(2 if len(run.task) > 1 else 1):
        method, ctx, optimizer = run.enter(step)
        if optimizer:
            yield method, ctx, optimizer
        run.leave(method, ctx)


def _groups(optimizer: SGD) -> list[tuple[str, float, list[int]]]:
    return [(g["name"], g["lr"], [id(p) for p in g["params"]]) for g in optimizer.param_groups]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_factor_applies_to_the_encoder_only(name: str) -> None:
    for method, ctx, before in _steps(name):
        lr = before.defaults["lr"]
        assert _groups(make_optimizer(method, ctx, lr, 1e-4)) == _groups(before)
        rates = {p: g["lr"] for g in before.param_groups for p in g["params"]}
        encoder = set(ctx.model.encoder.parameters())
        slower = [(p, g["lr"]) for g in make_optimizer(method, ctx, lr, 1e-4, 0.1).param_groups for p in g["params"]]
        assert len(slower) == len(rates)
        for parameter, rate in slower:
            assert rate == pytest.approx(rates[parameter] * (0.1 if parameter in encoder else 1.0))


@pytest.mark.parametrize(
    ("method", "factor", "calls"), [("star", 0, 1), ("plop", 0, 1), ("ssul", 1, 1), ("dft", 1, 1), ("star", 1, 2)]
)
def test_a_common_encoder_runs_once_and_changes_nothing(
    method: str, factor: float, calls: int, tiny: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny["train"] |= {"encoder_lr": factor}
    tiny |= {"method": method, METHODS[method].section: dict(METHODS[method].contract_options)}
    seen, iterations = 0, []
    forward, iterate = Encoder.forward, StepTraining.iterate

    def counted(encoder: Encoder, images: Tensor) -> list[Tensor]:
        nonlocal seen
        seen += 1
        return forward(encoder, images)

    def counting(training: StepTraining, raw: Batch) -> dict[str, Tensor]:
        before = seen
        losses = iterate(training, raw)
        iterations.append(seen - before)
        return losses

    first = train(parse_config(tiny), range(1), Console(quiet=True)) / "step_0"
    second = tiny | {"start_from": str(first), "out": str(tmp_path / "once")}
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", counted)
        patch.setattr(StepTraining, "iterate", counting)
        once = train(parse_config(second), range(2), Console(quiet=True))
    assert set(iterations) == {calls}
    monkeypatch.setattr("starseg.engine.fit.common_encoder", lambda *_: ())
    twice = train(parse_config(second | {"out": str(tmp_path / "twice")}), range(2), Console(quiet=True))
    name = "step_1/model.safetensors"
    assert (once / name).read_bytes() == (twice / name).read_bytes()


@torch.no_grad()
def test_maps_are_computed_again_for_other_images_and_after_a_change() -> None:
    encoder = make_encoder("test_resnet", 16, False).eval()
    images = torch.rand(1, 3, 64, 64)
    with computed_once((encoder,)):
        maps = encoder(images)
        assert all(a is b for a, b in zip(maps, encoder(images), strict=True))
        other = encoder(images.clone())
        assert all(a is not b and torch.equal(a, b) for a, b in zip(maps, other, strict=True))
        maps = encoder(images)
        images.add_(1)
        assert not torch.equal(encoder(images)[0], maps[0])
        spoilt, maps = encoder(images), encoder(images)
        spoilt[0].zero_()
        assert encoder(images)[0].any()
        with torch.autocast("cpu", torch.bfloat16):
            assert encoder(images)[0].dtype == torch.bfloat16
    assert all(a is not b for a, b in zip(encoder(images), encoder(images), strict=True))


def test_a_frozen_encoder_builds_no_graph() -> None:
    _, ctx, _ = MethodHarness("star").enter(0)
    ctx.model.freeze_encoder()
    ctx.model.train()
    output = ctx.model(torch.rand(2, 3, 64, 64), maps=True)
    assert output.maps and not any(found.requires_grad for found in output.maps) and output.features.requires_grad
    assert not ctx.model.encoder.training and ctx.model.decoder.training


@pytest.mark.parametrize("encoder_lr", [0, 0.1])
def test_an_interrupted_step_resumes(encoder_lr: float, shapes: Path, tmp_path: Path) -> None:
    check_resume("mib", shapes, tmp_path, encoder_lr=encoder_lr)


def test_a_negative_factor_is_refused(tiny: dict) -> None:
    tiny["train"] |= {"encoder_lr": -1}
    with pytest.raises(UserError, match=r"train\.encoder_lr: input should be greater than or equal to 0, got -1"):
        parse_config(tiny)
