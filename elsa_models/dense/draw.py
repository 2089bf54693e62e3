"""Pictures of what dense models say: classes of pixels, boxes and masks."""
from typing import Dict, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as vf
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .metrics import IGNORE


def palette(number: int) -> np.ndarray:
    """Colours (number, 3), uint8, that differ well; the first is black."""
    hues = (np.arange(number) * 0.618034) % 1.
    colors = [Image.new('HSV', (1, 1), (int(h * 255), 200, 230)).convert('RGB').getpixel((0, 0)) for h in hues]
    return np.array([(0, 0, 0), *colors[:-1]], dtype=np.uint8)


def overlay(image: Image.Image, labels: np.ndarray, strength: float = 0.6) -> Image.Image:
    """An image with the colour of each pixel's class laid over it.

    Args:
        image: Of W x H pixels.
        labels: (H, W), classes; 255 is left as it is.
        strength: Share of the class's colour.
    """
    colors = palette(256)[labels.astype(np.uint8)]
    mixed = (1. - strength) * np.asarray(image) + strength * colors
    return Image.fromarray(np.where((labels == IGNORE)[..., None], np.asarray(image), mixed).astype(np.uint8))


def contact_sheet(rows: Sequence[Sequence[Image.Image]], side: int = 192) -> Image.Image:
    """Images of equal size in rows, one sheet."""
    sheet = Image.new('RGB', (side * max(map(len, rows)), side * len(rows)), 'white')
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(ImageOps.contain(image.convert('RGB'), (side - 4, side - 4)), (x * side + 2, y * side + 2))
    return sheet


def draw_objects(image: Image.Image, found: Dict[str, torch.Tensor], class_names: Sequence[str]) -> Image.Image:
    """An image with boxes, names, scores and masks drawn on it.

    Args:
        image: Of W x H pixels.
        found: Boxes (N, 4), labels (N,) from 1; scores (N,) and masks (N, 1, H, W) if there are any.
        class_names: Name of each class.
    """
    x = vf.pil_to_tensor(image.convert('RGB'))
    labels = found['labels'].tolist()
    if not labels:
        return vf.to_pil_image(x)
    colors = [tuple(c) for c in palette(len(class_names) + 1)[labels].tolist()]
    if 'masks' in found:
        x = draw_segmentation_masks(x, found['masks'][:, 0] > 0.5, alpha=0.5, colors=colors)
    scores = found['scores'].tolist() if 'scores' in found else [None] * len(labels)
    names = [class_names[k - 1] + ('' if s is None else f' {s:.2f}') for k, s in zip(labels, scores)]
    return vf.to_pil_image(draw_bounding_boxes(x, found['boxes'], labels=names, colors=colors))
