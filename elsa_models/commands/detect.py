"""Find objects in images: files, folders or patterns.

    elsa detect shots/ --model output/shapes_detection/model --output result

Writes for each image NAME.png with boxes, names, scores and masks drawn on it, and objects.json with all of them: for
each file, names and numbers of classes, boxes as left, top, width, height in pixels, and masks in COCO's run-length
code.
"""
import argparse
import json
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import torch
from PIL import Image

from .._files import write_atomically
from .._images import draw, printable
from ._prediction import Picture, predict_command


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this script alone takes."""
    parser.add_argument('--threshold', type=float, default=0.5, metavar='X', help='lowest score (%(default)s)')


def _draw(image: Image.Image, found: Dict[str, torch.Tensor], names: List[str], path: Path) -> None:
    from ..dense.draw import draw_objects
    draw_objects(image, found, names).save(path)


def predict(args: argparse.Namespace, device: torch.device, pictures: Iterator[Picture]) -> None:
    """Draw, print and write down the objects of each image."""
    from ..dense.coco import to_coco
    from ..dense.detection import detect, load_detector
    model, config = load_detector(args.model)
    model.to(device)
    nothing = f'nothing with a score of {args.threshold} or more; a lower --threshold shows more'
    names, objects = config['class_names'], {}
    for i, (file, stem, image) in enumerate(pictures):
        found = detect(model, image, args.threshold)
        path = args.output / f'{stem}.png'
        draw(path.name, _draw, image, found, names, path)
        numbers = found['labels'].tolist()
        labels = [names[k - 1] for k in numbers]
        results = to_coco(found, i, range(1, len(names) + 1))
        keys = ('bbox', 'score', 'segmentation')
        objects[file] = [
            dict(label=label, number=number, **{k: r[k] for k in keys if k in r})
            for label, number, r in zip(labels, numbers, results, strict=True)]
        counts = ', '.join(f'{labels.count(name)} {name}' for name in names if name in labels)
        print(f'{printable(file)}: {printable(counts) or nothing}')
    write_atomically(json.dumps(objects, indent=1), args.output / 'objects.json')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    return predict_command(__doc__, ('pycocotools', 'detection'), add_options, predict, argv)
