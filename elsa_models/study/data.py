"""The parts of a study's data, as folders: to choose learning rates by, and to compare.

`tune/train` and `tune/val` are drawn from what may be learnt from; `test/train` is all of that, `test/val` the images
of the comparison. These are the folders of an ordinary run, for which what is held out is called val.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
from PIL import Image

from .._files import move_into_place, recover, temporary_folder
from .._images import DataError
from ..dense.label_maps import LabelMaps
from ..dense.shapes import CLASSES, Shapes
from ..training.config import ImageValues
from ..training.data import load_splits
from .grid import TEST, TUNE, Settings

_DIGEST = 'digest.txt'
ARTISTS = ('google', 'twitter')


class Parts(NamedTuple):
    """Folders by phase, and the digest of what is in them."""
    folders: Dict[str, Path]
    digest: str


class Item(NamedTuple):
    """An image of a class; those of one group come into the same part."""
    image: Union[Path, Image.Image]
    class_name: str
    group: str
    artist: str = ''


def prepare(settings: Settings, root: Path) -> Parts:
    """Make the folders of a study, where they are not there yet.

    Args:
        settings: Of the study.
        root: Folder that holds those of all studies.

    Raises:
        DataError: The images are not there, or too few of a class.
    """
    names = ['data', 'split_seed']
    names += ['train_images', 'val_images', 'test_images'] if settings.data == 'shapes' else [
        'test_fraction', 'val_fraction']
    values = {name: getattr(settings, name) for name in names}
    if settings.job == 'segmentation' and settings.data != 'shapes':
        raise DataError("data: must be 'shapes' for segmentation.")
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f'{Path(settings.data).name}-{key}'
    root.mkdir(parents=True, exist_ok=True)
    recover(folder)
    if not (folder / _DIGEST).is_file():
        with temporary_folder(folder) as temporary:
            if settings.data == 'shapes':
                digest = _draw_shapes(settings, temporary)
            else:
                digest = _write_images(_load_items(settings), settings, temporary)
            (temporary / _DIGEST).write_text(digest, encoding='utf-8')
            if not folder.exists():  # another process may have been quicker
                move_into_place(temporary, folder)
    return Parts({phase: folder / phase for phase in (TUNE, TEST)}, (folder / _DIGEST).read_text(encoding='utf-8'))


def split(
        items: Sequence[Item],
        test_fraction: float,
        val_fraction: float,
        seed: int,
) -> Tuple[Set[str], Set[str]]:
    """Draw groups of every class to test on, and groups of the rest to choose by.

    Args:
        items: All images.
        test_fraction: Part of each class's groups.
        val_fraction: Part of those that are left.
        seed: Draws them.

    Raises:
        DataError: A class has fewer than three groups.
    """
    groups: Dict[str, Dict[str, None]] = {}
    for item in items:
        groups.setdefault(item.class_name, {})[item.group] = None
    generator = torch.Generator().manual_seed(seed)
    test: Set[str] = set()
    val: Set[str] = set()
    for name in sorted(groups):
        names = sorted(groups[name])
        if len(names) < 3:
            raise DataError(f'class {name!r}: has {len(names)} images, but needs one to train on, one to choose by and'
                            ' one to test on.')
        names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        size = min(max(1, round(test_fraction * len(names))), len(names) - 2)
        rest = len(names) - size
        test.update(names[:size])
        val.update(names[size:size + min(max(1, round(val_fraction * rest)), rest - 1)])
    return test, val


def _load_items(settings: Settings) -> List[Item]:
    if settings.data in ('emoji', 'emoji_artists'):
        return load_emoji(Path(settings.source))
    splits = load_splits(ImageValues(data=settings.data))
    images = splits.part('all')
    return [
        Item(image, splits.class_names[target], name)
        for image, target, name in zip(images.images, images.targets, images.names)]


def load_emoji(source: Path) -> List[Item]:
    """The emoji that scripts/get_emoji.py has fetched: both artists' pictures, in nine classes.

    Raises:
        DataError: They are not there.
    """
    try:
        entries = json.loads((source / 'emoji.json').read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise DataError(f'{source}: holds no emoji ({e}). scripts/get_emoji.py fetches them.') from e
    items = []
    for entry in entries:
        if entry['category'] == 'Component':
            continue
        files = [source / artist / entry['image'] for artist in ARTISTS]
        if all(file.is_file() for file in files):
            group, name = Path(entry['image']).stem, entry['category'].replace(' & ', '_and_').replace(' ', '_')
            items += [Item(_on_white(file), name, group, artist) for file, artist in zip(files, ARTISTS)]
    if not items:
        raise DataError(f'{source}: holds no pictures of both artists. scripts/get_emoji.py fetches them.')
    return items


def _on_white(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        picture = opened.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture).convert('RGB')


def _write_images(items: List[Item], settings: Settings, folder: Path) -> str:
    """Write the parts, and return the digest of all images in them."""
    test, val = split(items, settings.test_fraction, settings.val_fraction, settings.split_seed)
    learnt: Optional[str] = None
    tested: Optional[str] = None
    if settings.data == 'emoji_artists':
        learnt, tested = ARTISTS
    digest = hashlib.sha256()
    for number, item in enumerate(items):
        if item.group in test:
            parts = ['test/val'] if tested in (None, item.artist) else []
        elif learnt in (None, item.artist):
            parts = ['test/train', 'tune/val' if item.group in val else 'tune/train']
        else:
            parts = []
        name = f'{number:06d}.png' if isinstance(item.image, Image.Image) else f'{number:06d}{item.image.suffix}'
        for part in parts:
            path = folder / part / item.class_name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            digest.update(f'{part}/{item.class_name}/{name}\n'.encode())
            digest.update(_write(item.image, path))
    return digest.hexdigest()[:12]


def _write(image: Union[Path, Image.Image], path: Path) -> bytes:
    """Write an image, and return what it consists of: pixels, or bytes of a file."""
    if isinstance(image, Image.Image):
        image.save(path)
        return f'{image.mode}{image.size}'.encode() + image.tobytes()
    try:
        os.link(image, path)
    except OSError:  # another file system
        shutil.copyfile(image, path)
    return image.read_bytes()


def _draw_shapes(settings: Settings, folder: Path) -> str:
    """Draw scenes and their label maps. Data sets of other seeds share no scene."""
    digest = hashlib.sha256()
    first = 3 * settings.split_seed
    sizes = (settings.train_images, settings.val_images, settings.test_images)
    for seed, (size, parts) in enumerate(zip(sizes, (('tune/train', 'test/train'), ('tune/val',), ('test/val',)))):
        scenes = LabelMaps(Shapes(size, seed=first + seed), 1 + len(CLASSES))
        for i in range(size):
            image, labels = scenes.read(i)
            digest.update(image.tobytes() + labels.tobytes())
            for part in parts:
                phase, part = part.split('/')
                for kind, picture in (('images', image), ('masks', Image.fromarray(labels.astype('uint8')))):
                    path = folder / phase / kind / part / f'{i:06d}.png'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(path)
    for phase in (TUNE, TEST):
        (folder / phase / 'classes.txt').write_text('\n'.join(['background', *CLASSES]) + '\n', encoding='utf-8')
    return digest.hexdigest()[:12]
