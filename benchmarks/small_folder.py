#!/usr/bin/env python3
"""What `elsa train --config folder` makes of a folder of few pictures, and what colour histograms make of it.

    pip install '.[train]' scikit-learn scikit-image
    python benchmarks/small_folder.py --output FOLDER

Twelve classes are drawn from twelve photographs that scikit-image brings: squares of 64 to 128 pixels, those to train
on from the left 70 % of a photograph, those to test on from the rest. Each setting of the recipe is trained from
random weights with each seed; the accuracy is that of the last epoch, which nothing has chosen. Rows are appended to
results/small_folder.csv.
"""
import argparse
import csv
import datetime
import importlib.util
import logging
import random
import time
from pathlib import Path

import harness
import numpy as np
import timm
import torch
from PIL import Image

from elsa_models.training import ClassificationJob, load_recipe, run_job

PHOTOGRAPHS = (
    'astronaut.png', 'brick.png', 'camera.png', 'chelsea.png', 'coffee.png', 'coins.png', 'grass.png', 'gravel.png',
    'hubble_deep_field.jpg', 'ihc.png', 'motorcycle_left.png', 'rocket.jpg')
SETTINGS = {
    'epochs alone': dict(min_steps=0),
    'recipe': {},
    'recipe, more augmentation': dict(auto_augment='rand-m7-mstd0.5-inc1', re_prob=0.1),
}
HISTOGRAMS = 'colour histograms, logistic regression'


def draw_folder(folder: Path, train: int, val: int) -> Path:
    """Draw so many pictures of each class as `folder`/{train,val}/CLASS; the same ones each time."""
    source = Path(importlib.util.find_spec('skimage').origin).parent / 'data'
    generator = random.Random(0)
    for name in PHOTOGRAPHS:
        photograph = Image.open(source / name).convert('RGB')
        width, height = photograph.size
        edge = int(0.7 * width)
        for part, left, right, number in (('train', 0, edge, train), ('val', edge, width, val)):
            target = folder / part / Path(name).stem
            target.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                side = generator.randint(64, min(128, right - left, height))
                x, y = generator.randint(left, right - side), generator.randint(0, height - side)
                photograph.crop((x, y, x + side, y + side)).save(target / f'{i}.png')
    return folder


def histogram_accuracy(folder: Path) -> float:
    """Percent that a logistic regression on histograms of 4 x 4 x 4 colours recognises."""
    from sklearn.linear_model import LogisticRegression

    def load(part):
        files = sorted((folder / part).glob('*/*.png'))
        pixels = [np.asarray(Image.open(file)).reshape(-1, 3) for file in files]
        histograms = [np.histogramdd(x, bins=4, range=[(0, 256)] * 3)[0].ravel() / len(x) for x in pixels]
        return np.array(histograms), [file.parent.name for file in files]

    return 100. * LogisticRegression(C=100., max_iter=5000).fit(*load('train')).score(*load('val'))


def train(folder: Path, output: Path, setting: str, seed: int) -> dict:
    """Train a setting of the recipe, and return what the last epoch has come to."""
    values = dict(
        data=str(folder), seed=seed, device='cpu', onnx=False, figures=False, output=str(output),
        name=f'{"-".join(setting.replace(",", "").split())}-{seed}', **SETTINGS[setting])
    start = time.monotonic()
    result = run_job(load_recipe('folder', values), ClassificationJob)
    minutes = (time.monotonic() - start) / 60.
    with open(result.folder / 'log.csv', newline='') as file:
        last = list(csv.DictReader(file))[-1]
    return dict(steps=last['step'], top1=f'{float(last["val_top1"]):.2f}', minutes=f'{minutes:.1f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER', help='for the pictures and the runs')
    parser.add_argument('--settings', nargs='+', choices=[HISTOGRAMS, *SETTINGS], default=[HISTOGRAMS, *SETTINGS])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--images', type=int, nargs=2, metavar=('TRAIN', 'VAL'), default=(16, 20), help='of each class')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(args.threads)
    folder = draw_folder(args.output / 'photographs', *args.images)
    common = dict(
        date=datetime.date.today().isoformat(), commit=harness.commit(), torch=torch.__version__, timm=timm.__version__,
        classes=len(PHOTOGRAPHS), train=len(PHOTOGRAPHS) * args.images[0], val=len(PHOTOGRAPHS) * args.images[1])
    for setting in args.settings:
        for seed in args.seeds if setting in SETTINGS else ['']:
            if setting in SETTINGS:
                found = train(folder, args.output, setting, seed)
            else:
                found = dict(top1=f'{histogram_accuracy(folder):.2f}')
            row = dict(**common, setting=setting, seed=seed, **found)
            harness.append(harness.RESULTS / 'small_folder.csv', row)
            print(*row.values(), flush=True)


if __name__ == '__main__':
    main()
