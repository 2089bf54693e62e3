"""The parts of a study's data have no group in common."""
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from elsa_models._images import DataError
from elsa_models.study.data import ARTISTS, Item, load_emoji, prepare, split
from elsa_models.study.emoji import unpack
from elsa_models.study.grid import Settings
from elsa_models.training.config import ImageValues
from elsa_models.training.data import load_splits

MIXERS = dict(mixers={'window_bias': None}, lrs=[.1])


def pixels(part):
    return [part.image(i).tobytes() for i in range(len(part))]


def write_folder(folder, number=10):
    for c in 'ab':
        (folder / c).mkdir(parents=True)
        for i in range(number):
            Image.new('RGB', (8, 8), (i, 0, 100 * (c == 'a'))).save(folder / c / f'{i}.png')
    return str(folder)


def test_parts_of_a_folder(tmp_path):
    settings = Settings(data=write_folder(tmp_path / 'images'), test_fraction=.4, **MIXERS)
    parts = prepare(settings, tmp_path / 'parts')
    found = {}
    for phase, folder in parts.folders.items():
        for kind, part in (('train', 'train'), ('val', 'val')):
            files = [p for p in (folder / part).glob('*/*')]
            found[phase, kind] = {p.read_bytes() for p in files}
            assert len(found[phase, kind]) == len(files)
    tune, val, train, test = (found[k] for k in (
        ('tune', 'train'), ('tune', 'val'), ('test', 'train'), ('test', 'val')))
    assert not train & test and not tune & val and tune | val == train
    assert [len(x) for x in (tune, val, test)] == [8, 4, 8]  # of each class alike
    assert prepare(settings, tmp_path / 'parts') == parts  # what is there
    assert prepare(settings, tmp_path / 'again').digest == parts.digest
    other = Settings(data=settings.data, test_fraction=.4, split_seed=1, **MIXERS)
    assert prepare(other, tmp_path / 'parts').digest != parts.digest


def test_groups_stay_together():
    items = [Item(Path(f'{g}{i}'), 'ab'[g % 2], f'g{g}') for g in range(20) for i in range(2)]
    test, val = split(items, .3, .25, 0)
    assert len(test) == 6 and len(val) == 4 and not test & val
    assert sum(int(g[1:]) % 2 for g in test) == 3
    assert split(items, .3, .25, 1) != (test, val)
    assert split(items[::-1], .3, .25, 0) == (test, val)
    with pytest.raises(DataError, match="class 'a': has 2 images"):
        split(items[:2] * 2 + items[4:6], .3, .25, 0)


@pytest.fixture
def emoji(tmp_path):
    """A package as npm has it, of twelve emoji in two classes and one component, unpacked."""
    entries = [dict(image=f'{i:x}.png', category='Animals & Nature' if i % 2 else 'Flags') for i in range(12)]
    entries.append(dict(image='ff.png', category='Component'))
    (tmp_path / 'emoji').mkdir()
    for number, artist in enumerate(ARTISTS):
        with tarfile.open(tmp_path / f'{artist}.tgz', 'w:gz') as archive:
            def add(name, data, archive=archive):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

            add('package/emoji.json', json.dumps(entries).encode())
            add('package/img/sheet.png', b'')
            for i, entry in enumerate(entries):
                file = io.BytesIO()
                Image.new('RGBA', (64, 64), (i, 100 * number, 0, 255 if i else 0)).save(file, 'png')
                add(f'package/img/{artist}/64/{entry["image"]}', file.getvalue())
        unpack(tmp_path / f'{artist}.tgz', artist, tmp_path / 'emoji')
    return tmp_path / 'emoji'


def test_emoji(emoji, tmp_path):
    items = load_emoji(emoji)
    assert len(items) == 24 and {x.class_name for x in items} == {'Animals_and_Nature', 'Flags'}
    assert items[0].image.getpixel((0, 0)) == (255, 255, 255)  # transparent
    emojis = {}
    for data in ('emoji', 'emoji_artists'):
        settings = Settings(data=data, source=str(emoji), test_fraction=.3, **MIXERS)
        folders = prepare(settings, tmp_path / 'parts').folders
        splits = load_splits(ImageValues(data=str(folders['test'])))
        train, test = ({x[:2] for x in pixels(part)} for part in (splits.train, splits.val))  # emoji and artist
        assert not {x[:1] for x in train} & {x[:1] for x in test}
        assert {x[1] for x in train} - {255} == ({0} if data == 'emoji_artists' else {0, 100})
        assert {x[1] for x in test} - {255} == ({100} if data == 'emoji_artists' else {0, 100})
        emojis[data] = {x[:1] for x in test}
    assert emojis['emoji'] == emojis['emoji_artists']
    with pytest.raises(DataError, match='get_emoji'):
        load_emoji(tmp_path / 'nowhere')
    with pytest.raises(DataError, match='SHA-256'):
        unpack(tmp_path / 'google.tgz', 'google', tmp_path, '0' * 64)


def test_shapes(tmp_path):
    settings = Settings(
        data='shapes', job='segmentation', train_images=4, val_images=2, test_images=3, **MIXERS)
    folders = prepare(settings, tmp_path).folders
    images = {
        (phase, part): [p.read_bytes() for p in sorted((folder / 'images' / part).glob('*'))]
        for phase, folder in folders.items() for part in ('train', 'val')}
    assert [len(x) for x in images.values()] == [4, 2, 4, 3]
    assert images['tune', 'train'] == images['test', 'train']
    assert len({x for part in images.values() for x in part}) == 4 + 2 + 3
