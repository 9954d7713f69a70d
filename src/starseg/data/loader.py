"""Loading of batches in worker processes that persist for a whole run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from signal import SIG_IGN, SIGINT, SIGTERM, signal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from starseg.data.cache import ImageCache
from starseg.data.samples import Batch, EpochSampler, SampleRequest, StepDataset
from starseg.errors import UserError

# Number of batches that each worker loads in advance, in shared memory.
PREFETCH = 4


class _Reader(Dataset[Batch | UserError]):
    """Data set addressed by sample requests, so that workers hold no state of a step; returns errors as values."""

    def __init__(self, cache: ImageCache | None) -> None:
        self.cache = cache

    def __getitem__(self, request: SampleRequest) -> Batch | UserError:
        try:
            return request.read(self.cache)
        except UserError as error:
            return error


class _Requests(Sampler[list[SampleRequest]]):
    """Sampler of the requests sent to the workers; its batches are replaced for every pass."""

    batches: Iterable[list[SampleRequest]] = ()

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        return iter(self.batches)


class PersistentLoader:
    """Loader that serves consecutive passes over data with the same workers, which are started by the first pass.

    Args:
        workers: number of loader workers; 0 loads in the calling process.
        cache: cache of decoded files, shared with the forked workers.
        pinned: whether to return batches in page-locked memory, for a GPU.
    """

    def __init__(self, workers: int = 0, cache: ImageCache | None = None, pinned: bool = False) -> None:
        self.workers, self.cache, self.pinned = workers, cache, pinned
        self._requests = _Requests()
        self._loader: DataLoader[Batch | UserError] | None = None
        self._passes = 0

    def over(self, dataset: StepDataset, sampler: EpochSampler) -> LoaderEpoch:
        """Return an iterable over the sampler's batches; each iteration is a new pass."""
        return LoaderEpoch(self, dataset, sampler)

    def close(self) -> None:
        """Stop the workers; a later pass starts new ones."""
        self._loader = None

    def run(self, batches: Iterable[list[SampleRequest]]) -> Iterator[Batch]:
        """Load batches; batches still pending from an unfinished earlier pass are discarded.

        Raises:
            UserError: a file cannot be read.
            RuntimeError: the pass is continued after another one has begun.
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
            # A separate generator, so that the loader's draws do not change the random numbers of training.
            generator=torch.Generator(),
        )


@dataclass(frozen=True)
class LoaderEpoch:
    """One pass over a sampler's batches; starting a pass ends the previous one of the same loader."""

    loading: PersistentLoader
    dataset: StepDataset
    sampler: EpochSampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self.loading.run([self.dataset.request(key) for key in keys] for keys in self.sampler)


def _leave_signals_to_the_run(worker: int) -> None:
    """Make a worker ignore Ctrl-C and SIGTERM: the run still needs its batches until the training state is saved."""
    for number in (SIGINT, SIGTERM):
        signal(number, SIG_IGN)


def _collate_or_say(samples: list[Batch | UserError]) -> Batch | UserError:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    return errors[0] if errors else collate([sample for sample in samples if isinstance(sample, Batch)])


def collate(samples: list[Batch]) -> Batch:
    """Collate samples into a batch, in a worker directly in shared memory, with images in channels_last format."""
    images = default_collate([s.images.permute(1, 2, 0) for s in samples]).permute(0, 3, 1, 2)
    labels, indices = (default_collate([getattr(s, name) for s in samples]) for name in ("labels", "indices"))
    return Batch(images, labels, indices, default_collate([s.extras for s in samples]))
