#!/usr/bin/env python3
"""Find objects in images: files, folders or patterns.

    python scripts/predict_detection.py shots/ --model output/shapes_detection/model --output result

Writes for each image NAME.png with boxes, names, scores and masks drawn on it, and objects.json with all of them: for
each file, boxes as left, top, width, height in pixels, and masks in COCO's run-length code.
"""
import argparse
import json
import logging
import sys
from pathlib import Path
from typing import List, Optional

from timm.utils import setup_default_logging

from elsa_models._extras import require
from elsa_models._files import write_atomically
from elsa_models.models._checkpoint import WeightsError
from elsa_models.training import DataError, RecipeError
from elsa_models.training.data import decode
from elsa_models.training.inference import find_images, unique_names
from elsa_models.training.world import join_world


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('inputs', nargs='+', metavar='IMAGES', help='image files, folders or patterns')
    parser.add_argument('--model', required=True, metavar='FOLDER', help='the folder model of a run')
    parser.add_argument('--output', required=True, metavar='FOLDER', help='folder for pictures and objects.json')
    parser.add_argument('--threshold', type=float, default=0.5, metavar='X', help='lowest score (%(default)s)')
    parser.add_argument('--device', default='auto', help='cpu, cuda, ... (%(default)s)')
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    status, objects = 0, {}
    try:
        require('pycocotools', 'detection')
        from elsa_models.dense.draw import draw_objects
        from elsa_models.training.detection import detect, load_detector, to_coco
        device = join_world(args.device).device
        files = find_images(args.inputs)
        model, config = load_detector(args.model)
        model.to(device)
        names = config['class_names']
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        for i, (file, stem) in enumerate(zip(files, unique_names(files), strict=True)):
            try:
                image = decode(Path(file), 'RGB', file)
            except DataError as e:
                print(e, file=sys.stderr)
                status = 1
                continue
            found = detect(model, image, args.threshold)
            draw_objects(image, found, names).save(folder / f'{stem}.png')
            labels = [names[k - 1] for k in found['labels'].tolist()]
            results = to_coco(found, i, range(1, len(names) + 1))
            keys = ('bbox', 'score', 'segmentation')
            objects[file] = [
                dict(label=label, **{k: r[k] for k in keys if k in r})
                for label, r in zip(labels, results, strict=True)]
            counts = ', '.join(f'{labels.count(name)} {name}' for name in names if name in labels)
            print(f'{file}: {counts or "nothing"}')
        write_atomically(json.dumps(objects, indent=1), folder / 'objects.json')
    except (RecipeError, DataError, WeightsError, ValueError, OSError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return status


if __name__ == '__main__':
    sys.exit(main())
