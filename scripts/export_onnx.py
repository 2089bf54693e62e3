#!/usr/bin/env python3
"""Export a model to ONNX, checked in ONNX Runtime.

    python scripts/export_onnx.py elsa_swin_tiny model.onnx --pretrained
    python scripts/export_onnx.py elsa_swin_tiny model.onnx --checkpoint elsa_swin_tiny.pth.tar
    python scripts/export_onnx.py output/NAME model.onnx --preprocess --precision int8 --images FOLDER

MODEL is a name of timm, or a folder that scripts/train.py or timm has saved.
"""
import argparse
import logging
import sys
import time
from pathlib import Path
from typing import List, Optional

import timm
from timm.utils import setup_default_logging

import elsa_models
from elsa_models.export import MIN_OPSET, PRECISIONS


def create(args: argparse.Namespace):
    """Build the model that the options name."""
    name, kwargs = args.model, {}
    for folder in (Path(args.model), Path(args.model) / 'model'):
        if (folder / 'config.json').is_file():
            name, args.pretrained = f'local-dir:{folder}', True
    if name == args.model and (Path(args.model).is_dir() or '/' in args.model and ':' not in args.model):
        raise ValueError(f'MODEL: got {args.model!r}, which holds no config.json, nor does its sub-folder model.')
    if name == args.model and ':' not in name and not timm.is_model(name):
        known = ', '.join(timm.list_models(['elsa_*', 'test_elsa_*']))
        raise ValueError(f'MODEL: got {args.model!r}, must be a folder or a name of timm, such as {known}.')
    if args.img_size is not None:
        kwargs['img_size'] = tuple(args.img_size) if len(args.img_size) == 2 else args.img_size[0]
    for option in ('num_classes', 'in_chans'):
        if getattr(args, option) is not None:
            kwargs[option] = getattr(args, option)
    if args.dynamic_size:
        kwargs['dynamic_img_size'] = True
    if args.features_only:
        kwargs['features_only'] = True
    if args.checkpoint is None:
        try:
            return timm.create_model(name, pretrained=args.pretrained, **kwargs)
        except elsa_models.WeightsError as e:
            raise ValueError(f'{e}\nOr, of the options: --checkpoint FILE for weights in a file.') from e
    if not args.checkpoint.is_file():
        raise ValueError(f'--checkpoint: got {str(args.checkpoint)!r}, no such file.')
    overlay = dict(file=str(args.checkpoint))
    if args.num_classes is not None:
        overlay.update(num_classes=args.num_classes)  # those of the file, or timm leaves its classifier out
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except elsa_models.WeightsError as e:
        raise ValueError(f'--checkpoint: {str(args.checkpoint)!r} cannot be used. {e}') from e


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('model', metavar='MODEL')
    parser.add_argument('path', metavar='FILE', type=Path, help='the .onnx file to write')
    parser.add_argument('--pretrained', action='store_true', help='with its weights; a folder always comes with them')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help='weights to load, from any training')
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--in-chans', type=int)
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='side, or height and width')
    parser.add_argument('--dynamic-size', action='store_true', help='let height and width vary')
    parser.add_argument('--fixed-batch', action='store_true', help='batch size 1 only')
    parser.add_argument('--features-only', action='store_true', help='the feature pyramid instead of logits')
    parser.add_argument('--preprocess', action='store_true', help='take RGB bytes (B, H, W, 3), normalise in the graph')
    parser.add_argument('--precision', choices=PRECISIONS, default='float32')
    parser.add_argument('--images', type=Path, metavar='FOLDER', help='images to check with and to calibrate int8 on')
    parser.add_argument('--opset', type=int, default=MIN_OPSET)
    args = parser.parse_args(argv)
    if args.img_size is not None and len(args.img_size) > 2:
        parser.error('--img-size: must be one or two numbers')
    setup_default_logging(logging.WARNING)
    start = time.monotonic()
    try:
        path = elsa_models.export_onnx(
            create(args),
            args.path,
            dynamic_batch=not args.fixed_batch,
            dynamic_size=args.dynamic_size,
            preprocess=args.preprocess,
            precision=args.precision,
            images=args.images,
            opset=args.opset,
        )
    except (ValueError, OSError, ImportError, RuntimeError, elsa_models.WeightsError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f'wrote {path}: {path.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s; ONNX Runtime agrees')
    return 0


if __name__ == '__main__':
    sys.exit(main())
