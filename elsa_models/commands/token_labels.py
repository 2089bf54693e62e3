"""Make label maps for token labelling: what a teacher sees in each place of the images to train on.

    elsa token-labels --data IMAGENET --teacher nfnet_f1.dm_in1k --size 14 --output label-maps

The teacher is any classifier of timm, with the classes of the data. Train with --token-labels label-maps.
"""
import argparse
import logging
import sys
from typing import List, Optional

from timm.utils import setup_default_logging

from ..inference import find_device, load_classifier
from ..models._naming import HELP
from ..training import ImageValues, LabelledImages, RecipeError, load_splits
from ..training.token_labels import make_label_maps


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--data', required=True, help="folder with train and val, or of classes; 'digits'")
    parser.add_argument('--teacher', required=True, help=HELP)
    parser.add_argument('--checkpoint', metavar='FILE', help="take the teacher's weights in this file")
    parser.add_argument('--output', required=True, metavar='FOLDER', help='folder of the label maps')
    parser.add_argument('--size', type=int, metavar='N', help="side of the maps; the teacher's own if not given")
    parser.add_argument('--top-k', type=int, default=5, metavar='N', help='classes for each place (%(default)s)')
    parser.add_argument('--batch-size', type=int, default=64, metavar='N', help='images at once (%(default)s)')
    parser.add_argument('--workers', type=int, default=0, metavar='N', help='processes that load (%(default)s)')
    parser.add_argument('--device', default='auto', help='cpu, cuda, ... (%(default)s)')
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    try:
        splits = load_splits(ImageValues(data=args.data))
        if not isinstance(splits.train, LabelledImages):
            raise RecipeError(f"data: got {args.data!r}, must be a folder or 'digits'.")
        images = splits.part('all') if splits.one_source else splits.train
        device = find_device(args.device)
        classifier = load_classifier(args.teacher, device, checkpoint=args.checkpoint)
        if classifier.model is None:
            raise RecipeError(f'teacher: got {args.teacher!r}, an ONNX file, must be a model of timm.')
        if classifier.num_classes != len(splits.class_names):
            raise RecipeError(
                f'teacher: has {classifier.num_classes} classes, must have the {len(splits.class_names)} of the data.')
        size = None if args.size is None else (args.size, args.size)
        make_label_maps(
            classifier.model, args.teacher, images, args.output, size, args.top_k, args.batch_size, args.workers)
    except (ValueError, OSError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f'label maps of {len(images)} images: {args.output}')
    return 0
