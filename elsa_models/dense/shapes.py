"""Pictures of circles, squares and triangles with boxes, masks and labels, drawn when they are asked for."""
from typing import NamedTuple, Tuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ('circle', 'square', 'triangle')
_MIN_VISIBLE = 0.3  # of an object's area; those more hidden are left out
_MIN_SIDE = 6  # pixels


class Scene(NamedTuple):
    """A picture and what is on it."""
    image: Image.Image
    masks: np.ndarray  # N, H, W: visible pixels of each object, bool; no two objects share one
    labels: np.ndarray  # N: class of each, from 0


class Shapes:
    """A data set of scenes, each drawn from its number and the seed alone.

    Objects are brighter than the background; colours say nothing of the class. Sizes vary by a factor of 2.5, objects
    hide parts of each other, and one scene in sixteen is empty.
    """

    def __init__(self, number: int, size: int = 96, seed: int = 0, max_objects: int = 4) -> None:
        """
        Args:
            number: Scenes in it.
            size: Height and width in pixels, at least 32.
            seed: Data sets of other seeds share no scenes.
            max_objects: Most objects in a scene.

        Raises:
            ValueError: A value is too small.
        """
        for name, value, low in (('number', number, 1), ('size', size, 32), ('max_objects', max_objects, 1)):
            if value < low:
                raise ValueError(f'{name}: got {value}, must be at least {low}.')
        self.number, self.size, self.seed, self.max_objects = number, size, seed, max_objects

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.number:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        size = self.size
        canvas = Image.fromarray(_background(rng, size))
        owner = np.full((size, size), -1)
        labels, areas = [], []
        for i in range(0 if rng.random() < 1 / 16 else int(rng.integers(1, self.max_objects + 1))):
            label, shape = _draw(rng, size)
            owner[shape] = i
            color = rng.integers(128, 256, 3)
            canvas.paste(tuple(int(c) for c in color), mask=Image.fromarray(shape))
            labels.append(label)
            areas.append(shape.sum())
        masks = np.stack([owner == i for i in range(len(labels))]) if labels else np.zeros((0, size, size), bool)
        keep = [i for i, m in enumerate(masks) if m.sum() >= _MIN_VISIBLE * areas[i] and min(_sides(m)) >= _MIN_SIDE]
        # what is left out must not be seen either
        image = np.array(canvas)
        hidden = np.isin(owner, [i for i in range(len(labels)) if i not in keep])
        image[hidden] = _background(np.random.default_rng([self.seed, index]), size)[hidden]
        noise = rng.normal(0., 8., image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        return Scene(Image.fromarray(image), masks[keep], np.array([labels[i] for i in keep], dtype=np.int64))


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    corners = rng.integers(0, 128, (2, 2, 3)).astype(np.uint8)
    return np.array(Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR))


def _draw(rng: np.random.Generator, size: int) -> Tuple[int, np.ndarray]:
    label = int(rng.integers(len(CLASSES)))
    radius = size * rng.uniform(0.1, 0.25)
    x, y = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(0., 2. * np.pi)
    plane = Image.new('L', (size, size))
    draw = ImageDraw.Draw(plane)
    if CLASSES[label] == 'circle':
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    else:
        corners = 4 if CLASSES[label] == 'square' else 3
        angles = angle + 2. * np.pi * np.arange(corners) / corners
        draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=255)
    return label, np.array(plane) > 0


def _sides(mask: np.ndarray) -> Tuple[int, int]:
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return (0, 0) if not len(rows) else (int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) of masks (N, H, W), none of them empty: left, top, right, bottom, float32, the latter exclusive."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for i, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
