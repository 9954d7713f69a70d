"""The data of a run: files, class indices, and loaders of each step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment
from rich.console import Console

from starseg.config import RunConfig
from starseg.data.cache import make_cache
from starseg.data.datasets import NO_FILES, Dataset, Split, find_dataset
from starseg.data.index import class_index
from starseg.data.loader import PREFETCH, LoaderEpoch, PersistentLoader
from starseg.data.samples import EpochSampler, StepDataset, extra_map
from starseg.data.selection import Kind, select_step
from starseg.data.validation import open_splits
from starseg.errors import UserError
from starseg.methods import Method
from starseg.replay.memory import MemoryRule
from starseg.tasks import TaskSequence
from starseg.utils.machine import cores, free_shared_memory

# An RGB image, its mask and its saliency map.
_BYTES_PER_PIXEL = 5


def workers_for(config: RunConfig, fabric: Fabric) -> int:
    """Return the number of loader workers per process; "auto" stays within its share of cores and shared memory."""
    if config.data.workers != "auto":
        return config.data.workers
    if fabric.device.type != "cuda":
        return 0
    # srun assigns separate cores to each process; with other launchers, the processes share all cores.
    sharing = 1 if SLURMEnvironment.detect() else config.train.devices
    batch = max(config.train.batch_size // (config.train.devices * config.train.num_nodes), config.eval.batch_size)
    ordered = PREFETCH * batch * _BYTES_PER_PIXEL * config.data.crop**2
    room = free_shared_memory() // config.train.devices // ordered
    return min(8, max(1, cores() // sharing), room)


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        dataset: the data set.
        task: the steps in which the method learns the task.
        train_pixels, test_pixels: class index of each split, [N, 256].
        config: configuration of the run.
        loading: loader that all passes share.
        rank, world: number of this process, and number of processes.
        memory: how the method uses exemplars; None if it uses none.
        maps: folders of the extra maps that the method requests, by name.
    """

    dataset: Dataset
    task: TaskSequence
    train_pixels: np.ndarray
    test_pixels: np.ndarray
    config: RunConfig
    loading: PersistentLoader = field(default_factory=PersistentLoader)
    rank: int = 0
    world: int = 1
    memory: MemoryRule | None = None
    maps: Mapping[str, Path] = field(default_factory=dict)

    def positions(self, step: int, kind: Kind) -> np.ndarray:
        """Return the positions of a step's images in the split, ascending, by their masks or a published list."""
        listed = self._listed(step, kind)
        pixels = self.train_pixels if kind == "train" else self.test_pixels
        split = self.dataset.train if kind == "train" else self.dataset.test
        return select_step(split, pixels, self.task, step, kind) if listed is None else listed

    def digest(self, step: int) -> str:
        """Return a short digest of the names of a step's training images, in order."""
        names = [self.dataset.train.ids[place] for place in self.positions(step, "train")]
        return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]

    def _listed(self, step: int, kind: Kind) -> np.ndarray | None:
        folder, task = self.config.data.lists, self.task
        held_out = self.config.data.validation is not None
        if folder is None or (held_out and kind == "test"):
            return None
        path = folder / self.dataset.key / f"{task.setting}_{task.name}_{kind}_{step:02d}.npy"
        if not path.is_file():
            return None
        ids = (self.dataset.train if kind == "train" else self.dataset.test).ids
        places = {name: place for place, name in enumerate(ids)}
        left_out = set(self.dataset.test.ids) if held_out else set()
        try:
            names = np.load(path, allow_pickle=False).tolist()
            listed = [places[name] for name in names if name not in left_out]
            return np.sort(np.array(listed, dtype=np.int64))
        except KeyError as error:
            raise UserError(f"{path}: lists {error}, which is not in {self.dataset.root}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: expected a published list of image names in an .npy file ({error})") from error

    def check(self, steps: range | None = None) -> None:
        """Check that the given steps (all by default) can be trained.

        Raises:
            UserError: a step does not exist, a class has no training pixel in its step, a step has fewer training
                images than a batch, or no test image shows a class seen so far.
        """
        every = range(len(self.task))
        wanted = every if steps is None else steps
        if not wanted or wanted[0] not in every or wanted[-1] not in every:
            asked = f"{wanted.start}-{wanted.stop - 1}"
            raise UserError(f"task {self.task.name} has steps 0-{every[-1]}, asked for {asked}")
        for step in wanted:
            chosen = self.positions(step, "train")
            absent = [c for c in self.task.new(step) if not self.train_pixels[chosen, c].any()]
            if lost := set(self.task.domains_of(step)) - set(self.dataset.train.domains):
                known = ", ".join(sorted(set(self.dataset.train.domains)))
                raise UserError(
                    f"step {step}: no training image is of domain {', '.join(sorted(lost))}; domains of this data set: "
                    f"{known}"
                )
            if absent and not (self.task.domains or self.config.task.allow_absent):
                raise UserError(
                    f"step {step}: no training image shows {', '.join(map(self.task.label, absent))} "
                    f"(task {self.task.name}, {self.task.setting}); leave the class out, add images, or train all the "
                    "same with task.allow_absent=true"
                )
            if len(chosen) < self.config.train.batch_size:
                raise UserError(
                    f"step {step}: {len(chosen)} training images, fewer than train.batch_size "
                    f"({self.config.train.batch_size}); give a smaller train.batch_size, or add images"
                )
            if not len(self.positions(step, "test")):
                raise UserError(f"step {step}: no test image shows a class seen so far")

    def train_loader(
        self, step: int, epochs: Sequence[int | str], drop_last: bool, exemplars: Split = NO_FILES, start: int = 0
    ) -> LoaderEpoch:
        """Return a loader of augmented training crops of a step's images and of its exemplar memory.

        Order and crops depend only on (seed, step, epoch, sample).

        Args:
            step: number of the step.
            epochs: the epochs to iterate over; a name denotes an epoch with its own crops.
            drop_last: whether to drop the incomplete last batch of each epoch.
            exemplars: files of the exemplar memory.
            start: number of batches to skip.
        """
        seed, kept = (self.config.seed, step), len(exemplars)
        labels = self.dataset.labels
        table = labels.compose(self.task.relabelling(step, "train"))
        all_seen = self.memory is not None and self.memory.labels == "seen"
        split, positions = self.dataset.train, self.positions(step, "train")
        crops = StepDataset(
            split + exemplars,
            np.append(positions, len(split) + np.arange(kept)),
            table,
            self.config.data.crop,
            seed,
            kept,
            labels.compose(self.task.relabelling(step, "test")) if all_seen else table,
            self.maps,
            self.config.data.decode == "scaled",
        )
        size, batch = self.samples(step, kept), self.config.train.batch_size
        drawn = len(crops) - size
        sampler = EpochSampler(size, batch, epochs, seed, drop_last, self.rank, self.world, start, drawn)
        return self.loading.over(crops, sampler)

    def samples(self, step: int, exemplars: int) -> int:
        """Return the number of samples in an epoch of a step.

        Exemplars count if the method appends them to the training images, but not if they fill half of each batch.
        """
        appended = self.memory is None or self.memory.mix == "append"
        return len(self.positions(step, "train")) + (exemplars if appended else 0)

    def test_loaders(self, step: int) -> list[LoaderEpoch]:
        """Return loaders of a step's test images, with the labels of all classes seen so far.

        There is one, or in the setting "domain" one for the domains of step 0 and one for those of later steps.
        """
        chosen, task = self.positions(step, "test"), self.task
        if not task.domains or not step:
            return [self._test_loader(step, chosen)]
        base = np.isin(np.array(self.dataset.test.domains)[chosen], task.domains_of(0))
        return [self._test_loader(step, chosen[part]) for part in (base, ~base)]

    def _test_loader(self, step: int, positions: np.ndarray) -> LoaderEpoch:
        full = self.config.eval.image == "full"
        table = self.dataset.labels.compose(self.task.relabelling(step, "test", self.dataset.test_fill))
        crop = None if full else self.config.data.crop
        images = StepDataset(self.dataset.test, positions, table, crop, None)
        batch = self.world if full else self.config.eval.batch_size
        return self.loading.over(images, EpochSampler(len(images), batch, [0], rank=self.rank, world=self.world))


