"""The command line of a training script: options from a recipe, a run, and errors in one line."""
import argparse
import logging
import sys
import time
from typing import Callable, List, Optional, Type

import torch
from timm.utils import setup_default_logging

from .._files import OutputError
from .config import BaseRecipe, RecipeError, add_arguments, load_recipe
from .job import Job
from .loading import DataError
from .loop import DivergedError
from .run import Result, run_job
from .world import leave_world


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
              'amp, accumulate, grad_checkpointing and fsdp take less memory; see docs/finetune.md', file=sys.stderr)
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
