"""Pictures of what dense models say: classes of pixels, boxes and masks."""
import math
from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.v2 import functional as vf
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .._fonts import font_for, shorten
from .metrics import IGNORE

_FONT, _SMALL, _LINE = 12, 10, 18  # sizes in pixels


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


def contact_sheet(
        rows: Sequence[Sequence[Image.Image]],
        headings: Sequence[str],
        class_names: Mapping[int, str],
        side: int = 192,
) -> Image.Image:
    """Images of equal size in rows, one sheet, with a legend.

    Args:
        rows: Images, as many in each row.
        headings: What each column shows.
        class_names: Names of the classes that are in the legend, by their place in the palette.
        side: Height and width of an image on the sheet, in pixels.
    """
    sheet = Image.new('RGB', (side * len(headings), _LINE + side * len(rows)), 'white')
    draw = ImageDraw.Draw(sheet)
    for x, heading in enumerate(headings):
        draw.text((x * side + 2, 2), heading, fill='black', font=font_for(heading, _FONT))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            small = ImageOps.contain(image.convert('RGB'), (side - 4, side - 4))
            sheet.paste(small, (x * side + 2, _LINE + y * side + 2))
    return with_legend(sheet, class_names)


def with_legend(image: Image.Image, class_names: Mapping[int, str]) -> Image.Image:
    """An image with the colours of classes below it, at least 160 pixels wide.

    Args:
        image: Any.
        class_names: Names of classes by their place in the palette, which is their number as well.
    """
    colors = palette(max(class_names, default=0) + 1)
    width, x, y, entries = max(image.width, 160), 2, 0, []
    for k, name in class_names.items():
        text, font = _writable((f'{k} {shorten(name)}', f'class {k}'), _FONT)
        step = 28 + math.ceil(font.getlength(text))
        if x > 2 and x + step > width:
            x, y = 2, y + _LINE
        entries.append((x, image.height + y, text, font, tuple(colors[k].tolist())))
        x += step
    out = Image.new('RGB', (width, image.height + y + _LINE), 'white')
    out.paste(image, (0, 0))
    draw = ImageDraw.Draw(out)
    for x, y, text, font, color in entries:
        draw.rectangle((x, y + 3, x + 12, y + 15), fill=color, outline='black')
        draw.text((x + 16, y + 2), text, fill='black', font=font)
    return out


def draw_objects(image: Image.Image, found: Dict[str, torch.Tensor], class_names: Sequence[str]) -> Image.Image:
    """An image with boxes, names, scores and masks drawn on it; `class 3` where this machine has no font for a name.

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
    picture = vf.to_pil_image(draw_bounding_boxes(x, found['boxes'], colors=colors))
    draw = ImageDraw.Draw(picture)
    for k, score, box, color in zip(labels, scores, found['boxes'].tolist(), colors, strict=True):
        text, font = _writable((shorten(class_names[k - 1]), f'class {k}'), _SMALL)
        draw.text((box[0] + 2, box[1] + 1), text if score is None else f'{text} {score:.2f}', fill=color, font=font)
    return picture


def _writable(texts: Sequence[str], size: int) -> Tuple[str, Any]:
    """The first text for which this machine has a font, and the font."""
    fonts = [(text, font_for(text, size)) for text in texts]
    return next((pair for pair in fonts if pair[1] is not None), (texts[-1], ImageFont.load_default(size)))
