"""Labelled images: scikit-learn's digits, a folder with one sub-folder for each class, or timm's dataset factory."""
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.auto_augment import AugmentOp, posterize as timm_posterize
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset

from .._extras import require
from .._images import IMAGE_EXTENSIONS, DataError, find_files, is_hidden, printable, read_image
from ..inference.classifier import common_transform
from .config import ImageValues, Recipe, RecipeError

_logger = logging.getLogger(__name__)

_MAX_CLASSES = 100  # that are listed
_TRAIN_NAMES = ('train', 'training')  # of folders, in any case
_VAL_NAMES = ('val', 'valid', 'validation', 'test', 'testing')  # the first that is there
_FACTORIES = ('torch/', 'hfds/', 'hfids/', 'wds/')


class LabelledImages(Dataset):
    """Images with the number of their class, in memory or in files.

    `transform` maps an image to what a sample holds; None leaves it.
    """

    def __init__(
            self,
            images: Sequence[Union[Path, Image.Image]],
            targets: Sequence[int],
            mode: str = 'RGB',
            names: Optional[Sequence[str]] = None,
    ) -> None:
        """
        Args:
            images: Images, or files that hold them.
            targets: Class of each image.
            mode: Colour mode, 'RGB' or 'L', that `image` returns.
            names: Name of each image within its data set, their numbers if None.
        """
        self.images = list(images)
        self.targets = list(targets)
        self.names = [str(i) for i in range(len(self.images))] if names is None else list(names)
        self.mode = mode
        self.transform: Optional[Callable[[Image.Image], Any]] = None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """The image as it is, upright and in the colours of `mode`.

        Raises:
            DataError: Its file cannot be read.
        """
        return read_image(self.images[index], self.mode, self.images[index])

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), self.targets[index]


class FactoryImages(Dataset):
    """A data set of timm's factory by number, with the behaviour of `LabelledImages`."""

    def __init__(self, dataset: Dataset, name: str, mode: str = 'RGB') -> None:
        """
        Args:
            dataset: timm's ImageDataset, or one of torchvision.
            name: Its name, for messages.
            mode: Colour mode, 'RGB' or 'L', that `image` returns.
        """
        self.dataset = dataset
        self.name = name
        self.mode = mode
        self.transform: Optional[Callable[[Image.Image], Any]] = None

    def __len__(self) -> int:
        return len(self.dataset)

    def _sample(self, index: int) -> Tuple[Image.Image, int]:
        # timm's own reading replaces what cannot be read, and does not count it
        source, target = (getattr(self.dataset, 'reader', None) or self.dataset)[index][:2]
        return read_image(source, self.mode, f'{self.name}, image {index}'), int(target)

    def image(self, index: int) -> Image.Image:
        """As `LabelledImages.image`."""
        return self._sample(index)[0]

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image, target = self._sample(index)
        return image if self.transform is None else self.transform(image), target


class Splits(NamedTuple):
    """The two parts of a data set, by number or as streams."""
    train: Union[LabelledImages, FactoryImages, IterableDataset]
    val: Union[LabelledImages, FactoryImages, IterableDataset]
    class_names: List[str]
    one_source: bool = False  # whether both were drawn from the same images

    @property
    def is_stream(self) -> bool:
        """Whether the images can be read in their order only."""
        return isinstance(self.train, IterableDataset)

    def part(self, name: str) -> Dataset:
        """One part, 'train' or 'val', or 'all' of both.

        Raises:
            RecipeError: All of a data set whose parts are not of images in memory or files.
        """
        if name != 'all':
            return self.train if name == 'train' else self.val
        if not isinstance(self.train, LabelledImages):
            raise RecipeError("part: this data set is read part by part; must be 'val' or 'train'.")
        return LabelledImages(
            self.train.images + self.val.images, self.train.targets + self.val.targets, self.train.mode,
            self.train.names + self.val.names)

    def set_mode(self, mode: str) -> None:
        """Let both parts give images of a colour mode, 'RGB' or 'L'."""
        for part in (self.train, self.val):
            if self.is_stream:
                part.reader.input_img_mode = mode
            else:
                part.mode = mode

    def class_counts(self) -> torch.Tensor:
        """Number of images of each class to train on.

        Raises:
            RecipeError: The data set does not list its classes.
        """
        targets = getattr(self.train, 'targets', None)
        if targets is None:
            targets = getattr(getattr(self.train, 'dataset', None), 'targets', None)
        if targets is None:
            raise RecipeError('class_balance: this data set does not list the classes of its images; must be none.')
        return torch.bincount(torch.as_tensor(targets), minlength=len(self.class_names))


