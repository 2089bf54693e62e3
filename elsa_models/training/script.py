"""The command lines of scripts that train, and of those that predict maps or objects; errors in one line."""
import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple, Type

import torch
from PIL import Image
from timm.utils import setup_default_logging

from .._extras import require
from .._files import OutputError
from ..models._checkpoint import WeightsError
from .config import BaseRecipe, RecipeError, add_arguments, load_recipe
from .data import decode
from .inference import find_images, unique_names
from .job import Job
from .loading import DataError
from .loop import DivergedError
from .run import Result, run_job
from .world import join_world, leave_world


def report_metrics(result: Result) -> None:
    """Print the metrics of the best epoch."""
    for name, value in result.metrics.items():
        if name.startswith('val_'):
            print(f'{name[4:]}: {value:.2f}')
    print(f'best epoch: {result.metrics["epoch"]}')


def train_script(
        doc: str,
        recipe_kind: Type[BaseRecipe],
        job_kind: Type[Job],
        argv: Optional[List[str]],
        report: Callable[[Result], None] = report_metrics,
) -> int:
    """Run a training script and return its exit status.

    Args:
        doc: What --help says.
        recipe_kind: Class of the recipe.
        job_kind: What is trained.
        argv: Arguments, those of the process if None.
        report: Prints how good the result is.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', metavar='FILE', help='YAML recipe; without one, every value has its default')
    add_arguments(parser, recipe_kind)
    overrides = vars(parser.parse_args(argv))
    setup_default_logging(logging.WARNING)
    logging.getLogger('elsa_models.training').setLevel(logging.INFO)
    start = time.monotonic()
    status = 0
    try:
        result = run_job(load_recipe(overrides.pop('config'), overrides, recipe_kind), job_kind)
    except (RecipeError, DataError, DivergedError, OutputError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        status = 2
    except torch.OutOfMemoryError as e:
        print(f'error: {str(e).splitlines()[0]}\n'
              'amp, accumulate, grad_checkpointing and, for classifiers, fsdp take less memory; see docs/finetune.md',
              file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print('interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
        status = 130
    else:
        if result.files:  # the main process
            minutes, seconds = divmod(round(time.monotonic() - start), 60)
            print()
            report(result)
            print(f'time: {minutes} min {seconds} s')
            print('results:')
            for file in result.files:
                print(f'  {file}')
    leave_world()
    return status


class Picture(NamedTuple):
    """An image to predict from."""
    file: str
    name: str  # of what is written for it, without an ending; unique
    image: Image.Image  # RGB


Predict = Callable[[argparse.Namespace, torch.device, Iterator[Picture]], None]


def predict_script(
        doc: str,
        extra: Tuple[str, str],
        add_options: Callable[[argparse.ArgumentParser], None],
        predict: Predict,
        argv: Optional[List[str]],
) -> int:
    """Run a script that predicts from images, and return its exit status: 1 if some cannot be read.

    Args:
        doc: Of the script.
        extra: A package that it needs, and the extra that brings it.
        add_options: Adds the script's own options to `inputs`, `model`, `output` and `device`.
        predict: Takes the arguments, a device, and the images, one by one; with the first the folder `output`
            exists.
        argv: Arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('inputs', nargs='+', metavar='IMAGES', help='image files, folders or patterns')
    parser.add_argument('--model', required=True, metavar='FOLDER', help='the folder model of a run')
    parser.add_argument('--output', required=True, type=Path, metavar='FOLDER', help='folder for what is written')
    parser.add_argument('--device', default='auto', help='cpu, cuda, ... (%(default)s)')
    add_options(parser)
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    status = 0

    def pictures(files: List[str]) -> Iterator[Picture]:
        nonlocal status
        args.output.mkdir(parents=True, exist_ok=True)  # by now the model is loaded
        for file, name in zip(files, unique_names(files), strict=True):
            try:
                image = decode(Path(file), 'RGB', file)
            except DataError as e:
                print(e, file=sys.stderr)
                status = 1
                continue
            yield Picture(file, name, image)

    try:
        require(*extra)
        device = join_world(args.device).device
        files = find_images(args.inputs)
        predict(args, device, pictures(files))
    except (RecipeError, DataError, WeightsError, ValueError, OSError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return status
