"""Pictures: from a file to what a model takes, and back to what a person sees."""
import glob
import logging
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

_logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (*IMG_EXTENSIONS, '.gif', '.jfif')

# what has been said once is not said again, by this process or one that it has forked
_KINDS = ('16 bits', 'float')
_said = torch.zeros(len(_KINDS), dtype=torch.uint8).share_memory_()


class DataError(ValueError):
    """Data that cannot be used, with the name of the folder or file at fault."""


def warn_again() -> None:
    """Let a new run have its warnings."""
    _said.zero_()


def _warn_once(kind: str, message: str) -> None:
    place = _KINDS.index(kind)
    if not _said[place]:
        _said[place] = 1
        _logger.warning('%s (said once)', message)


def read_image(source: Union[str, Path, BinaryIO, Image.Image], mode: str = 'RGB', name: Any = None) -> Image.Image:
    """A picture of 8 bits, upright and in the colours of `mode`: what everything in this package reads pictures with.

    Values of 16 bits are scaled by 1 / 257, and floating-point ones are taken to be from 0 to 1. Transparency is left
    out. Of several pictures in a file, the first counts.

    Args:
        source: File, or a picture.
        mode: Pillow's: 'RGB' or 'L'.
        name: Of the picture, for messages; that of the file if None.

    Raises:
        DataError: It cannot be read, or has values of an unknown range.
    """
    name = source if name is None else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's: what cannot be read is an error
            if isinstance(source, Image.Image):
                return _to_bytes(source, source.format, name).convert(mode)
            with Image.open(source) as opened:
                return _to_bytes(ImageOps.exif_transpose(opened), opened.format, name).convert(mode)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise DataError(f'{name}: cannot be read as an image ({e}).') from e


def _to_bytes(image: Image.Image, file_format: Optional[str], name: Any) -> Image.Image:
    """A picture whose mode Pillow converts to 'RGB' and 'L' as a person expects."""
    mode = image.mode
    if mode.startswith('I;16') or mode == 'I' and file_format in ('PNG', 'PPM'):  # which hold 16 bits at most
        _warn_once('16 bits', f'{name}: has 16 bits a pixel, and is scaled to 8')
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if mode.startswith('I'):
        raise DataError(f'{name}: has whole numbers of 32 bits, whose range is not known. Save it with 8 or 16 bits.')
    if mode == 'F':
        values = np.asarray(image)
        if not (values >= 0.).all() or not (values <= 1.).all():
            raise DataError(
                f'{name}: has values from {values.min():g} to {values.max():g}, must be from 0 to 1, as floating-point'
                f' numbers. Save it with 8 or 16 bits.')
        _warn_once('float', f'{name}: has floating-point values, of which 1 is taken for white')
        return Image.fromarray((values * 255.).round().astype(np.uint8))
    return image.convert('RGBA') if mode in ('P', 'PA') else image


class Found(NamedTuple):
    """The files of a folder."""
    images: List[str]  # by folder and name
    others: Dict[str, int]  # number of the files of other kinds, by their ending


def find_files(folder: Union[str, Path]) -> Found:
    """The image files in a folder, at any depth; what is hidden or of a system (`.name`, `__name`) is left out."""
    images: List[str] = []
    others: Counter = Counter()
    for root, names in sorted(_walk(folder)):
        for name in sorted(names):
            if name.lower().endswith(IMAGE_EXTENSIONS):
                images.append(os.path.join(root, name))
            else:
                others[os.path.splitext(name)[1].lower() or 'without ending'] += 1
    return Found(images, dict(others))


def _walk(folder: Union[str, Path]) -> Iterator[Tuple[str, List[str]]]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not is_hidden(f)]
        yield root, [n for n in names if not n.startswith('.')]


def is_hidden(name: str) -> bool:
    """Whether a folder's name is one of caches and the like."""
    return name.startswith(('.', '__'))


def find_images(inputs: Sequence[str]) -> List[str]:
    """Image files from names of files and folders, and patterns such as 'shots/**/*.jpg', in natural order.

    Raises:
        DataError: An input names nothing.
    """
    files: List[str] = []
    for name in inputs:
        if os.path.isdir(name):
            found = find_files(name).images
        elif os.path.isfile(name):
            found = [name]
        else:
            found = [f for f in glob.glob(name, recursive=True) if os.path.isfile(f)]
        if not found:
            raise DataError(f'{name}: no such image, folder of images, or pattern that fits any.')
        files += sorted(found, key=natural_key)
    return list(dict.fromkeys(files))


def printable(text: Any) -> str:
    """A name as text that any file and screen takes: bytes that are no UTF-8, and control characters, are escaped."""
    text = str(text).encode('utf-8', 'backslashreplace').decode()
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Bytes (..., C, H, W) as a model takes them."""
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255. - mean) / std


def denormalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """What a model takes, (..., C, H, W), as colours between 0 and 1."""
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images * std + mean).clamp(0., 1.)


def to_picture(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """What a model takes, (C, H, W), as an array (H, W, C) of colours between 0 and 1, or (H, W) for one channel."""
    picture = denormalise(image.float().cpu(), mean, std).permute(1, 2, 0).numpy()
    return picture[..., 0] if picture.shape[2] == 1 else picture


def draw(name: str, function: Callable[..., Any], *args: Any) -> None:
    """Draw a picture for a person, of which no fault ends what has its result: it is a warning.

    Args:
        name: Of the picture, for the warning.
        function: Draws it.
        args: Arguments of the function.
    """
    try:
        function(*args)
    except Exception as e:  # of matplotlib, of fonts, of pictures
        _logger.warning('%s: is not drawn (%s: %s)', printable(name), type(e).__name__, printable(e))