def dataset_and_task(config: RunConfig, method: Method) -> tuple[Dataset, TaskSequence]:
    """Open the configured data set and return it with the steps in which ``method`` learns the configured task."""
    dataset = open_splits(config.data)
    return dataset, task_on(dataset, config, method)


def task_on(dataset: Dataset, config: RunConfig, method: Method) -> TaskSequence:
    """Return the steps in which ``method`` learns the configured task on a data set.

    Raises:
        UserError: the task does not fit the data set, or the method cannot learn so many classes.
    """
    if dataset.labels.wide and not method.wide:
        raise UserError(
            f"method {method.name} cannot be trained on {dataset.root}, as it takes at most 254 classes; take another "
            "method"
        )
    task = config.task
    sequence = find_dataset(dataset.key).task(dataset.names, task.name, task.steps, task.setting)
    return method.sequence(sequence.at_once() if task.at_once else sequence)


def open_data(
    config: RunConfig, method: Method, console: Console, fabric: Fabric | None = None, steps: range | None = None
) -> RunData:
    """Open, index and check the data of a run.

    Args:
        config: configuration of the run.
        method: the configured method.
        console: where the number of images and progress are printed.
        fabric: devices and processes of a training run; without it, no loader workers or cache are set up.
        steps: the steps to check; all by default.

    Raises:
        UserError: the data set cannot be read, an extra map is missing, or a step cannot be trained.
    """
    dataset, sequence = dataset_and_task(config, method)
    start = time.monotonic()
    train, test = (class_index(dataset, split) for split in (dataset.train, dataset.test))
    evaluated = "test" if config.data.validation is None else "validation"
    console.print(
        f"{dataset.root}: {len(train)} training and {len(test)} {evaluated} images, "
        f"classes indexed in {time.monotonic() - start:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    loading, maps = PersistentLoader(), method.extra_maps()
    for name, folder in maps.items():
        if lost := [image for image in dataset.train.images if not extra_map(folder, image).is_file()]:
            raise UserError(
                f"{extra_map(folder, lost[0])} is missing, the {name} map of {lost[0]}; "
                f"{len(lost)} of {len(dataset.train)} training images have none"
            )
    data = RunData(dataset, sequence, train, test, config, loading, rank, world, method.memory, maps)
    data.check(steps)
    if fabric:
        loading.workers, loading.pinned = workers_for(config, fabric), fabric.device.type == "cuda"
        if config.data.decode == "full":
            loading.cache = make_cache(config.data.cache, dataset.train, console, dataset.labels.wide)
    return data
