"""Images and the class of each of their pixels: files, or drawn scenes."""
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .._images import DataError, find_files, read_image
from .metrics import IGNORE
from .shapes import CLASSES, Shapes

_LAYOUTS = (  # folders of images and of labels, to train on and to hold out; whether label 0 is none
    (('images/training', 'annotations/training'), ('images/validation', 'annotations/validation'), True),  # ADE20K
    (('images/train', 'masks/train'), ('images/val', 'masks/val'), False),
)


class LabelMaps(Dataset):
    """Images and label maps: files, or scenes of `Shapes`.

    `transform` maps an image (3, H, W), uint8, and labels (H, W), int64, to the same of other sizes; None leaves them.
    """

    def __init__(
            self,
            source: Union[Shapes, Sequence[Tuple[Path, Path]]],
            num_classes: int,
            zero_is_none: bool = False,
    ) -> None:
        """
        Args:
            source: Scenes, or files of images and label maps.
            num_classes: Classes that may be in a label map, beside 255 for none.
            zero_is_none: Labels are one more than classes, and 0 is none.
        """
        self.source, self.num_classes, self.zero_is_none = source, num_classes, zero_is_none
        self.transform: Optional[v2.Transform] = None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tuple[Image.Image, np.ndarray]:
        """An image, and its labels (H, W), int64.

        Raises:
            DataError: A file cannot be read, is of another size than its image, or holds an unknown class.
        """
        if isinstance(self.source, Shapes):
            scene = self.source[index]
            labels = np.zeros((self.source.size,) * 2, dtype=np.int64)
            for mask, label in zip(scene.masks, scene.labels):
                labels[mask] = label + 1
            return scene.image, labels
        file, label_file = self.source[index]
        image = read_image(file, 'RGB', file)
        try:
            with Image.open(label_file) as opened:
                labels = np.array(ImageOps.exif_transpose(opened))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise DataError(f'{label_file}: cannot be read as a label map ({e}).') from e
        if labels.ndim != 2 or labels.dtype.kind not in 'ui':
            raise DataError(f'{label_file}: must have one channel of whole numbers, the classes.')
        if labels.shape != image.size[::-1]:
            raise DataError(
                f'{label_file}: is of {labels.shape[1]} x {labels.shape[0]} pixels, its image of {image.width} x'
                f' {image.height}.')
        labels = labels.astype(np.int64)
        if self.zero_is_none:
            labels = np.where(labels == 0, IGNORE, labels - 1)
        strange = labels[(labels != IGNORE) & ((labels >= self.num_classes) | (labels < 0))]
        if strange.size:
            raise DataError(
                f'{label_file}: has class {strange[0]}, must be from 0 to {self.num_classes - 1}'
                f'{" (after 1 was taken away)" if self.zero_is_none else ""}, or {IGNORE} for none.')
        return image, labels

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
        image, labels = self.read(index)
        image = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        labels = tv_tensors.Mask(torch.from_numpy(labels))
        if self.transform is not None:
            image, labels = self.transform(image, labels)
        return image.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)


class LabelMapSplits(NamedTuple):
    """The two parts of a data set."""
    train: LabelMaps
    val: LabelMaps
    class_names: List[str]


def load_label_maps(
        data: str,
        sizes: Tuple[int, int] = (1000, 100),
        side: int = 96,
        limit: int = 0,
        num_classes: Optional[int] = None,
) -> LabelMapSplits:
    """Find the images to train on and those to hold out.

    A folder holds images/train, masks/train, images/val and masks/val, with maps of the same names that end in .png; or
    the same as ADE20K has them, images/training and annotations/training, with 0 for none. A file classes.txt, one name
    a line, names the classes.

    Args:
        data: 'shapes', or a folder.
        sizes: Number of drawn images of each part.
        side: Height and width of drawn images.
        limit: Use at most this many images of each part, 0 for all.
        num_classes: Number of classes, None for that of classes.txt.

    Raises:
        DataError: Files are missing, or nothing says what classes there are.
    """
    if data == 'shapes':
        parts = [Shapes(min(n, limit or n), side, seed) for seed, n in enumerate(sizes)]
        names = ['background', *CLASSES]
        return LabelMapSplits(*(LabelMaps(part, len(names)) for part in parts), names)
    folder = Path(data)
    found = [layout for layout in _LAYOUTS if (folder / layout[0][0]).is_dir()]
    if not found:
        raise DataError(
            f"data: got {data!r}, must be 'shapes' or a folder with images/train, masks/train, images/val and"
            f' masks/val, or with images/training, annotations/training, images/validation and annotations/validation.')
    names_file = folder / 'classes.txt'
    if names_file.is_file():
        names = [line.strip() for line in names_file.read_text(encoding='utf-8').splitlines() if line.strip()]
        if num_classes not in (None, len(names)):
            raise DataError(f'num_classes: got {num_classes}, {names_file} has {len(names)} names.')
    elif num_classes is not None:
        names = [str(i) for i in range(num_classes)]
    else:
        raise DataError(f'{folder}: has no file classes.txt; give num_classes.')
    *parts, zero_is_none = found[0]
    made = [LabelMaps(_pairs(folder / a, folder / b, limit), len(names), zero_is_none) for a, b in parts]
    return LabelMapSplits(*made, names)


def _pairs(images: Path, masks: Path, limit: int) -> List[Tuple[Path, Path]]:
    files = [Path(f) for f in find_files(images).images]
    if not files:
        raise DataError(f'{images}: has no images.')
    pairs = []
    for file in sorted(files, key=lambda f: natural_key(str(f)))[:limit or None]:
        mask = masks / file.relative_to(images).with_suffix('.png')
        if not mask.is_file():
            raise DataError(f'{mask}: is missing, the label map of {file}.')
        pairs.append((file, mask))
    return pairs
