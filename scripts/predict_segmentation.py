#!/usr/bin/env python3
"""Find what each pixel of an image belongs to: files, folders or patterns.

    python scripts/predict_segmentation.py shots/ --model output/shapes_segmentation/model --output result

Writes for each image NAME.png, its label map, and NAME_overlay.png, the colours of the classes laid over the image.
"""
import argparse
import json
import logging
import sys
from pathlib import Path
from typing import List, Optional

import torch
from PIL import Image
from timm.utils import setup_default_logging
from torchvision.transforms.v2.functional import pil_to_tensor

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
    parser.add_argument('--output', required=True, metavar='FOLDER', help='folder for label maps and overlays')
    parser.add_argument('--scales', type=float, nargs='+', metavar='X', help='sizes to look at, relative to the image')
    parser.add_argument('--flip', action='store_true', help='look at mirror images, too')
    parser.add_argument('--window', type=int, metavar='N', help='look at windows of so many pixels a side')
    parser.add_argument('--device', default='auto', help='cpu, cuda, ... (%(default)s)')
    args = parser.parse_args(argv)
    setup_default_logging(logging.WARNING)
    status = 0
    try:
        require('segmentation_models_pytorch', 'segmentation')
        from elsa_models.training.segmentation import load_segmenter, overlay, predict_labels
        device = join_world(args.device).device
        files = find_images(args.inputs)
        model, config = load_segmenter(args.model)
        model.to(device)
        if args.scales:
            config['eval_scales'] = args.scales
        if args.window is not None:
            config['eval_window'] = args.window
        config['eval_flip'] |= args.flip
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        for file, name in zip(files, unique_names(files), strict=True):
            try:
                image = decode(Path(file), 'RGB', file)
            except DataError as e:
                print(e, file=sys.stderr)
                status = 1
                continue
            with torch.no_grad():
                labels = predict_labels(model, pil_to_tensor(image).to(device), config).cpu().numpy()
            Image.fromarray(labels.astype('uint8')).save(folder / f'{name}.png')
            overlay(image, labels).save(folder / f'{name}_overlay.png')
            shares = {config['class_names'][i]: float((labels == i).mean()) for i in sorted(set(labels.flat))}
            print(f'{file}: ' + ', '.join(f'{k} {v:.1%}' for k, v in shares.items()))
        write_atomically(json.dumps(config['class_names'], indent=2), folder / 'classes.json')
    except (RecipeError, DataError, WeightsError, ValueError, OSError, ImportError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return status


if __name__ == '__main__':
    sys.exit(main())
