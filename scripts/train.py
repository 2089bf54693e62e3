#!/usr/bin/env python3
"""Train or fine-tune a classifier: on the handwritten digits of scikit-learn, a folder of images, or a data set.

    python scripts/train.py --config configs/digits.yaml
    python scripts/train.py --config configs/folder.yaml --data FOLDER
    torchrun --nproc-per-node 8 scripts/train.py --config configs/imagenet/elsa_swin_tiny.yaml --data FOLDER

Stopped at any moment, the same command goes on from the last checkpoint.

FOLDER holds one sub-folder of images for each class, or two folders of those named train and val. Every value of the
recipe can be overridden by an option.
"""
import argparse
import logging
import sys
import time
from typing import List, Optional

import torch
from timm.utils import setup_default_logging

import elsa_models  # noqa: F401, registers the models
from elsa_models.training import (
    ClassificationJob,
    DataError,
    DivergedError,
    OutputError,
    RecipeError,
    add_arguments,
    load_recipe,
    run_job,
)
from elsa_models.training.world import leave_world


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', metavar='FILE', help='YAML recipe; without one, every value has its default')
    add_arguments(parser)
    overrides = vars(parser.parse_args(argv))
    setup_default_logging(logging.WARNING)
    logging.getLogger('elsa_models.training').setLevel(logging.INFO)
    start = time.monotonic()
    try:
        recipe = load_recipe(overrides.pop('config'), overrides)
        result = run_job(recipe, ClassificationJob)
    except (RecipeError, DataError, DivergedError, OutputError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f'error: {str(e).splitlines()[0]}\n'
              'amp, accumulate, grad_checkpointing and fsdp take less memory; see docs/finetune.md', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    if not result.files:  # not the main process
        return 0
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print()
    best = result.metrics
    print(f'test accuracy: {best["val_top1"]:.2f} % of {best["val_images"]} held-out images, in epoch {best["epoch"]}')
    print(f'time:          {minutes} min {seconds} s')
    print('results:')
    for file in result.files:
        print(f'  {file}')
    print('load the model with:')
    print(f"  import elsa_models, timm; timm.create_model('local-dir:{result.folder / 'model'}', pretrained=True)")
    return 0


if __name__ == '__main__':
    status = main()
    leave_world()
    sys.exit(status)
