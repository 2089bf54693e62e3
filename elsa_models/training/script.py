"""The command line of a training script: options from a recipe, a run, and errors in one line."""
import argparse
import logging
import sys
import time
from typing import List, Optional, Type

from timm.utils import setup_default_logging

from .._files import OutputError
from .config import BaseRecipe, RecipeError, add_arguments, load_recipe
from .job import Job
from .loading import DataError
from .loop import DivergedError
from .run import Result, run_job


def train_script(doc: str, recipe_kind: Type[BaseRecipe], job_kind: Type[Job], argv: Optional[List[str]]) -> int:
    """Run a training script and return its exit status.

    Args:
        doc: What --help says.
        recipe_kind: Class of the recipe.
        job_kind: What is trained.
        argv: Arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', metavar='FILE', help='YAML recipe; without one, every value has its default')
    add_arguments(parser, recipe_kind)
    overrides = vars(parser.parse_args(argv))
    setup_default_logging(logging.WARNING)
    logging.getLogger('elsa_models.training').setLevel(logging.INFO)
    start = time.monotonic()
    try:
        result = run_job(load_recipe(overrides.pop('config'), overrides, recipe_kind), job_kind)
    except (RecipeError, DataError, DivergedError, OutputError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    if result.files:  # the main process
        _report(result, time.monotonic() - start)
    return 0


def _report(result: Result, seconds: float) -> None:
    print()
    for name, value in result.metrics.items():
        if name.startswith('val_'):
            print(f'{name[4:]}: {value:.2f}')
    print(f'best epoch: {result.metrics["epoch"]}')
    print(f'time: {round(seconds) // 60} min {round(seconds) % 60} s')
    print('results:')
    for file in result.files:
        print(f'  {file}')
