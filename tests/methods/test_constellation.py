"""Constellation: its descriptor, the stages of a step, and what its options do."""

import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from torch import Tensor

from starseg.config import parse_config
from starseg.contract import MethodHarness, tiny_settings
from starseg.data.samples import Batch
from starseg.engine.checkpoint import load_bank, load_info, load_model
from starseg.engine.fit import StepTraining
from starseg.engine.runner import Runner
from starseg.errors import Stopped, UserError
from starseg.experiments.train import train
from starseg.methods.protocol import method_options
from starseg.models import Architecture, make_network
from starseg.models.decoders import Descriptor

QUIET = Console(quiet=True)


def settings(shapes: Path, out: Path, **options: object) -> dict:
    return tiny_settings("constellation", shapes, out) | {"constellation": {"epochs": 2, "crops": 2, **options}}


def test_the_fitted_descriptor_is_standardised_and_decorrelated() -> None:
    model = make_network(Architecture("test_resnet", "descriptor", options={"width": 16, "window": 3}), [1]).eval()
    decoder = model.decoder
    assert isinstance(decoder, Descriptor)
    images = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.encoder(images)
        raw = decoder.raw(maps, (6, 6)).movedim(1, -1).flatten(0, 2).double()
        assert raw.shape[1] == decoder.raw_width == sum(model.encoder.channels[-2:]) + 2 * model.encoder.channels[-1]
        decoder.fit(raw.mean(0), raw.T.cov(correction=0), floor=0.0)
        features = model(images).features.movedim(1, -1).flatten(0, 2)
        image = raw[0, -model.encoder.channels[-1] :].float()
        torch.testing.assert_close(image, maps[-1][0].mean((1, 2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.mean(0), torch.zeros(16), atol=2e-3, rtol=0)
    torch.testing.assert_close(features.T.cov(correction=0), torch.eye(16), atol=2e-2, rtol=0)


def test_a_step_that_trains_its_network_has_two_stages() -> None:
    _, ctx, _ = MethodHarness("constellation").enter(0)
    for base, pretrained, stages in (
        ("auto", False, ["network", "classifier"]),
        ("auto", True, ["classifier"]),
        ("frozen", False, ["classifier"]),
        ("trained", True, ["network", "classifier"]),
    ):
        method = MethodHarness("constellation", options={"base": base}).method()
        assert [s.name for s in method.stages(replace(ctx, pretrained=pretrained))] == stages
        assert [s.name for s in method.stages(replace(ctx, step=1))] == ["classifier"]


def test_default_options_leave_the_description_of_the_network_as_it_was() -> None:
    plain = MethodHarness("constellation").method()
    assert plain.architecture(Architecture("test_resnet")).options == {"width": 256, "window": 5}
    assert plain.layout.hidden == 256
    other = MethodHarness("constellation", options={"maps": 1, "image_mean": False, "limit": 9}).method()
    options = other.architecture(Architecture("test_resnet")).options
    assert options == {"width": 256, "window": 5, "maps": 1, "image_mean": False, "limit": 9}


@pytest.mark.parametrize(("maps", "window", "image_mean"), [(1, 0, False), (1, 3, False), (3, 0, True), (9, 5, True)])
def test_the_descriptor_has_the_parts_that_are_switched_on(maps: int, window: int, image_mean: bool) -> None:
    options = {"width": 8, "window": window, "maps": maps, "image_mean": image_mean}
    model = make_network(Architecture("test_resnet", "descriptor", options=options), [1]).eval()
    channels = model.encoder.channels
    decoder = model.decoder
    assert isinstance(decoder, Descriptor)
    assert decoder.raw_width == sum(channels[-maps:]) + ((window > 0) + image_mean) * channels[-1]
    with torch.no_grad():
        images = torch.rand(2, 3, 64, 64)
        assert decoder.raw(model.encoder(images), (4, 4)).shape == (2, decoder.raw_width, 4, 4)
        assert model(images).features.shape == (2, 8, 4, 4)


def test_an_even_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"constellation\.window: .*odd"):
        method_options("constellation", parse_config(settings(Path("data"), Path("run"), window=4)))


def test_a_background_cell_is_relabelled_only_where_an_earlier_class_is_probable() -> None:
    harness = MethodHarness("constellation", options={"pseudo": 0.8})
    harness.walk(1)
    method, ctx, _ = harness.enter(1)
    chances = torch.tensor([[0.1, 0.9, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    with patch.object(type(method), "_previous", lambda *_: chances.log()):
        labels = method._labels(ctx, torch.zeros(4, 256), torch.tensor([0, 0, 0, 4]))
        assert labels.tolist() == [1, 0, 0, 4]
        method.options = method.options.model_copy(update={"pseudo": 1.0})
        assert method._labels(ctx, torch.zeros(4, 256), torch.tensor([0, 0, 0, 4])).tolist() == [0, 0, 0, 4]


def test_draws_are_learnt_with_the_previous_probabilities_unless_they_look_new() -> None:
    harness = MethodHarness("constellation", options={"shift": 0.2})
    harness.walk(1)
    method, ctx, _ = harness.enter(1)
    drawn, ids = torch.zeros(4, 256), torch.tensor([0, 0, 2, 255])
    before = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2]])
    now = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1], [0.2, 0.1, 0.1, 0.1, 0.5], *[[0.1, 0.2, 0.2, 0.2, 0.3]] * 2])
    with patch.object(type(method), "_previous", lambda *_: before.log()):
        terms, counted = method._replayed(ctx, drawn, ids, now.log())
        assert counted.tolist() == [True, False, True, False]
        torch.testing.assert_close(terms, torch.where(counted, -(before * now[:, :4].log()).sum(1), 0))
        method.options = method.options.model_copy(update={"soft_targets": False})
        terms, counted = method._replayed(ctx, drawn, ids, now.log())
        assert counted.tolist() == [True, False, False, False]  # the third is doubtful: it looks like class 1
        torch.testing.assert_close(terms[0], -now[0, 0].log())


