"""Cached features: order of the epochs, shares of processes, and the bound on their number."""

from contextlib import nullcontext
from itertools import chain

import pytest
import torch

import starseg.engine.features as module
from starseg.data.samples import FEATURES, Batch
from starseg.engine.features import CachedEpochs, FeatureCache, compute_features
from starseg.models import Architecture, make_network

CPU = torch.device("cpu")


def cache(crops: int) -> FeatureCache:
    rows = torch.arange(crops)
    return FeatureCache(rows.view(-1, 1, 1, 1).expand(-1, 3, 4, 1).half(), rows.view(-1, 1, 1).expand(-1, 4, 1), rows)


def indices(epochs: CachedEpochs) -> list[list[int]]:
    return [batch.indices.tolist() for batch in epochs]


def test_every_epoch_has_its_own_order_of_all_crops() -> None:
    epochs = CachedEpochs(cache(12), 3, 2, 4, (0, 1, 0), CPU)
    found = indices(epochs)
    assert len(epochs) == len(found) == 8
    first, second = list(chain(*found[:4])), list(chain(*found[4:]))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    batch = next(iter(epochs))
    assert batch.extras[FEATURES].dtype == torch.float32 and batch.images.shape == (3, 3, 0, 0)
    assert batch.extras[FEATURES][:, 0, 0, 0].tolist() == batch.labels[:, 0, 0].tolist() == batch.indices.tolist()


@pytest.mark.parametrize("start", range(9))
def test_resuming_yields_the_rest(start: int) -> None:
    whole = indices(CachedEpochs(cache(12), 3, 2, 4, (0, 1, 0), CPU))
    rest = CachedEpochs(cache(12), 3, 2, 4, (0, 1, 0), CPU, start)
    assert indices(rest) == whole[start:] and len(rest) == 8 - start


def test_a_process_with_a_small_share_repeats_crops() -> None:
    found = indices(CachedEpochs(cache(5), 2, 1, 3, (0, 1, 1), CPU))
    assert [len(batch) for batch in found] == [2, 2, 2] and set(chain(*found)) == set(range(5))


def test_the_number_of_cells_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_network(Architecture("test_resnet"), [2]).eval()
    draw = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            torch.randn(2, 3, 64, 64, generator=draw),
            torch.randint(0, 3, (2, 64, 64), generator=draw).byte(),
            torch.tensor([2 * i, 2 * i + 1]),
        )
        for i in range(3)
    ]
    with torch.no_grad():
        whole = compute_features(model, batches, 6, nullcontext, 0)
        monkeypatch.setattr(module, "MAX_CELLS", 30)
        some = compute_features(model, batches, 6, nullcontext, 0)
        monkeypatch.undo()
        chosen = compute_features(model, batches, 6, nullcontext, 0, cells=5)
    assert torch.equal(chosen.features, some.features)
    assert whole.features.shape == (6, 256, 16, 1) and some.features.shape == (6, 256, 5, 1)
    assert whole.indices.tolist() == list(range(6))
    for row in range(6):
        pairs, chosen = (
            [(f.tolist(), int(y)) for f, y in zip(part.features[row, :, :, 0].T, part.labels[row], strict=True)]
            for part in (whole, some)
        )
        assert all(pair in pairs for pair in chosen)
    ordered = torch.cat([batch.extras[FEATURES] for batch in whole.ordered(4, CPU)])
    assert torch.equal(ordered, whole.features.float())
