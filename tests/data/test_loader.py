"""The workers of a run serve one epoch after another."""

import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from starseg.data.datasets.base import Split
from starseg.data.datasets.voc import open_voc
from starseg.data.loader import LoaderEpoch, PersistentLoader
from starseg.data.samples import EpochSampler, StepDataset
from starseg.errors import UserError

IDENTITY = np.arange(256, dtype=np.uint8)


def _pass(loading: PersistentLoader, shapes: Path, seed: int, count: int = 8) -> LoaderEpoch:
    data = StepDataset(open_voc(shapes).train, np.arange(count), IDENTITY, 48, (seed, 0))
    return loading.over(data, EpochSampler(count, 2, [0, 1], (seed, 0)))


def _images(batches: LoaderEpoch) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def test_workers_are_started_once_and_end_with_the_run(shapes: Path) -> None:
    loading, before = PersistentLoader(2), set(multiprocessing.active_children())
    want = [_images(_pass(PersistentLoader(), shapes, seed, 2 * seed)) for seed in (1, 2, 3)]
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
def test_batches_of_an_unfinished_epoch_do_not_reach_the_next(shapes: Path, workers: int) -> None:
    loading = PersistentLoader(workers)
    broken = iter(_pass(loading, shapes, 1))
    next(broken)
    assert torch.equal(_images(_pass(loading, shapes, 2)), _images(_pass(PersistentLoader(), shapes, 2)))
    with pytest.raises(RuntimeError, match="another pass"):
        next(broken)
    loading.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_can_be_repeated_and_leaves_the_global_generator_alone(shapes: Path, workers: int) -> None:
    loading = PersistentLoader(workers)
    batches, state = _pass(loading, shapes, 1), torch.get_rng_state()
    assert len(batches) == 8 and torch.equal(_images(batches), _images(batches))
    list(itertools.islice(batches, 1))
    assert torch.equal(torch.get_rng_state(), state)
    loading.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_of_a_worker_names_the_file(shapes: Path, tmp_path: Path, workers: int) -> None:
    good, lost = open_voc(shapes).train, tmp_path / "lost.jpg"
    split = Split((*good.images[:3], lost), good.masks[:4], good.ids[:4])
    loading = PersistentLoader(workers)
    batches = loading.over(StepDataset(split, np.arange(4), IDENTITY, 48, None), EpochSampler(4, 2, [0]))
    with pytest.raises(UserError) as stopped:
        list(batches)
    assert str(stopped.value).startswith(str(lost)) and "\n" not in str(stopped.value)
    loading.close()


def test_workers_leave_signals_to_the_run(shapes: Path) -> None:
    """As when a batch system signals every process, or Ctrl-C a terminal's."""
    loading, before = PersistentLoader(2), set(multiprocessing.active_children())
    handlers = {number: signal.signal(number, lambda *_: os._exit(9)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        batches = iter(_pass(loading, shapes, 1))
        got = [next(batches).images, next(batches).images]  # one of each worker, so both have begun
        for worker in set(multiprocessing.active_children()) - before:
            for number in handlers:
                os.kill(worker.pid or 0, number)
        got += [batch.images for batch in batches]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert torch.equal(torch.cat(got), _images(_pass(PersistentLoader(), shapes, 1)))
    loading.close()
