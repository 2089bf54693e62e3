"""Classify images: files, folders or patterns.

    elsa predict holiday.jpg --model output/pictures
    elsa predict shots/ 'more/**/*.png' --model output/pictures --output result

Prints the likeliest classes of each image. With --output they are kept as predictions.csv or predictions.json, with a
contact sheet, contact.png, and, for models with local attention, attention.png: where it is sharp and where it spreads.
"""
import argparse
import json
import logging
import sys
from pathlib import Path
from typing import List, Optional

import torch
from timm.utils import setup_default_logging

from .._files import write_atomically
from .._images import draw, printable
from ..inference import Answer, classify, figures, find_device, find_images, load_classifier
from ..inference.text import to_csv
from ..inspect import has_local_attention
from ..models._naming import HELP


def _as_csv(answers: List[Answer], top_k: int) -> str:
    rows = [['file', *(f'{kind}{i + 1}' for i in range(top_k) for kind in ('label', 'probability'))]]
    for answer in answers:
        pairs = zip(answer.labels, answer.probabilities, strict=True)
        rows.append([answer.file, *(x for label, p in pairs for x in (label, f'{p:.6f}'))])
    return to_csv(rows)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('inputs', nargs='+', metavar='IMAGES', help='image files, folders or patterns')
    parser.add_argument('--model', required=True, help=f'{HELP}; or an ONNX file')
    parser.add_argument('--checkpoint', metavar='FILE', help='take the weights in this file')
    parser.add_argument('--onnx', metavar='FILE', help='compute with this ONNX file')
    parser.add_argument('--num-classes', type=int, metavar='N', help="number of classes, where not the model's own")
    parser.add_argument('--top-k', type=int, default=5, metavar='N', help='classes for each image (%(default)s)')
    parser.add_argument('--batch-size', type=int, default=16, metavar='N', help='images at once (%(default)s)')
    parser.add_argument('--workers', type=int, default=0, metavar='N', help='processes that load (%(default)s)')
    parser.add_argument('--device', default='auto', help='cpu, cuda, ... (%(default)s)')
    parser.add_argument('--output', metavar='FOLDER', help='folder for a table and pictures')
    parser.add_argument('--format', choices=('csv', 'json'), default='csv', help='of the table (%(default)s)')
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    for name in ('top_k', 'batch_size'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")}: got {getattr(args, name)}, must be at least 1')
    try:
        device = find_device(args.device)
        files = find_images(args.inputs)
        classifier = load_classifier(
            args.model, device, checkpoint=args.checkpoint, onnx=args.onnx, num_classes=args.num_classes)
        answers = classify(classifier, files, device, args.top_k, args.batch_size, args.workers)
        for answer in answers:
            classes = ', '.join(
                f'{label} {p:.1%}' for label, p in zip(answer.labels, answer.probabilities, strict=True))
            print(f'{printable(answer.file)}: {printable(classes) or "cannot be read"}')
        if args.output is not None:
            folder = Path(args.output)
            folder.mkdir(parents=True, exist_ok=True)
            if args.format == 'json':
                table = json.dumps([a._asdict() for a in answers], indent=2, ensure_ascii=False)
            else:
                table = _as_csv(answers, min(args.top_k, classifier.num_classes))
            write_atomically(table, folder / f'predictions.{args.format}')
            readable = [a for a in answers if a.labels]
            if readable:
                draw('contact.png', figures.draw_contact_sheet, readable, folder / 'contact.png')
                if not args.onnx and classifier.model is not None and has_local_attention(classifier.model):
                    with torch.no_grad():
                        draw('attention.png', figures.draw_overlays, classifier, readable, folder / 'attention.png')
    except (ValueError, OSError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0 if all(a.labels for a in answers) else 1
