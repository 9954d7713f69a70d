"""The shortcuts of the loss path and of the evaluation give what the dense, literal path gives."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from starseg.bench.dense import dense_bce, dense_old_prediction
from starseg.losses.star import bce_per_class
from starseg.models.prediction import LargestLogit, predict_upsampled
from starseg.ops.bilinear import largest, resize, resize_at_support, subsample_to_support
from starseg.ops.upsampled_bce import UpsampledBce
from starseg.replay.statistics import old_prediction, sample_at_stride
from starseg.tasks import IGNORE

EPS = torch.finfo(torch.float32).eps
seeds = st.integers(0, 2**31)
sides = st.integers(1, 7)


def random_labels(draw: torch.Generator, shape: tuple[int, int, int], ids: int) -> Tensor:
    """Ids 0 .. ids - 1, and a few pixels that are ignored."""
    labels = torch.randint(0, ids, shape, generator=draw, dtype=torch.uint8)
    return torch.where(torch.rand(shape, generator=draw) < 0.1, IGNORE, labels).byte()


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    maps=st.tuples(st.integers(1, 3), st.integers(1, 5), sides, sides),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    first_id=st.integers(1, 4),
    pos_weight=st.sampled_from([0.5, 1.0, 4.0, 30.0]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    ignored_as_negatives=st.booleans(),
    channels_last=st.booleans(),
)
def test_base_loss_and_its_gradient(
    seed: int,
    maps: tuple[int, int, int, int],
    size: tuple[int, int],
    first_id: int,
    pos_weight: float,
    scale: float,
    ignored_as_negatives: bool,
    channels_last: bool,
) -> None:
    """Sizes that are no multiples, ignored pixels, classes that are absent, logits that saturate."""
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(maps, generator=draw)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    labels = random_labels(draw, (maps[0], *size), 6)
    weights = torch.rand(maps[1], generator=draw)
    small, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = bce_per_class(small, labels, first_id, pos_weight, ignored_as_negatives=ignored_as_negatives)
    want = dense_bce(resize(wide, size), labels, first_id, pos_weight, ignored_as_negatives)
    (loss @ weights).backward()
    (want @ weights.double()).backward()
    # A weight in the resize is rounded relative to 1 where the literal path here is in float64.
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6 * scale * pos_weight)
    torch.testing.assert_close(small.grad.double(), wide.grad, rtol=1e-4, atol=1e-5 * float(wide.grad.abs().max()))


@pytest.mark.parametrize("ignored_as_negatives", [False, True])
def test_gradient_in_float64(ignored_as_negatives: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=draw)
    labels = random_labels(draw, (2, 11, 13), 5)
    assert torch.autograd.gradcheck(
        lambda x: UpsampledBce.apply(x, labels, 2, 4.0, ignored_as_negatives),
        logits.requires_grad_(),
        check_batched_grad=False,
    )


def test_losses_of_frozen_logits_need_no_gradient() -> None:
    logits, labels = torch.randn(2, 3, 2, 2), torch.randint(0, 4, (2, 32, 32))
    assert not bce_per_class(logits, labels, 1).requires_grad
    with torch.inference_mode():
        want = bce_per_class(logits.clone(), labels, 1)
    assert torch.equal(bce_per_class(logits.requires_grad_(), labels, 1).detach(), want)


@given(seed=seeds, cells=st.tuples(sides, sides), stride=st.integers(1, 17), extra=st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_thinned_masks_resize_to_the_same(seed: int, cells: tuple[int, int], stride: int, extra: int) -> None:
    size = tuple(c * stride + extra for c in cells)
    labels = random_labels(torch.Generator().manual_seed(seed), (2, *size), 3)
    few = subsample_to_support(labels, cells)
    for label in range(3):
        whole, part = ((x == label)[:, None].float() for x in (labels, few))
        assert torch.equal(resize(part, cells), resize(whole, cells))
    if not extra:
        assert torch.equal(sample_at_stride(few, few.shape[-1] // cells[-1]), sample_at_stride(labels, stride))
        assert few.shape[1] <= 2 * cells[0]


@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), sides, sides),
    stride=st.integers(1, 17),
    extra=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.5]),
)
@settings(deadline=None, max_examples=100)
def test_old_prediction(seed: int, shape: tuple[int, int, int, int], stride: int, extra: int, threshold: float) -> None:
    """Equal wherever the dense path itself does not hang on the rounding of the interpolation."""
    logits = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    cells = shape[2:]
    size = tuple(c * stride + extra for c in cells)
    whole = resize(logits, size)
    assert (
        resize_at_support(logits, size, cells) - thin_maps(whole, cells)
    ).abs().max() <= 8 * EPS * logits.abs().max()
    got, want = (
        old_prediction(logits, size, cells, threshold),
        subsample_to_support(dense_old_prediction(whole, threshold), cells),
    )
    best = whole.topk(min(2, shape[1]), 1).values
    margin = (best[:, 0] - threshold).abs()
    if shape[1] > 1:
        margin = torch.minimum(margin, best[:, 0] - best[:, 1])
    sure = subsample_to_support(margin, cells) > 16 * EPS * logits.abs().max()
    assert torch.equal(got[sure], want[sure])
    assert sure.float().mean() > 0.9 or sure.numel() < 100


def thin_maps(maps: Tensor, cells: tuple[int, ...]) -> Tensor:
    return subsample_to_support(maps.flatten(0, 1), cells).unflatten(0, maps.shape[:2])


@pytest.mark.parametrize("old_classes", [15, 100])
def test_old_prediction_of_a_training_batch(old_classes: int) -> None:
    logits = 2 * torch.randn(2, old_classes, 32, 32, generator=torch.Generator().manual_seed(0)) - 3
    want = subsample_to_support(dense_old_prediction(resize(logits, (512, 512))), (32, 32))
    assert torch.equal(old_prediction(logits, (512, 512), (32, 32)), want)


@given(seed=seeds, parts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_largest_of_parts_is_that_of_the_whole(seed: int, parts: list[int]) -> None:
    """Ties included: the first wins."""
    maps = torch.randint(0, 3, (2, sum(parts), 4, 4), generator=torch.Generator().manual_seed(seed)).float()
    best, winner = largest(maps.split(parts, 1))
    want = maps.max(1)
    assert torch.equal(best, want.values) and torch.equal(winner, want.indices)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("of_sigmoids", [False, True])
@pytest.mark.parametrize("classes", [1, 20, 150])
@pytest.mark.parametrize("shift", [0, -20, -40, -80])
def test_evaluation_of_what_can_win(classes: int, shift: float, of_sigmoids: bool, channels_last: bool) -> None:
    """The same predictions, saturated sigmoids included, with channels that have no say."""
    logits = 12 * torch.randn(2, 1 + classes, 8, 8, generator=torch.Generator().manual_seed(classes)) + shift
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    rule = LargestLogit(of_sigmoids, lead=1)
    want = rule(resize(logits.contiguous(), (512, 500)))
    assert torch.equal(predict_upsampled(rule, logits, (512, 500)), want)
    assert want.any() or shift < -20


def test_other_rules_see_whole_logits() -> None:
    logits = torch.randn(2, 4, 3, 3)
    rule = partial(torch.argmax, dim=1)
    assert torch.equal(predict_upsampled(rule, logits, (20, 30)), rule(resize(logits, (20, 30))))
