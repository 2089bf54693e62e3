"""What commands that train share: from options to a run and its report; errors in one line."""
import argparse
import logging
import sys
import time
from typing import Callable, List, Optional

import torch
from timm.utils import setup_default_logging

from .._files import OutputError
from .._images import DataError
from ..training.config import RecipeError, add_arguments, load_recipe
from ..training.jobs import load_job
from ..training.loop import DivergedError
from ..training.run import Result, run_job
from ..training.signals import Stopped, stopping_in_order
from ..training.world import leave_world


def report_metrics(result: Result) -> None:
    """Print the metrics of the best epoch."""
    metrics = {name[4:]: value for name, value in result.metrics.items() if name.startswith('val_')}
    print(f'held out: {result.job.show(metrics)}')
    print(f'best epoch: {result.metrics["epoch"]}, chosen by the same images')


def train_command(
        doc: str,
        job: str,
        argv: Optional[List[str]],
        report: Callable[[Result], None] = report_metrics,
) -> int:
    """Run a command that trains and return its exit status.

    Args:
        doc: What --help says.
        job: What is trained, see `load_job`.
        argv: Arguments, those of the process if None.
        report: Prints how good the result is.
    """
    try:
        kind = load_job(job)
    except ImportError as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', metavar='NAME', help='recipe of this package or YAML file; without one, every value'
                        ' has its default')
    add_arguments(parser, kind.recipe_kind)
    overrides = vars(parser.parse_args(argv))
    setup_default_logging(logging.WARNING)
    logging.getLogger('elsa_models.training').setLevel(logging.INFO)
    start = time.monotonic()
    status = 0
    try:
        with stopping_in_order():
            result = run_job(load_recipe(overrides.pop('config'), overrides, kind.recipe_kind), kind)
    except (RecipeError, DataError, DivergedError, OutputError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        status = 2
    except torch.OutOfMemoryError as e:
        print(f'error: {str(e).splitlines()[0]}\n'
              'amp, accumulate, grad_checkpointing and, for classifiers, fsdp take less memory; see docs/finetune.md',
              file=sys.stderr)
        status = 2
    except KeyboardInterrupt as e:
        status = e.status if isinstance(e, Stopped) else 130
        print('stopped; the same command goes on from the last checkpoint', file=sys.stderr)
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
