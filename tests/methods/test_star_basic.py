"""STAR-Basic and STAR-Lite: what they store, derive and replay."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from starseg.config import PUBLISHED
from starseg.contract import MethodHarness
from starseg.errors import UserError
from starseg.methods import METHODS
from starseg.models.classifiers import linear_classifier
from starseg.replay.bank import PrototypeBank
from starseg.replay.derivation import combine, derive_prototypes, noise_of_prototypes
from starseg.replay.statistics import old_prediction

NOISES = ("dist", "angle", "bitwise")


def _entered(name: str, step: int = 1, **options: Any) -> tuple[Any, Any, MethodHarness]:
    run = MethodHarness(name, options=options)
    run.walk(step)
    method, ctx, _ = run.enter(step)
    return method, ctx, run


@pytest.mark.parametrize("noise", NOISES)
def test_basic_stores_one_number_of_noise(noise: str) -> None:
    run = MethodHarness("star-basic", options={"noise": noise})
    run.walk(2)
    width = run.model.width
    assert {k: tuple(v.shape) for k, v in run.state.items()} == {
        "counts": (5,),
        "prototypes": (4, width),
        f"{noise}_noise": (4, width) if noise == "bitwise" else (4,),
    }


def test_basic_s_noise_follows_from_star_s_statistics() -> None:
    """With the same network, prototypes and counts are STAR's, and "dist" is the norm of its noise."""
    star = MethodHarness("star")
    star.walk(1)
    basics = {noise: MethodHarness("star-basic", options={"noise": noise}) for noise in NOISES}
    bank = PrototypeBank.from_state_dict(star.state)
    for noise, run in basics.items():
        run.walk(1)
        torch.testing.assert_close(run.state["prototypes"], bank.prototypes)
        torch.testing.assert_close(run.state["counts"], bank.counts)
        stored = run.state[f"{noise}_noise"]
        if noise == "angle":
            assert bool((stored >= bank.noise.norm(dim=1)).all()), "an arc is longer than its chord"
        else:
            torch.testing.assert_close(stored, bank.noise if noise == "bitwise" else bank.noise.norm(dim=1))


@pytest.mark.parametrize("name", ["star-basic", "star-lite"])
@pytest.mark.parametrize("noise", NOISES)
def test_replayed_features_have_the_mean_norm_of_the_batch(name: str, noise: str) -> None:
    method, ctx, run = _entered(name, noise=noise)
    images, replayed = run.batch(1), {}

    def network(images: torch.Tensor, extra: torch.Tensor) -> Any:
        replayed["directions"] = extra[:-1]
        return ctx.model(images, extra)

    output = method.run_with_replay(images, network)
    directions = replayed["directions"]
    assert len(directions) == int(method.plan.per_iteration.sum()) > 0
    scaled = directions * output.features.norm(dim=1).mean()
    expected = ctx.model.classify(scaled.T[None, :, :, None])[0, :, :, 0].T
    torch.testing.assert_close(output.extra_logits, expected, atol=1e-4, rtol=1e-4)


def test_lite_stores_counts_and_derives_the_rest() -> None:
    method, ctx, run = _entered("star-lite")
    assert {k: tuple(v.shape) for k, v in run.state.items()} == {"counts": (4,)}
    batch, old = run.batch(1), ctx.old_model
    with torch.no_grad():
        output = old(batch.images)
    cells = tuple(output.features.shape[2:])
    seen = old_prediction(output.logits, batch.labels.shape[1:], batch.labels.shape[1:])[:, 8::16, 8::16]
    unit = F.normalize(output.features, dim=1).movedim(1, -1)
    sums = torch.stack([unit[seen == c].sum(0) for c in (1, 2, 3)])
    assert seen.shape[1:] == cells
    expected = combine(derive_prototypes(*linear_classifier(old.heads)), sums)
    torch.testing.assert_close(method.bank.prototypes, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(method.bank.noise, noise_of_prototypes(method.bank.prototypes, "dist"))


def test_lite_counts_what_star_counts() -> None:
    star, lite = MethodHarness("star"), MethodHarness("star-lite")
    for run in (star, lite):
        run.walk(1)
    assert lite.state["counts"].tolist() == star.state["counts"].tolist()
    method, _, _ = lite.enter(1)
    assert method.plan.carried[1:].tolist() == lite.state["counts"][1:].tolist()


def test_lite_continues_from_a_step_of_star() -> None:
    star = MethodHarness("star")
    star.walk(1)
    lite = MethodHarness("star-lite", model=star.model, state=star.state)
    lite.walk(2)
    assert lite.state["counts"].shape == (5,)


@pytest.mark.parametrize("name", ["star-basic", "star-lite"])
def test_a_step_without_what_is_needed_is_refused(name: str) -> None:
    run = MethodHarness("finetune")
    run.walk(1)
    wanted = {"star-basic": "prototype bank", "star-lite": "counts"}[name]
    with pytest.raises(UserError, match=f"step 1: {name} needs the {wanted} of 3 old classes"):
        MethodHarness(name, model=run.model, state={}).enter(1)


def test_a_bank_with_another_noise_is_not_taken() -> None:
    method = METHODS["star-basic"](METHODS["star-basic"].Options(noise="angle"))
    method.load_state_dict({"counts": torch.ones(2), "prototypes": torch.ones(1, 4), "dist_noise": torch.ones(1)})
    assert method.replay_counts() is None


def test_the_published_code_iterates(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        "starseg.methods.star_lite.iterate_adamw", lambda *args: called.append(1) or derive_prototypes(*args)
    )
    run = MethodHarness("star-lite")
    run.walk(1)
    run.enter(1)
    assert not called
    run.enter(1, choices=PUBLISHED)
    assert called
