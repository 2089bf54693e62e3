"""Measure a classifier: loss, top-1 and top-5 accuracy, images per second.

    elsa validate --model output/digits
    elsa validate --model output/digits/model.onnx
    elsa validate --model elsa_swin_tiny --data IMAGENET

A model of a run is measured on the run's data by default. Of a folder without parts train and val the same images are
held out as in training; --part all takes every image.
"""
import argparse
import json
import logging
import sys
from typing import List, Optional

from timm.utils import setup_default_logging

from .._files import write_atomically
from ..training import Validation, add_arguments, load_recipe
from ..training.validate import validate
from ..training.world import join_world, leave_world


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    try:
        return _main(argv)
    finally:
        leave_world()


def _main(argv: Optional[List[str]]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', metavar='FILE', help='YAML file of these values')
    add_arguments(parser, Validation)
    overrides = vars(parser.parse_args(argv))
    setup_default_logging(logging.WARNING)
    try:
        values = load_recipe(overrides.pop('config'), overrides, kind=Validation)
        metrics = validate(values)
        if not join_world(values.device).is_main:
            return 0
        if values.output is not None:
            write_atomically(json.dumps(dict(model=values.model, onnx=values.onnx, **metrics), indent=2), values.output)
    except (ValueError, OSError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f'images:   {metrics["images"]}' + (
        f' ({metrics["unreadable"]} more cannot be read)' if metrics['unreadable'] else ''))
    print(f'top-1:    {metrics["top1"]:.3f} %')
    print(f'top-5:    {metrics["top5"]:.3f} %')
    print(f'loss:     {metrics["loss"]:.5f}')
    print(f'images/s: {metrics["images_per_second"]:.1f}')
    return 0
