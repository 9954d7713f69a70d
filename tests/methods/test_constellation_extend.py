"""constellation-extend: earlier logits stay bit for bit, also over several steps and with draws of earlier classes."""

import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from starseg.config import parse_config
from starseg.contract import MethodHarness, tiny_settings
from starseg.data.samples import Batch
from starseg.engine.checkpoint import StepInfo
from starseg.engine.fit import StepTraining
from starseg.errors import Stopped
from starseg.experiments.train import train
from starseg.finetuning.prepare import default_method
from starseg.methods import METHODS
from starseg.models import Segmenter
from starseg.models.classifiers import last_layer
from starseg.models.extended import ANY, AddedHead, ExtendedSegmenter, extend
from starseg.replay.gaussians import GaussianBank

QUIET = Console(quiet=True)
PIXELS = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _predict(harness: MethodHarness) -> torch.Tensor:
    assert harness.model is not None
    with torch.no_grad():
        return harness.model.predict(PIXELS)


def _after_step_0() -> Segmenter:
    harness = MethodHarness("constellation-extend")
    with torch.enable_grad():
        harness.walk(1)
    assert harness.model is not None
    return harness.model


def test_earlier_logits_stay_in_every_step() -> None:
    harness = MethodHarness("constellation-extend")
    harness.walk(1)
    assert harness.model is not None and not isinstance(harness.model, ExtendedSegmenter) and not harness.state
    before = [_predict(harness)]
    for step in (2, 3):
        harness.walk(step)
        logits = _predict(harness)
        for earlier in before:
            assert torch.equal(logits[:, : earlier.shape[1]], earlier)
            kept = logits.argmax(1) < earlier.shape[1]
            assert torch.equal(logits.argmax(1)[kept], earlier.argmax(1)[kept]) and kept.any()
        before.append(logits)
    assert harness.state["counts"][-1] > 0


def test_a_copy_is_tuned_in_the_first_later_step_alone() -> None:
    harness = MethodHarness("constellation-extend", options={"tune_copy": True})
    harness.walk(1)
    before, network = _predict(harness), harness.model
    assert network is not None
    harness.walk(2)
    model = harness.model
    assert isinstance(model, ExtendedSegmenter) and model.tuned is not None and not model.tuning
    assert model.tuned.head_sizes == [1] == [model.extension.tuned]
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor)
    tuned = dict(model.tuned.named_parameters())
    own = dict(model.encoder.named_parameters(prefix="encoder"))
    assert any(not torch.equal(tuned[name], parameter) for name, parameter in own.items())
    output = model(model.normalize(PIXELS))
    assert torch.equal(output.logits[:, : before.shape[1]], before)
    harness.walk(3)
    again = harness.model
    assert isinstance(again, ExtendedSegmenter) and again.tuned is not None
    assert all(torch.equal(again.tuned.state_dict()[name], tensor) for name, tensor in tuned.items())
    assert torch.equal(_predict(harness)[:, : output.logits.shape[1]], output.logits)


@pytest.mark.parametrize("within", [0, 2, ANY])
@torch.no_grad()
def test_the_logits_by_which_a_copy_is_tuned(within: int) -> None:
    network = _after_step_0()
    model = extend(network, 2, within, 16, 3, tuned=True).eval()
    assert model.tuned is not None
    model.tuning, images = True, model.normalize(PIXELS)
    output, own = model(images), network.predict(PIXELS)
    assert torch.equal(output.logits[:, :-2], own)
    rival = own.logsumexp(1, keepdim=True) if within == ANY else own[:, [within]]
    torch.testing.assert_close(output.logits[:, -2:] - rival, model.tuned(images).logits)


@pytest.mark.parametrize("within", [0, 2, ANY])
@torch.no_grad()
def test_the_output_of_a_head_is_the_log_odds_against_what_was_there(within: int) -> None:
    model = extend(_after_step_0(), 1, within, 16, 3).eval()
    last_layer(model.heads[-1]).bias.fill_(3.0)
    output = model(model.normalize(PIXELS))
    odds = model.heads[-1](output.features[:, :16])
    before = output.logits[:, :-1]
    rival = before.logsumexp(1, keepdim=True) if within == ANY else before[:, [within]]
    torch.testing.assert_close(output.logits[:, -1:] - rival, odds)
    again = model.classify(output.features)
    torch.testing.assert_close(again, output.logits)


def test_how_much_is_known_of_earlier_classes() -> None:
    harness = MethodHarness("constellation-extend")
    harness.walk(1)
    method, ctx, _ = harness.enter(1)
    none = torch.zeros(0, 8)
    counts = torch.tensor([9.0, 0.0, 22.5, 200.0, 300.0])
    method.bank = GaussianBank(counts, torch.zeros(0, dtype=torch.int32), none[:, 0], none, none, none[:, :, None])
    assert method._unknown(ctx) == pytest.approx(0.5)  # nothing of the first class, half enough of the second