def _stop(stage: int, iteration: int) -> object:
    iterate = StepTraining.iterate

    def until(training: StepTraining, raw: Batch) -> dict[str, Tensor]:
        if (training.stage, training.iteration) == (stage, iteration):
            raise Stopped(signal.SIGTERM)
        return iterate(training, raw)

    return patch.object(StepTraining, "iterate", until)


def test_step_0_resumes_in_either_stage(shapes: Path, tmp_path: Path) -> None:
    def run(tree: dict) -> Path:
        with Runner(parse_config(tree), QUIET, range(1)) as runner:
            return runner.run()

    straight = run(settings(shapes, tmp_path / "straight"))
    tree = settings(shapes, tmp_path / "broken")
    tree["train"]["save_minutes"] = 1e-9
    for stage, iteration in ((0, 1), (1, 0), (1, 2)):
        with _stop(stage, iteration), suppress(Stopped):
            run(tree)
            pytest.fail("was to break off")
    broken = run(tree)
    for name in ("model.safetensors", "bank.safetensors"):
        assert (broken / "step_0" / name).read_bytes() == (straight / "step_0" / name).read_bytes()


def test_the_network_stays_frozen_and_the_bank_grows(shapes: Path, tmp_path: Path) -> None:
    run = train(parse_config(settings(shapes, tmp_path / "run", modes=2, background_modes=3, factors=4)), console=QUIET)
    models = [load_model(run / f"step_{t}")[0] for t in range(3)]
    for part in ("encoder", "decoder"):
        first = getattr(models[0], part).state_dict()
        for later in models[1:]:
            assert all(torch.equal(first[k], v) for k, v in getattr(later, part).state_dict().items())
    info = load_info(run / "step_2")
    assert (info.lead, info.hidden, info.architecture.decoder) == (["background"], 256, "descriptor")
    bank = load_bank(run / "step_2")
    assert len(bank["counts"]) == 6 and bank["factors"].shape[1:] == (256, 4)
    assert bank["owners"].bincount().tolist() == [3, 2, 2, 2, 2, 2]
    older = load_bank(run / "step_1")
    kept = older["means"][older["owners"] == 1]
    assert torch.equal(bank["means"][bank["owners"] == 1], kept)


OFF = {
    "base": "frozen",
    "crops": 1,
    "maps": 1,
    "window": 0,
    "image_mean": False,
    "floor": 0,
    "limit": 1e6,
    "hidden": 0,
    "warm_start": False,
    "modes": 1,
    "background_modes": 1,
    "factors": 0,
    "pseudo": 1,
    "soft_targets": False,
    "balance": 0,
    "draws": 0,
    "reject": False,
    "shift": 1,
    "refit": False,
}


def test_every_part_can_be_switched_off(shapes: Path, tmp_path: Path) -> None:
    run = train(parse_config(settings(shapes, tmp_path / "run", **OFF)), console=QUIET)
    info, bank = load_info(run / "step_2"), load_bank(run / "step_2")
    assert info.hidden == 0 and info.architecture.options["window"] == 0
    assert bank["owners"].tolist() == [0, 1, 2, 3, 4, 5] and bank["factors"].shape[2] == 0
    first = load_bank(run / "step_0")
    for name in ("counts", "means", "deviations"):
        assert torch.equal(bank[name][0], first[name][0])


def test_it_continues_from_its_own_steps_only(shapes: Path, tmp_path: Path) -> None:
    star = tiny_settings("star", shapes, tmp_path / "star")
    train(parse_config(star), console=QUIET, steps=range(1))
    other = settings(shapes, tmp_path / "run") | {"start_from": str(tmp_path / "star" / "step_0")}
    with pytest.raises(UserError, match="differs from this run in architecture, lead, hidden"):
        train(parse_config(other), console=QUIET)


def test_the_time_of_every_stage_is_measured(shapes: Path, tmp_path: Path) -> None:
    with Runner(parse_config(settings(shapes, tmp_path / "run")), QUIET, range(1)) as runner:
        network, classifier = runner.stage_times(0)
        runner.run()
        assert (network.name, network.epochs, network.features) == ("network", 1, None)
        assert (classifier.name, classifier.epochs, classifier.crops) == ("classifier", 2, 2)
        assert network.total(10) == 10 * network.images * 2
        assert [t.name for t in runner.stage_times(1)] == ["classifier"]
    assert classifier.features is not None and 0 < classifier.features < classifier.images
    assert classifier.total(10) == 10 * 2 * (classifier.images + 2 * classifier.features)
