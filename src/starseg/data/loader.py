"""Loading of batches in workers that live as long as a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from signal import SIG_IGN, SIGINT, SIGTERM, signal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from starseg.data.cache import ImageCache
from starseg.data.samples import Batch, EpochSampler, SampleRequest, StepDataset
from starseg.errors import UserError

# Batches that a worker is ahead by, in shared memory.
PREFETCH = 4


class _Reader(Dataset[Batch | UserError]):
    """Data set of the workers: makes requested samples or returns the error; holds no state of a step."""

    def __init__(self, cache: ImageCache | None) -> None:
        self.cache = cache

    def __getitem__(self, request: SampleRequest) -> Batch | UserError:
        try:
            return request.read(self.cache)
        except UserError as error:
            return error


class _Requests(Sampler[list[SampleRequest]]):
    """Batch sampler of the requests sent to the workers; changes from epoch to epoch."""

    batches: Iterable[list[SampleRequest]] = ()

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        return iter(self.batches)


class PersistentLoader:
    """Loader whose workers, started by the first epoch, serve one epoch after another.

    Args:
        workers: how many; 0 loads in this process.
        cache: keeps what was decoded; shared with the workers, which are forked.
        pinned: whether batches lie in page-locked memory, for a GPU.
    """

    def __init__(self, workers: int = 0, cache: ImageCache | None = None, pinned: bool = False) -> None:
        self.workers, self.cache, self.pinned = workers, cache, pinned
        self._requests = _Requests()
        self._loader: DataLoader[Batch | UserError] | None = None
        self._passes = 0

    def over(self, dataset: StepDataset, sampler: EpochSampler) -> LoaderEpoch:
        """Return an epoch: all of the sampler's batches, each time it is iterated."""
        return LoaderEpoch(self, dataset, sampler)

    def close(self) -> None:
        """Stop the workers; another epoch would start new ones."""
        self._loader = None

    def run(self, batches: Iterable[list[SampleRequest]]) -> Iterator[Batch]:
        """Load batches; those that an earlier unfinished epoch has requested are discarded.

        Raises:
            UserError: a file that cannot be read.
            RuntimeError: asked for the rest of a pass after another one began.
        """
        self._passes += 1
        number, self._requests.batches = self._passes, batches
        if self._loader is None:
            self._loader = self._make()
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
            if number != self._passes:
                raise RuntimeError("another pass over the data began before this one had ended")

    def _make(self) -> DataLoader[Batch | UserError]:
        return DataLoader(
            _Reader(self.cache),
            batch_sampler=self._requests,
            num_workers=self.workers,
            collate_fn=_collate_or_say,
            worker_init_fn=_leave_signals_to_the_run,
            # A forked worker shares its parent's cache.
            multiprocessing_context="fork" if self.workers and self.cache else None,
            persistent_workers=self.workers > 0,
            pin_memory=self.pinned,
            prefetch_factor=PREFETCH if self.workers else None,
            # The loader's own: how often it draws from it must not change what training draws.
            generator=torch.Generator(),
        )


@dataclass(frozen=True)
class LoaderEpoch:
    """Epoch over some images; starting an epoch ends the one before."""

    loading: PersistentLoader
    dataset: StepDataset
    sampler: EpochSampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self.loading.run([self.dataset.request(key) for key in keys] for keys in self.sampler)


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: the run needs its batches until the state is saved."""
    for number in (SIGINT, SIGTERM):
        signal(number, SIG_IGN)


def _collate_or_say(samples: list[Batch | UserError]) -> Batch | UserError:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    return errors[0] if errors else collate([sample for sample in samples if isinstance(sample, Batch)])


def collate(samples: list[Batch]) -> Batch:
    """Collate samples into a batch with channels-last images; in a worker, directly in shared memory."""
    images = default_collate([s.images.permute(1, 2, 0) for s in samples]).permute(0, 3, 1, 2)
    labels, indices = (default_collate([getattr(s, name) for s in samples]) for name in ("labels", "indices"))
    return Batch(images, labels, indices, default_collate([s.extras for s in samples]))