def test_cells_of_the_photos_are_replayed_instead_of_draws(tmp_path: Path, shapes: Path) -> None:
    listed = tmp_path / "photos.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(shapes.glob("JPEGImages/val*"))))
    harness = MethodHarness("constellation-extend", options={"photos": listed, "pseudo": 0.0})
    harness.walk(1)
    method, ctx, _ = harness.enter(1)
    assert method.shown is not None and len(method.shown) == method.shown_counts.sum() > 0
    starts = method.shown_counts.cumsum(0) - method.shown_counts
    amounts = torch.full((len(method.bank.counts),), 50.0)
    features, ids = method._draw(amounts, ctx.generator, 200)
    for class_id, (first, number) in enumerate(zip(starts.tolist(), method.shown_counts.tolist(), strict=True)):
        own = features[ids == class_id]
        cells = method.shown[first : first + number].float()
        assert not number or all((cells == row).all(1).any() for row in own)
    assert (ids == 255).any() and method.shown_counts[0] == 0
    replayed, new = method.totals[:4] - method.found[:4], method.found[4:].sum()
    assert torch.equal(replayed[1:] >= new, method.bank.counts[1:4] > 0)


@torch.no_grad()
def test_a_restrained_head_decides_with_the_image_and_avoids_unlike_cells() -> None:
    draw = torch.Generator().manual_seed(0)
    head, described = AddedHead(6, 2), torch.randn(2, 6, 3, 4, generator=draw)
    before, best = (torch.randn(2, 1, 3, 4, generator=draw) for _ in range(2))
    trained = head(described)
    assert torch.equal(head(described, before, best), trained)
    mean, variance = torch.randn(6, generator=draw), torch.rand(6, generator=draw) + 0.5
    head.penalise(1, mean, variance, 4.0)
    head.restrain(1.5, 0.25)
    score = ((described - mean[:, None, None]).square() / variance[:, None, None]).mean(1)
    odds = trained - 1.5
    odds[:, 1] -= 4 * (score - 1).clamp_min(0)
    torch.testing.assert_close(head(described), odds)
    lead, share = before + odds - best, trained.sigmoid()
    whole = (lead * share).sum((2, 3), keepdim=True) / share.sum((2, 3), keepdim=True)
    torch.testing.assert_close(before + head(described, before, best) - best, 0.75 * lead + 0.25 * whole)


def test_only_the_method_itself_continues_from_an_extended_network() -> None:
    harness = MethodHarness("constellation-extend")
    harness.walk(2)
    assert harness.model is not None
    info = StepInfo(
        architecture=harness.model.architecture,
        head_sizes=harness.model.head_sizes,
        names=[f"class{i}" for i in range(5)],
        dataset_ids=list(range(5)),
        method="constellation-extend",
        dataset="voc",
        task="rehearsal",
        setting="overlap",
        step=1,
        seed=0,
        compat=None,
        base=3,
        crop=64,
        test_fill=0,
        lead=["background"],
    )
    continuing = {name for name in METHODS if default_method(name).can_continue(info, harness.state) is None}
    assert continuing == {"constellation-extend"}


@pytest.mark.parametrize(("tune_copy", "stage"), [(False, 0), (True, 0), (True, 1)])
def test_a_run_resumes_in_a_later_step(tune_copy: bool, stage: int, shapes: Path, tmp_path: Path) -> None:
    def settings(out: str) -> dict:
        options = {"epochs": 2, "crops": 2, "width": 32, "photos": str(listed), "tune_copy": tune_copy}
        return tiny_settings("constellation-extend", shapes, tmp_path / out) | {"constellation-extend": options}

    listed = tmp_path / "photos.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(shapes.glob("JPEGImages/val*"))))
    straight = train(parse_config(settings("straight")), console=QUIET, steps=range(2))
    tree, iterate = settings("broken"), StepTraining.iterate
    tree["train"]["save_minutes"] = 1e-9

    def until(training: StepTraining, raw: Batch) -> dict[str, torch.Tensor]:
        if (training.ctx.step, training.stage, training.iteration) == (1, stage, 2):
            raise Stopped(signal.SIGTERM)
        return iterate(training, raw)

    with patch.object(StepTraining, "iterate", until), pytest.raises(Stopped):
        train(parse_config(tree), console=QUIET, steps=range(2))
    broken = train(parse_config(tree), console=QUIET, steps=range(2))
    for name in ("model.safetensors", "bank.safetensors"):
        assert (broken / "step_1" / name).read_bytes() == (straight / "step_1" / name).read_bytes()
