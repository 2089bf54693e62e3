#!/usr/bin/env python3
"""What the training loop costs over the bare forward, backward and step.

    python benchmarks/training_loop.py

Both take the same batches from memory, the same model and optimiser, in turns; what differs is seeding, precision
handling, schedule, logging and the bar of `elsa_models.training.Trainer`. Prints the median step of each, and median
and the quartiles of their ratio.
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
    def __init__(self, batch, steps):
        self.batch, self.steps, self.batch_size = batch, steps, len(batch[0])

    def epoch(self, epoch, start=0):
        for _ in range(start, self.steps):
            yield [self.batch]

    def take_unreadable(self):
        return 0


class _Job(Job):
    metric = 'value'

    def __init__(self, recipe, world, batch, steps):
        self.task = ClassificationTask(_model(recipe), device=world.device, verbose=False)
        self.train_loader = _Loader(batch, steps)

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
    parser.add_argument('--steps', type=int, default=10, help='steps of each turn')
    parser.add_argument('--turns', type=int, default=12)
    args = parser.parse_args()
    recipe = BaseRecipe(
        model=args.model, model_args=dict(img_size=args.img_size), epochs=args.turns + 1, device='cpu',
        log_steps=args.steps)
    world = World(torch.device('cpu'))
    batch = torch.randn(args.batch_size, 3, args.img_size, args.img_size), torch.randint(10, (args.batch_size,))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, _Job(recipe, world, batch, args.steps), world, folder)
        loop_times, bare_times = [], []
        model = _model(recipe)
        optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
        criterion = torch.nn.CrossEntropyLoss()
        train = trainer._train_epoch

        def bare():
            start = time.perf_counter()
            for _ in range(args.steps):
                loss = criterion(model(batch[0]), batch[1])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            bare_times.append((time.perf_counter() - start) / args.steps)

        def timed():
            bare()
            start = time.perf_counter()
            row = train()
            loop_times.append((time.perf_counter() - start) / args.steps)
            return row

        trainer._train_epoch = timed
        trainer.run()
    ratios = sorted(a / b for a, b in zip(loop_times[1:], bare_times[1:]))  # the first turn warms up
    low, middle, high = statistics.quantiles(ratios, n=4)
    bare_time, loop_time = (1e3 * statistics.median(times) for times in (bare_times, loop_times))
    print(f'bare {bare_time:.2f} ms, loop {loop_time:.2f} ms a step')
    print(f'ratio {middle:.3f} ({low:.3f} to {high:.3f})')


if __name__ == '__main__':
    main()
