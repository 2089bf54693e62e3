"""Labelled images: scikit-learn's digits, or a folder with one sub-folder for each class."""
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image, ImageOps
from timm.data import create_loader
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from .._extras import require
from .config import Recipe


class DataError(ValueError):
    """Data that cannot be trained on, with the name of the folder or file at fault."""


class LabelledImages(Dataset):
    """Images with the number of their class, in memory or in files.

    `create_loaders` sets `transform`.
    """

    def __init__(self, images: Sequence[Union[Path, Image.Image]], targets: Sequence[int], mode: str = 'RGB') -> None:
        """
        Args:
            images: Images, or files that hold them.
            targets: Class of each image.
            mode: Colour mode, 'RGB' or 'L', that `image` returns.
        """
        self.images = list(images)
        self.targets = list(targets)
        self.mode = mode
        self.transform = None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """The image as it is, upright and in the colours of `mode`.

        Raises:
            DataError: Its file cannot be read.
        """
        image = self.images[index]
        if isinstance(image, Image.Image):
            return image.convert(self.mode)
        try:
            with Image.open(image) as opened:
                return ImageOps.exif_transpose(opened).convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise DataError(f'{image}: cannot be read as an image ({e}).') from e

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), self.targets[index]


class Splits(NamedTuple):
    """The two parts of a data set."""
    train: LabelledImages
    val: LabelledImages
    class_names: List[str]


def load_splits(recipe: Recipe, mode: str = 'RGB') -> Splits:
    """Find the images to train on and those to hold out.

    Args:
        recipe: Says what to load and how much to hold out.
        mode: Colour mode of the images, 'RGB' or 'L'.

    Raises:
        DataError: There are no images, a class has none, there is one class only, or a file is no image.
        ImportError: The digits are asked for and scikit-learn is not installed.
    """
    parts = None
    if recipe.data == 'digits':
        images, targets, class_names = _digits()
    else:
        folder = Path(recipe.data)
        if not folder.is_dir():
            raise DataError(f"data: got {recipe.data!r}, must be 'digits' or a folder that exists.")
        if (folder / 'train').is_dir() and (_class_folders(folder / 'train') or (folder / 'val').is_dir()):
            class_names = _class_names(folder / 'train')
            if not (folder / 'val').is_dir():
                raise DataError(
                    f"{folder}: has a folder 'train' of classes but none named 'val'. Give {folder / 'train'} as data"
                    f' to hold out a part of it, or add {folder / "val"}.')
            strange = sorted(set(_class_folders(folder / 'val')) - set(class_names))
            if strange:
                raise DataError(f'{folder / "val" / strange[0]}: no class of this name is in {folder / "train"}.')
            parts = [_folder_images(folder / part, class_names, complete=part == 'train') for part in ('train', 'val')]
        else:
            class_names = _class_names(folder)
            images, targets = _folder_images(folder, class_names)
    generator = torch.Generator().manual_seed(recipe.val_seed)
    if parts is None:
        train, val = _hold_out(targets, class_names, recipe.val_fraction, recipe.limit, generator)
        parts = [([images[i] for i in index], [targets[i] for i in index]) for index in (train, val)]
    elif recipe.limit:
        for n, (images, targets) in enumerate(parts):
            index = sorted(i for group in _by_class(targets, generator).values() for i in group[:recipe.limit])
            parts[n] = [images[i] for i in index], [targets[i] for i in index]
    return Splits(*(LabelledImages(*part, mode=mode) for part in parts), class_names)


def create_loaders(
        recipe: Recipe,
        splits: Splits,
        data_config: Dict[str, Any],
        device: torch.device,
) -> Tuple[DataLoader, DataLoader]:
    """Loaders of transformed batches for training, and of the held-out images in their order.

    Args:
        recipe: Says how to augment.
        splits: The images; their transforms are set.
        data_config: Size, normalisation and so on, as `timm.data.resolve_data_config` returns them.
        device: Where the batches are going to be used.
    """
    common = dict(
        input_size=data_config['input_size'],
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=recipe.workers,
        pin_memory=device.type == 'cuda',
        device=device,
        use_prefetcher=False,
    )
    train_loader = create_loader(
        splits.train,
        batch_size=min(recipe.batch_size, len(splits.train)),  # the last, smaller batch is dropped
        is_training=True,
        train_crop_mode=recipe.train_crop_mode,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment,
        re_prob=recipe.re_prob,
        **common,
    )
    val_loader = create_loader(splits.val, batch_size=recipe.batch_size, **common)
    return train_loader, val_loader


def _digits() -> Tuple[List[Image.Image], List[int], List[str]]:
    """The 1797 handwritten digits of scikit-learn: 8 x 8 pixels, white on black."""
    digits = require('sklearn.datasets').load_digits()
    images = [Image.fromarray(x) for x in (digits.images * (255 / 16)).round().astype('uint8')]
    return images, digits.target.tolist(), [str(name) for name in digits.target_names]


def _class_folders(folder: Path) -> List[str]:
    # hidden folders are caches and the like
    names = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(('.', '__'))]
    return sorted(names, key=natural_key)


def _class_names(folder: Path) -> List[str]:
    names = _class_folders(folder)
    if not names:
        raise DataError(f'{folder}: must hold one sub-folder of images for each class, but holds none.')
    if len(names) == 1:
        raise DataError(f'{folder}: holds one class only, {names[0]!r}; at least two are needed.')
    return names


def _folder_images(folder: Path, class_names: List[str], complete: bool = True) -> Tuple[List[Path], List[int]]:
    numbers = {name: i for i, name in enumerate(class_names)}
    if not complete:
        numbers = {name: numbers[name] for name in _class_folders(folder)}
    found = []
    if numbers:
        found = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    found = [(Path(file), target) for file, target in found if not os.path.basename(file).startswith('.')]
    filled = {target for _, target in found}
    for name, target in numbers.items():
        if target not in filled:
            raise DataError(f'{folder / name}: holds no images ({", ".join(IMG_EXTENSIONS)}).')
    if not found:
        raise DataError(f'{folder}: holds no images.')
    progress = require('tqdm').tqdm(found, desc=f'checking {folder.name}', unit='image', delay=1., leave=False)
    for file, _ in progress:
        try:
            with Image.open(file) as image:
                image.verify()  # headers, and the checksums of formats that have any
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise DataError(f'{file}: cannot be read as an image ({e}).') from e
    return [file for file, _ in found], [target for _, target in found]


def _by_class(targets: Sequence[int], generator: torch.Generator) -> Dict[int, List[int]]:
    """Indices of each class in random order."""
    groups: Dict[int, List[int]] = {}
    for i, target in enumerate(targets):
        groups.setdefault(target, []).append(i)
    return {
        target: [groups[target][i] for i in torch.randperm(len(groups[target]), generator=generator).tolist()]
        for target in sorted(groups)}


def _hold_out(
        targets: Sequence[int],
        class_names: List[str],
        fraction: float,
        limit: Optional[int],
        generator: torch.Generator,
) -> Tuple[List[int], List[int]]:
    """Indices to train on and to hold out, at least one of each class in both."""
    train, val = [], []
    for target, index in _by_class(targets, generator).items():
        index = index[:limit or None]
        if len(index) < 2:
            raise DataError(
                f'class {class_names[target]!r}: has one image, but needs two: one to train on and one to hold out.')
        size = min(max(1, round(fraction * len(index))), len(index) - 1)
        val += index[:size]
        train += index[size:]
    return sorted(train), sorted(val)