def load_splits(recipe: ImageValues, mode: str = 'RGB', batch_size: int = 1, seed: int = 0) -> Splits:
    """Find the images to train on and those to hold out.

    Args:
        recipe: Says what to load and how much to hold out.
        mode: Colour mode of the images, 'RGB' or 'L'.
        batch_size: Batches of streams, whose length is made a multiple of it.
        seed: Order of streams.

    Raises:
        DataError: There are no images, a class has none, or there is one class only.
        ImportError: The digits are asked for and scikit-learn is not installed.
    """
    parts = None
    if recipe.data.lower().startswith(_FACTORIES):
        return _from_factory(recipe, batch_size, seed)
    if recipe.data == 'digits':
        images, targets, class_names = _digits()
    else:
        folder = Path(recipe.data)
        if not folder.is_dir():
            raise DataError(f"data: got {recipe.data!r}, must be 'digits' or a folder that exists.")
        folders = _part_folders(folder)
        if folders is not None:
            train, val = folders
            class_names = _class_names(train)
            if val is None:
                raise DataError(
                    f"{folder}: has a folder '{train.name}' of classes but none named 'val'. Give {train} as data to"
                    f' hold out a part of it, or add {folder / "val"}.')
            strange = sorted(set(_class_folders(val)) - set(class_names))
            if strange:
                raise DataError(f'{val / strange[0]}: no class of this name is in {train}.')
            parts = [_folder_images(part, class_names, complete=part == train) for part in folders]
        else:
            class_names = _class_names(folder)
            images, targets = _folder_images(folder, class_names)
    generator = torch.Generator().manual_seed(recipe.val_seed)
    one_source = parts is None
    if one_source:
        chosen = _hold_out(targets, class_names, recipe.val_fraction, recipe.limit, generator)
        parts = [(images, targets)] * 2
    else:
        chosen = [
            sorted(i for group in _by_class(part[1], generator).values() for i in group[:recipe.limit or None])
            for part in parts]
    made = []
    roots = (Path(recipe.data),) * 2 if one_source else folders
    for (images, targets), index, root in zip(parts, chosen, roots):
        names = [_name(images[i], i, root) for i in index]
        made.append(LabelledImages([images[i] for i in index], [targets[i] for i in index], mode, names))
    class_names = [printable(name) for name in class_names]
    _report_classes(recipe.data, class_names, *made)
    return Splits(*made, class_names, one_source)


def _report_classes(data: str, class_names: Sequence[str], train: LabelledImages, val: LabelledImages) -> None:
    counts = Counter(train.targets)
    held_out = Counter(val.targets)
    each = [f'{name} {counts[i]} + {held_out[i]}' for i, name in enumerate(class_names)]
    rest = f', and {len(each) - _MAX_CLASSES} more' if len(each) > _MAX_CLASSES else ''
    _logger.info(
        '%s: %d classes, images to train on + held out: %s%s', data, len(each), ', '.join(each[:_MAX_CLASSES]), rest)


def _name(image: Union[Path, Image.Image], index: int, folder: Path) -> str:
    return image.relative_to(folder).as_posix() if isinstance(image, Path) else str(index)


def create_train_transform(recipe: Recipe, data_config: Dict[str, Any], separate: bool = False) -> Any:
    """timm's transform of training: from an image to its bytes (C, H, W), uint8.

    Args:
        recipe: Says how to augment.
        data_config: Size, interpolation and so on, as `timm.data.resolve_data_config` returns them.
        separate: Return its three parts: geometry, colours, bytes.
    """
    train = create_transform(
        is_training=True,
        train_crop_mode=recipe.train_crop_mode,
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter or None,
        color_jitter_prob=recipe.color_jitter_prob,
        grayscale_prob=recipe.grayscale_prob,
        gaussian_blur_prob=recipe.gaussian_blur_prob,
        auto_augment=recipe.auto_augment,
        separate=separate,
        **common_transform(data_config),
    )
    for operation in _operations(train):
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = _posterize
    return train


def _operations(transform: Any) -> Iterator[AugmentOp]:
    """The operations of timm's RandAugment, AutoAugment and AugMix within a transform."""
    if isinstance(transform, AugmentOp):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for part in transform:
            yield from _operations(part)
    else:
        for name in ('transforms', 'ops', 'policy'):
            yield from _operations(getattr(transform, name, ()))


def _posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    # strong augmentation may leave no bit, which is black, and which Pillow 13 refuses
    return timm_posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


