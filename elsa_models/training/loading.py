"""Batches whose content depends on the seed, the epoch and the step alone: not on workers, processes, or a restart."""
import logging
import multiprocessing
import random
import signal
from itertools import islice, zip_longest
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from .._images import DataError
from .config import RecipeError
from .world import World, mix_seed

_logger = logging.getLogger(__name__)


def leave_signals_to_parent(worker: int) -> None:
    """Let a process that loads live until its parent ends it: signals go to both, and the parent finishes its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_MAX_UNREADABLE = 10  # one after the other, before it is taken for a fault of the disk


class Samples(Dataset):
    """A data set whose sample i of epoch e draws its augmentation from a generator of (seed, e, i).

    Samples that cannot be read are counted and replaced.
    """

    def __init__(self, dataset: Dataset, seed: int, missing: Any = None, times: int = 1, report: bool = True) -> None:
        """
        Args:
            dataset: Returns samples by their number; raises OSError or DataError for one that cannot be read.
            seed: Seed of the augmentation.
            missing: Sample to return in place of what cannot be read; None for the next that can.
            times: How often each sample is in it, with augmentations of its own.
            report: Warn of each sample that cannot be read, once.
        """
        self.dataset = dataset
        self.seed = seed
        self.missing = missing
        self.times = times
        self._reported = torch.full((len(dataset),), not report).share_memory_()  # by whatever worker
        self._unreadable = multiprocessing.Value('q', 0)  # of all workers

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, place: Tuple[int, int]) -> Any:
        epoch, first = place
        for attempt in range(_MAX_UNREADABLE):
            index = (first + attempt) % len(self)
            seed = mix_seed(self.seed, epoch, index)
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            try:
                return self.dataset[index % len(self.dataset)]
            except (OSError, DataError) as e:
                error = e
                with self._unreadable.get_lock():
                    self._unreadable.value += 1
                if not self._reported[index % len(self.dataset)]:
                    self._reported[index % len(self.dataset)] = True
                    _logger.warning('skipped: %s', e)
                if self.missing is not None:
                    return self.missing
        raise DataError(f'{_MAX_UNREADABLE} images in a row cannot be read, of them the last: {error}') from error

    def take_unreadable(self) -> int:
        """How many samples could not be read since this was last asked."""
        with self._unreadable.get_lock():
            number, self._unreadable.value = self._unreadable.value, 0
        return number


class _Order(Sampler):
    """Batches of places (epoch, index) of one process, from any step on."""

    def __init__(self, sampler: DistributedSampler, batch_size: int) -> None:
        self.sampler = sampler
        self.batches = BatchSampler(sampler, batch_size, drop_last=True)
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        self.sampler.set_epoch(self.epoch)
        for batch in islice(self.batches, self.start, None):
            yield [(self.epoch, index) for index in batch]


class TrainLoader:
    """The batches of one process in training.

    A step takes `batch_size` images over all processes, and each process its share in `accumulate` parts. Which images
    a step takes and how each is augmented is the same for any number of processes, parts and workers. A stream
    (IterableDataset) has the order of its reader, and is read again up to the place where an epoch goes on.
    """

    def __init__(
            self,
            dataset: Union[Dataset, IterableDataset],
            batch_size: int,
            world: World,
            seed: int,
            accumulate: int = 1,
            workers: int = 0,
            collate: Optional[Callable[[List[Any]], Any]] = None,
            wrap: Callable[[DataLoader], Any] = lambda loader: loader,
            min_steps: int = 0,
    ) -> None:
        """
        Args:
            dataset: Images and targets, by number or as a stream.
            batch_size: Images of a step, over all processes and parts. Lowered to what the data set holds.
            world: This process.
            seed: Seed of order and augmentation.
            accumulate: Parts of a step in each process.
            workers: Processes that load.
            collate: Makes a batch of samples.
            wrap: Applied to the loader, such as timm's PrefetchLoader.
            min_steps: Steps of an epoch, at least: it passes over the images as often as that takes.

        Raises:
            RecipeError: The images of a step cannot be shared equally.
        """
        parts = world.size * accumulate
        if batch_size % parts:
            raise RecipeError(
                f'batch_size: got {batch_size}, must be a multiple of {parts}: {world.size} processes of {accumulate}'
                f' accumulated parts.')
        self.samples = None
        stream = isinstance(dataset, IterableDataset)
        self.num_images = len(dataset) * (world.size if stream else 1)
        if not stream:
            batch_size = min(batch_size, self.num_images // parts * parts)
        if batch_size == 0:
            raise DataError(f'there are {self.num_images} images to train on, fewer than a step needs.')
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self._generator = torch.Generator()  # seeds the workers, which matters for streams alone
        common = dict(
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            pin_memory=world.device.type == 'cuda',
            worker_init_fn=leave_signals_to_parent,
            generator=self._generator,
        )
        if stream:
            self._stream, self._order = dataset, None
            if hasattr(dataset, 'set_loader_cfg'):
                dataset.set_loader_cfg(num_workers=workers)
            loader = DataLoader(dataset, batch_size=batch_size // parts, drop_last=True, **common)
        else:
            times = max(1, -(-min_steps * batch_size // self.num_images))
            self.samples = Samples(dataset, seed, times=times)
            sampler = DistributedSampler(
                self.samples, num_replicas=world.size, rank=world.rank, shuffle=True, seed=seed % 2 ** 31,
                drop_last=True)
            self._stream, self._order = None, _Order(sampler, batch_size // parts)
            loader = DataLoader(self.samples, batch_sampler=self._order, **common)
        self.loader = wrap(loader)
        self.steps = (self.num_images if stream else len(self.samples)) // batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[List[Any]]:
        """The parts of each step of an epoch, from step `start` on."""
        skip = start * self.accumulate
        self._generator.manual_seed(mix_seed(self.seed, epoch))
        if self._order is not None:
            self._order.epoch, self._order.start = epoch, skip
            batches = iter(self.loader)
        else:
            if hasattr(self._stream, 'set_epoch'):
                self._stream.set_epoch(epoch)
            batches = islice(self.loader, skip, None)
        for _ in range(start, self.steps):
            parts = list(islice(batches, self.accumulate))
            if len(parts) < self.accumulate:
                raise DataError(f'the stream ended early: {self.num_images} images were announced for an epoch.')
            yield parts

    def take_unreadable(self) -> int:
        """How many images this process could not read since this was last asked."""
        return self.samples.take_unreadable() if self.samples is not None else 0


class EvalLoader:
    """Every image of a data set once, over all processes, in the same batches for any number of them.

    All processes have as many batches, so that models that talk to each other stay in step; some repeat the last batch
    of the data set for that, after those that count. None of this holds for a stream (IterableDataset), whose reader
    alone says what each process gets: images may come twice or not at all, and processes may have more batches than
    others.

    Attributes:
        indices: Numbers of the images of this process that count, in the order in which they come; None for a stream.
        num_valid: How many these are; None for a stream, of which all count.
    """

    def __init__(
            self,
            dataset: Union[Dataset, IterableDataset],
            batch_size: int,
            world: World,
            missing: Any,
            workers: int = 0,
            collate: Optional[Callable[[List[Any]], Any]] = None,
            wrap: Callable[[DataLoader], Any] = lambda loader: loader,
            report: bool = True,
    ) -> None:
        """
        Args:
            dataset: Images and targets, by number or as a stream.
            batch_size: Images of a batch.
            world: This process.
            missing: Sample in place of one that cannot be read.
            workers: Processes that load.
            collate: Makes a batch of samples.
            wrap: Applied to the loader.
            report: Warn of each image that cannot be read, once.
        """
        common = dict(
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            pin_memory=world.device.type == 'cuda',
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # leaves the global one alone
        )
        self.samples = None
        self.indices: Optional[List[int]] = None
        self.num_valid: Optional[int] = None
        self._batch_size = batch_size
        if isinstance(dataset, IterableDataset):
            if hasattr(dataset, 'set_loader_cfg'):
                dataset.set_loader_cfg(num_workers=workers)
            loader = DataLoader(dataset, batch_size=batch_size, **common)
        else:
            self.samples = Samples(dataset, 0, missing, report=report)
            places = [(0, index) for index in range(len(dataset))]
            batches = [places[i:i + batch_size] for i in range(0, len(places), batch_size)]
            mine = batches[world.rank::world.size]
            self.indices = [index for batch in mine for _, index in batch]
            self.num_valid = len(self.indices)
            if len(mine) < -(-len(batches) // world.size):
                mine.append(batches[-1])
            loader = DataLoader(self.samples, batch_sampler=mine, **common)
        self.loader = wrap(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of all samples from those of each process, in the order of the data set where it has one."""
        if self.num_valid is None:
            return torch.cat(list(parts))
        batches = [part.split(self._batch_size) for part in parts]
        turns = zip_longest(*batches, fillvalue=parts[0][:0])
        return torch.cat([batch for turn in turns for batch in turn])
