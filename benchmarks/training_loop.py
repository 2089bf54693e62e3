#!/usr/bin/env python3
"""What the training loop costs over the bare forward, backward and step.

    python benchmarks/training_loop.py

Both take the same batch from memory, the same model and optimiser, step by step in turns; what differs is seeding,
precision handling, schedule, logging and the bar of `elsa_models.training.Trainer`. Prints the median step of each, and
median and quartiles of the ratio of neighbouring steps.
"""
import argparse
import statistics
import tempfile
import time

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

import elsa_models  # noqa: F401, registers the models
from elsa_models.training import BaseRecipe, Job, Trainer, World


class _Loader:
    """Yields a batch, and has `bare` take a step with it before each that the loop takes."""

    def __init__(self, batch, steps, bare):
        self.batch, self.steps, self.batch_size = batch, steps, len(batch[0])
        self.bare = bare
        self.times = []  # of a bare step and one of the loop, seconds

    def epoch(self, epoch, start=0):
        for _ in range(start, self.steps):
            first = time.perf_counter()
            self.bare(*self.batch)
            second = time.perf_counter()
            yield [self.batch]
            self.times.append((second - first, time.perf_counter() - second))

    def take_unreadable(self):
        return 0


class _Job(Job):
    metric = 'value'

    def __init__(self, recipe, world, loader):
        self.task = ClassificationTask(_model(recipe), device=world.device, verbose=False)
        self.train_loader = loader

    def evaluate(self, model):
        return dict(value=0.)

    def whole_model(self):
        raise NotImplementedError

    def finish(self, model, folder, history):
        raise NotImplementedError


def _model(recipe):
    torch.manual_seed(0)
    return timm.create_model(recipe.model, num_classes=10, **recipe.model_args).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_elsa_swin')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--steps', type=int, default=200)
    args = parser.parse_args()
    recipe = BaseRecipe(model=args.model, model_args=dict(img_size=args.img_size), epochs=1, device='cpu')
    model = _model(recipe)
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    criterion = torch.nn.CrossEntropyLoss()

    def bare(images, targets):
        criterion(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    batch = torch.randn(args.batch_size, 3, args.img_size, args.img_size), torch.randint(10, (args.batch_size,))
    loader = _Loader(batch, args.steps, bare)
    world = World(torch.device('cpu'))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(recipe, _Job(recipe, world, loader), world, folder).run()
    times = loader.times[5:]  # the first ones warm up
    low, middle, high = statistics.quantiles((loop / bare for bare, loop in times), n=4)
    bare_time, loop_time = (1e3 * statistics.median(column) for column in zip(*times))
    print(f'bare {bare_time:.2f} ms, loop {loop_time:.2f} ms a step')
    print(f'ratio {middle:.3f} ({low:.3f} to {high:.3f})')


if __name__ == '__main__':
    main()
