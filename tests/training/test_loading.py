import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from elsa_models.training import DataError, EvalLoader, RecipeError, TrainLoader, World
from elsa_models.training.loading import Samples

CPU = torch.device('cpu')
CPU_WORLD = World(CPU)


class Numbers(Dataset):
    """Sample i is (i, something random); those in `broken` cannot be read."""

    def __init__(self, number, broken=()):
        self.number, self.broken = number, broken

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f'image {index}: broken')
        return index, (random.random(), np.random.rand(), torch.rand(()).item())


def _epoch(loader, epoch, start=0):
    """(i, random) of each step, sorted within it."""
    steps = []
    for parts in loader.epoch(epoch, start):
        steps.append(sorted((i, *map(float, r)) for part in parts for i, *r in zip(part[0].tolist(), *part[1])))
    return steps


def _global_epoch(size, epoch, start=0, **kwargs):
    """The same of all processes."""
    loaders = [TrainLoader(Numbers(26), 8, World(CPU, rank, size), 5, **kwargs) for rank in range(size)]
    return [sorted(sum(step, [])) for step in zip(*(_epoch(loader, epoch, start) for loader in loaders))]


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    expected = _global_epoch(1, 3)
    assert len(expected) == 3 and all(len(step) == 8 for step in expected)
    assert len({i for step in expected for i, *_ in step}) == 24
    assert _global_epoch(2, 3) == expected
    assert _global_epoch(1, 3, accumulate=4) == expected
    assert _global_epoch(2, 3, accumulate=2, workers=2) == expected
    assert _global_epoch(1, 3, start=2) == expected[2:]
    random.seed(1)
    torch.manual_seed(1)
    assert _global_epoch(1, 3) == expected
    other = _global_epoch(1, 4)
    assert other != expected and {i for i, *_ in other[0]} != {i for i, *_ in expected[0]}


def test_each_seed_has_its_own_order_and_augmentation():
    found = {seed: _epoch(TrainLoader(Numbers(26), 8, CPU_WORLD, seed), 0) for seed in (5, 6, 7)}
    orders = [[[i for i, *_ in step] for step in steps] for steps in found.values()]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    numbers = [r for steps in found.values() for step in steps for _, r, *_ in step]
    assert len(set(numbers)) == len(numbers) == 3 * 24
    # no two numbers of seed, epoch and index stand for each other, as they would in their sum
    drawn = [Samples(Numbers(3), seed)[epoch, index][1] for seed in (5, 6) for epoch in (0, 1) for index in range(3)]
    assert len(set(drawn)) == len(drawn)


def test_workers_that_stay_follow_the_epochs():
    loader = TrainLoader(Numbers(10), 4, World(CPU), 0, workers=2)
    fresh = [_epoch(TrainLoader(Numbers(10), 4, World(CPU), 0), epoch) for epoch in range(3)]
    assert [_epoch(loader, epoch) for epoch in range(3)] == fresh
    assert _epoch(loader, 1, 1) == fresh[1][1:]


def test_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(RecipeError, match='batch_size: got 10, must be a multiple of 4: 2 processes of 2'):
        TrainLoader(Numbers(26), 10, World(CPU, 0, 2), 0, accumulate=2)
    with pytest.raises(DataError, match='there are 3 images'):
        TrainLoader(Numbers(3), 8, World(CPU, 0, 2), 0, accumulate=2)
    assert TrainLoader(Numbers(7), 8, World(CPU, 0, 2), 0).batch_size == 6  # fewer images than a batch


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_replaced_and_counted(workers):
    loader = TrainLoader(Numbers(8, broken=(2, 3, 7)), 8, World(CPU), 0, workers=workers)
    taken = [i for i, *_ in _epoch(loader, 0)[0]]
    assert taken == [0, 0, 1, 4, 4, 4, 5, 6]
    assert loader.take_unreadable() == 4 and loader.take_unreadable() == 0  # 2 and then 3, 3, 7


def test_a_disk_of_unreadable_images_is_an_error():
    samples = Samples(Numbers(20, broken=range(5, 15)), 0)
    assert samples[0, 4][0] == 4 and samples[0, 6][0] == 15
    with pytest.raises(DataError, match='10 images in a row cannot be read, of them the last: image 14'):
        samples[0, 5]


@pytest.mark.parametrize('size', [1, 2, 3])
def test_evaluation_sees_every_image_once(size):
    missing = (-1, (0., 0., 0.))
    loaders = [EvalLoader(Numbers(8, broken=(2,)), 2, World(CPU, rank, size), missing) for rank in range(size)]
    assert len({len(loader) for loader in loaders}) == 1
    parts = [torch.cat([batch[0] for batch in loader])[:loader.num_valid] for loader in loaders]
    for loader, part in zip(loaders, parts, strict=True):
        assert [-1 if i == 2 else i for i in loader.indices] == part.tolist()
    assert loaders[0].merge(parts).tolist() == [0, 1, -1, 3, 4, 5, 6, 7]


class Stream(IterableDataset):
    def __len__(self):
        return 9

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in range(self.end if hasattr(self, 'end') else 9):
            yield 100 * self.epoch + i, (0., 0., 0.)


def test_stream_goes_on_where_it_was():
    loader = TrainLoader(Stream(), 4, World(CPU), 0, accumulate=2)
    assert [[i for i, *_ in step] for step in _epoch(loader, 2)] == [[200, 201, 202, 203], [204, 205, 206, 207]]
    assert [[i for i, *_ in step] for step in _epoch(loader, 1, 1)] == [[104, 105, 106, 107]]


class Drawn(Stream):
    """A stream that draws at random, as augmentation does."""

    def __iter__(self):
        for _ in range(9):
            yield int(torch.randint(2 ** 31, ())), (0., 0., 0.)


def test_workers_draw_by_seed_and_epoch():
    def draw(seed, epoch):
        return next(TrainLoader(Drawn(), 2, CPU_WORLD, seed, workers=1).epoch(epoch))[0][0].tolist()

    drawn = {(seed, epoch): draw(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({x for pair in drawn.values() for x in pair}) == 8
    assert draw(1, 0) == drawn[1, 0]


def test_stream_that_ends_early_is_an_error():
    stream = Stream()
    stream.end = 5
    with pytest.raises(DataError, match='the stream ended early: 9 images were announced'):
        _epoch(TrainLoader(stream, 4, World(CPU), 0), 0)


def test_few_images_are_passed_over_as_often_as_the_steps_take():
    loader = TrainLoader(Numbers(5), 4, CPU_WORLD, 0, min_steps=7)
    assert loader.steps >= 7 and loader.num_images == 5
    steps = _epoch(loader, 0)
    seen = [row[0] for step in steps for row in step]
    assert all(abs(seen.count(i) - len(seen) / 5) <= 3 for i in range(5))
    assert len({row for step in steps for row in step}) == len(seen)  # each is augmented in its own way
    assert _epoch(loader, 0, 3) == steps[3:]
    assert TrainLoader(Numbers(40), 4, CPU_WORLD, 0, min_steps=7).steps == 10


def test_what_cannot_be_read_is_said_once(caplog):
    samples = Samples(Numbers(4, broken=(2,)), 0)
    for epoch in range(3):
        assert samples[epoch, 2][0] == 3
    assert caplog.text.count('image 2: broken') == 1 and samples.take_unreadable() == 3