def _from_factory(recipe: ImageValues, batch_size: int, seed: int) -> Splits:
    """The two parts of a data set of timm's factory.

    Raises:
        DataError: It cannot be made, or its number of classes is not known.
    """
    parts = []
    for split, is_training in ((recipe.train_split, True), (recipe.val_split, False)):
        try:
            parts.append(create_dataset(
                recipe.data,
                root=recipe.data_dir,
                split=split,
                is_training=is_training,
                batch_size=batch_size,
                seed=seed,
                **recipe.data_args,
            ))
        except Exception as e:  # a data set's library raises what it likes
            raise DataError(
                f'data: {recipe.data!r}, part {split!r} of {recipe.data_dir!r}, cannot be opened: '
                f'{type(e).__name__}: {e}') from e
    names = getattr(parts[0], 'classes', None)
    if names is None:
        numbers = getattr(parts[0].reader, 'class_to_idx', None)
        names = sorted(numbers, key=numbers.get) if numbers else None
    if recipe.num_classes is not None and names is not None and len(names) != recipe.num_classes:
        raise RecipeError(f'num_classes: got {recipe.num_classes}, but {recipe.data!r} has {len(names)}.')
    if names is None:
        if recipe.num_classes is None:
            raise RecipeError(f'num_classes: {recipe.data!r} does not say how many classes it has; must be given.')
        names = [str(i) for i in range(recipe.num_classes)]
    if not isinstance(parts[0], IterableDataset):
        parts = [FactoryImages(part, recipe.data) for part in parts]
    return Splits(*parts, [str(name) for name in names])


def _digits() -> Tuple[List[Image.Image], List[int], List[str]]:
    """The 1797 handwritten digits of scikit-learn: 8 x 8 pixels, white on black."""
    digits = require('sklearn.datasets').load_digits()
    images = [Image.fromarray(x) for x in (digits.images * (255 / 16)).round().astype('uint8')]
    return images, digits.target.tolist(), [str(name) for name in digits.target_names]


def _class_folders(folder: Path) -> List[str]:
    names = [e.name for e in os.scandir(folder) if e.is_dir() and not is_hidden(e.name)]
    return sorted(names, key=natural_key)


def _part_folders(folder: Path) -> Optional[Tuple[Path, Optional[Path]]]:
    """The folders to train on and to hold out, the latter None where it is missing; None for a folder of classes."""
    names = _class_folders(folder)
    train, val = (
        [name for part in parts for name in names if name.lower() == part] for parts in (_TRAIN_NAMES, _VAL_NAMES))
    if not train or not (val or _class_folders(folder / train[0])):
        return None
    for name in (*train[1:], *val[1:]):
        _logger.warning(
            '%s: is not looked at; %s', folder / name, f'{val[0]} is held out' if name in val else f'{train[0]} is')
    return folder / train[0], folder / val[0] if val else None


def _class_names(folder: Path) -> List[str]:
    names = _class_folders(folder)
    if not names:
        raise DataError(f'{folder}: must hold one sub-folder of images for each class, but holds none.')
    if len(names) == 1:
        inner = _class_folders(folder / names[0])
        hint = f' Of the folders in it: give {folder / names[0]} as data.' if len(inner) > 1 else ''
        raise DataError(f'{folder}: holds one class only, {names[0]!r}; at least two are needed.{hint}')
    return names


def _folder_images(folder: Path, class_names: List[str], complete: bool = True) -> Tuple[List[Path], List[int]]:
    numbers = {name: i for i, name in enumerate(class_names)}
    if not complete:
        numbers = {name: numbers[name] for name in _class_folders(folder)}
    images, targets, others = [], [], Counter()
    for name in sorted(numbers):
        found = find_files(folder / name)
        if not found.images:
            raise DataError(f'{folder / name}: holds no images ({", ".join(IMAGE_EXTENSIONS)}).')
        images += map(Path, found.images)
        targets += [numbers[name]] * len(found.images)
        others.update(found.others)
        inner = _folders_within(folder / name, found.images)
        if inner:
            _logger.warning(
                '%s: is taken for one class, but holds folders of images itself: %s', folder / name,
                ', '.join(inner[:5]))
    if not images:
        raise DataError(f'{folder}: holds no images.')
    if others:
        _logger.warning(
            '%s: %d files are left out, for their endings: %s', folder, sum(others.values()),
            ', '.join(f'{n} {ending}' for ending, n in sorted(others.items())))
    return images, targets


def _folders_within(folder: Path, images: Sequence[str]) -> List[str]:
    """Folders that look like classes of their own: the first that have images and lie beside each other."""
    within: Dict[Path, Dict[str, None]] = {}
    for image in images:
        place = folder
        for part in Path(image).relative_to(folder).parts[:-1]:
            within.setdefault(place, {})[part] = None
            place /= part
    for place in sorted(within):
        if len(within[place]) > 1:
            return [(place / name).relative_to(folder).as_posix() for name in sorted(within[place])]
    return []


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
