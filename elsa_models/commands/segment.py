"""Find what each pixel of an image belongs to: files, folders or patterns.

    elsa segment shots/ --model output/shapes_segmentation/model --output result

Writes for each image NAME.png, its label map, and NAME_overlay.png, the colours of the classes laid over the image
and named below it.
"""
import argparse
import json
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from .._files import write_atomically
from .._images import draw, printable
from ._prediction import Picture, predict_command


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this script alone takes."""
    parser.add_argument('--scales', type=float, nargs='+', metavar='X', help='sizes to look at, relative to the image')
    parser.add_argument('--flip', action='store_true', help='look at mirror images, too')
    parser.add_argument('--window', type=int, metavar='N', help='look at windows of so many pixels a side')


def _draw(image: Image.Image, labels: np.ndarray, names: Dict[int, str], path: Path) -> None:
    from ..dense.draw import overlay, with_legend
    with_legend(overlay(image, labels), names).save(path)


def predict(args: argparse.Namespace, device: torch.device, pictures: Iterator[Picture]) -> None:
    """Write label map and overlay of each image, and print the share of each class."""
    from ..dense.segmentation import load_segmenter, predict_labels
    model, config = load_segmenter(args.model)
    model.to(device)
    if args.scales:
        config['eval_scales'] = args.scales
    if args.window is not None:
        config['eval_window'] = args.window
    config['eval_flip'] |= args.flip
    for file, stem, image in pictures:
        with torch.no_grad():
            labels = predict_labels(model, pil_to_tensor(image).to(device), config).cpu().numpy()
        Image.fromarray(labels.astype('uint8')).save(args.output / f'{stem}.png')
        names = {int(i): config['class_names'][i] for i in sorted(set(labels.flat))}
        path = args.output / f'{stem}_overlay.png'
        draw(path.name, _draw, image, labels, names, path)
        shares = {name: float((labels == i).mean()) for i, name in names.items()}
        print(f'{printable(file)}: ' + ', '.join(f'{printable(name)} {share:.1%}' for name, share in shares.items()))
    write_atomically(json.dumps(config['class_names'], indent=2), args.output / 'classes.json')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program and return its exit status."""
    return predict_command(__doc__, ('segmentation_models_pytorch', 'segmentation'), add_options, predict, argv)
