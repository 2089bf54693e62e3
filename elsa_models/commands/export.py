"""Export a model to ONNX, checked in ONNX Runtime.

    elsa export elsa_swin_tiny model.onnx --pretrained
    elsa export elsa_swin_tiny model.onnx --checkpoint elsa_swin_tiny.pth.tar
    elsa export output/NAME model.onnx --preprocess --precision int8 --images FOLDER

A path as MODEL, such as a run's folder, comes with its weights.
"""
import argparse
import logging
import sys
import time
from pathlib import Path
from typing import List, Optional

from timm.utils import setup_default_logging

from ..export import MIN_OPSET, PRECISIONS, export_onnx
from ..hub import WeightsError
from ..models._naming import HELP, create_named


def create(args: argparse.Namespace):
    """Build the model that the options name."""
    kwargs = {}
    if args.img_size is not None:
        kwargs['img_size'] = tuple(args.img_size) if len(args.img_size) == 2 else args.img_size[0]
    if args.in_chans is not None:
        kwargs['in_chans'] = args.in_chans
    if args.dynamic_size:
        kwargs['dynamic_img_size'] = True
    if args.features_only:
        kwargs['features_only'] = True
    try:
        return create_named(
            args.model, args.pretrained, args.checkpoint, args.num_classes, keep_classifier=True, **kwargs)
    except WeightsError as e:
        if args.checkpoint is not None:
            raise ValueError(f'--checkpoint: {str(args.checkpoint)!r} cannot be used. {e}') from e
        raise ValueError(f'{e}\nOr, of the options: --checkpoint FILE for weights in a file.') from e


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('model', metavar='MODEL', help=HELP)
    parser.add_argument('path', metavar='FILE', type=Path, help='the .onnx file to write')
    parser.add_argument('--pretrained', action='store_true', help='with its weights; a path always comes with them')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights to load, from any training')
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--in-chans', type=int)
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='side, or height and width')
    parser.add_argument('--dynamic-size', action='store_true', help='let height and width vary')
    parser.add_argument('--fixed-batch', action='store_true', help='batch size 1 only')
    parser.add_argument('--features-only', action='store_true', help='the feature pyramid instead of logits')
    parser.add_argument('--preprocess', action='store_true', help='take RGB bytes (B, H, W, 3), normalise in the graph')
    parser.add_argument('--resize-from', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='with --preprocess: take pictures of this size, resize and crop them in the graph')
    parser.add_argument('--precision', choices=PRECISIONS, default='float32')
    parser.add_argument('--images', type=Path, metavar='FOLDER', help='images to check with and to calibrate int8 on')
    parser.add_argument('--opset', type=int, default=MIN_OPSET)
    args = parser.parse_args(argv)
    if args.img_size is not None and len(args.img_size) > 2:
        parser.error('--img-size: must be one or two numbers')
    setup_default_logging(logging.WARNING)
    start = time.monotonic()
    try:
        path = export_onnx(
            create(args),
            args.path,
            dynamic_batch=not args.fixed_batch,
            dynamic_size=args.dynamic_size,
            preprocess=args.preprocess,
            precision=args.precision,
            images=args.images,
            opset=args.opset,
            resize_from=tuple(args.resize_from) if args.resize_from else None,
        )
    except (ValueError, OSError, ImportError, RuntimeError, WeightsError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f'wrote {path}: {path.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s; ONNX Runtime agrees')
    return 0
