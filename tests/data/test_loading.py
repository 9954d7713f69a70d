"""A run's workers serve one pass over data after another."""

import itertools
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from starseg.data.loading import Loading, Pass
from starseg.data.step import EpochSampler, StepDataset
from starseg.data.voc import open_voc

IDENTITY = np.arange(256, dtype=np.uint8)


def _pass(loading: Loading, shapes: Path, seed: int, count: int = 8) -> Pass:
    data = StepDataset(open_voc(shapes).train, np.arange(count), IDENTITY, 48, (seed, 0))
    return loading.over(data, EpochSampler(count, 2, [0, 1], (seed, 0)))


def _images(batches: Pass) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def test_workers_are_started_once_and_end_with_the_run(shapes: Path) -> None:
    loading, before = Loading(2), set(multiprocessing.active_children())
    want = [_images(_pass(Loading(), shapes, seed, 2 * seed)) for seed in (1, 2, 3)]
    serving = []
    for seed in (1, 2, 3):
        assert torch.equal(_images(_pass(loading, shapes, seed, 2 * seed)), want[seed - 1])
        serving.append({child.pid for child in set(multiprocessing.active_children()) - before})
    assert len(serving[0]) == 2 and serving[0] == serving[1] == serving[2]
    loading.close()
    assert set(multiprocessing.active_children()) == before
    assert torch.equal(_images(_pass(loading, shapes, 1, 2)), want[0])
    loading.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_unfinished_pass_ordered_is_not_seen_by_the_next(shapes: Path, workers: int) -> None:
    loading = Loading(workers)
    broken = iter(_pass(loading, shapes, 1))
    next(broken)
    assert torch.equal(_images(_pass(loading, shapes, 2)), _images(_pass(Loading(), shapes, 2)))
    with pytest.raises(RuntimeError, match="another pass"):
        next(broken)
    loading.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_can_be_repeated_and_draws_no_random_number(shapes: Path, workers: int) -> None:
    loading = Loading(workers)
    batches, state = _pass(loading, shapes, 1), torch.get_rng_state()
    assert len(batches) == 8 and torch.equal(_images(batches), _images(batches))
    list(itertools.islice(batches, 1))
    assert torch.equal(torch.get_rng_state(), state)
    loading.close()
