import os
import random
import shutil
from collections import Counter

import pytest
from PIL import Image

from elsa_models.training import (
    DataError,
    Recipe,
    RecipeError,
    create_eval_transform,
    create_train_transform,
    load_splits,
)

DATA_CONFIG = dict(
    input_size=(3, 16, 16), interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1., crop_mode='center')


def _splits(folder, **kwargs):
    return load_splits(Recipe(data=str(folder), **kwargs))


def test_digits_hold_out_a_quarter_of_each_class():
    splits = load_splits(Recipe())
    train, val = Counter(splits.train.targets), Counter(splits.val.targets)
    assert splits.class_names == list('0123456789')
    assert len(splits.train) + len(splits.val) == 1797
    for target in range(10):
        assert abs(val[target] - 0.25 * (train[target] + val[target])) <= 0.5
    images = [image.tobytes() for image in splits.train.images]
    assert splits.train.image(0).size == (8, 8) and splits.train.image(0).mode == 'RGB'
    assert max(max(image) for image in images) == 255


def test_hold_out_is_fixed_by_its_seed_alone():
    paths = [load_splits(Recipe(seed=seed, val_seed=val_seed)).val for seed, val_seed in ((1, 0), (2, 0), (1, 1))]
    content = [[image.tobytes() for image in val.images] for val in paths]
    assert content[0] == content[1] != content[2]


def test_no_image_is_in_both_parts(image_folder):
    splits = _splits(image_folder)
    assert splits.class_names == ['blue', 'red']
    assert len(splits.val) == 4 and Counter(splits.val.targets) == {0: 2, 1: 2}
    assert len(set(splits.train.images) | set(splits.val.images)) == 16
    for image, target in zip(splits.val.images, splits.val.targets, strict=True):
        assert image.parent.name == splits.class_names[target]


def test_limit_is_per_class(image_folder):
    splits = _splits(image_folder, limit=4)
    assert Counter(splits.train.targets + splits.val.targets) == {0: 4, 1: 4}


def test_classes_are_in_natural_order(image_folder):
    for name in ('10', '9'):
        shutil.copytree(image_folder / 'red', image_folder / name)
    assert _splits(image_folder).class_names == ['9', '10', 'blue', 'red']


def test_train_and_val_folders(image_folder, tmp_path):
    folder = tmp_path / 'parts'
    shutil.copytree(image_folder, folder / 'train')
    shutil.copytree(image_folder / 'red', folder / 'val' / 'red')
    splits = _splits(folder)
    assert (len(splits.train), len(splits.val)) == (16, 8)
    assert splits.class_names == ['blue', 'red'] and set(splits.val.targets) == {1}
    assert len(_splits(folder, limit=3).val) == 3

    shutil.copytree(image_folder / 'red', folder / 'val' / 'green')
    with pytest.raises(DataError, match='green'):
        _splits(folder)
    shutil.rmtree(folder / 'val')
    with pytest.raises(DataError, match="none named 'val'"):
        _splits(folder)


@pytest.mark.parametrize('train', ['train', 'Training'])
@pytest.mark.parametrize('val', ['val', 'valid', 'validation', 'TEST'])
def test_usual_names_of_parts(image_folder, tmp_path, train, val, caplog):
    folder = tmp_path / 'parts'
    shutil.copytree(image_folder, folder / train)
    shutil.copytree(image_folder / 'red', folder / val / 'red')
    caplog.set_level('INFO')
    splits = _splits(folder)
    assert splits.class_names == ['blue', 'red'] and (len(splits.train), len(splits.val)) == (16, 8)
    assert '2 classes, images to train on + held out: blue 8 + 0, red 8 + 8' in caplog.text
    assert splits.train.names[0] == 'blue/0.png'
    shutil.copytree(image_folder, folder / 'Testing')
    assert len(_splits(folder).val) == 8
    assert 'Testing: is not looked at' in caplog.text


def test_what_is_left_out_and_what_looks_odd_is_said(image_folder, caplog):
    for name in ('a', 'b'):
        shutil.copytree(image_folder / 'red', image_folder / 'nested' / name)
    Image.new('P', (9, 9)).save(image_folder / 'red' / 'x.GIF')
    for name in ('x.heic', 'y.heic', 'Thumbs.db', 'README'):
        (image_folder / 'red' / name).write_text('x')
    splits = _splits(image_folder)
    assert len(splits.train) + len(splits.val) == 33  # with the GIF
    assert 'nested: is taken for one class, but holds folders of images itself: a, b' in caplog.text
    assert '4 files are left out, for their endings: 1 .db, 2 .heic, 1 without ending' in caplog.text


@pytest.mark.parametrize('others, said', [
    (['mine/red', 'mine/blue'], 'mine/blue, mine/red'),  # deeper
    (['red', 'blue', '.'], 'blue, red'),  # beside images
    (['images'], None),  # as of Tiny ImageNet
])
def test_class_like_folders_in_a_class_are_named(image_folder, caplog, others, said):
    for other in others:
        shutil.copytree(image_folder / 'red', image_folder / 'nested' / other, dirs_exist_ok=True)
    _splits(image_folder)
    found = 'nested: is taken for one class, but holds folders of images itself: '
    assert f'{found}{said}\n' in caplog.text if said else found not in caplog.text


def test_folder_above_the_classes_is_told_from_a_class(image_folder):
    with pytest.raises(DataError, match=r"one class only, 'pictures'.*give .*pictures as data"):
        _splits(image_folder.parent)


def test_names_that_are_no_text(image_folder):
    try:
        os.rename(image_folder / 'red', os.fsencode(image_folder) + b'/r\xffd')
    except OSError:
        pytest.skip('this file system has none')
    (image_folder / 'blue').rename(image_folder / 'bl\nue')
    splits = _splits(image_folder)
    assert splits.class_names == ['bl\\nue', 'r\\udcffd']
    assert splits.train[0][0].mode == 'RGB'


def test_hidden_and_foreign_files_are_passed_over(image_folder):
    (image_folder / '.cache').mkdir()
    (image_folder / 'notes.txt').write_text('x')
    (image_folder / 'red' / 'notes.txt').write_text('x')
    (image_folder / 'red' / '._0.png').write_text('x')
    splits = _splits(image_folder)
    assert splits.class_names == ['blue', 'red'] and len(splits.train) + len(splits.val) == 16


def test_missing_empty_and_single_class_folders(image_folder, tmp_path):
    with pytest.raises(DataError, match='absent'):
        _splits(tmp_path / 'absent')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DataError, match='empty: must hold one sub-folder'):
        _splits(tmp_path / 'empty')
    (image_folder / 'void').mkdir()
    with pytest.raises(DataError, match='void: holds no images'):
        _splits(image_folder)
    shutil.rmtree(image_folder / 'void')
    shutil.rmtree(image_folder / 'red')
    with pytest.raises(DataError, match="one class only, 'blue'"):
        _splits(image_folder)


def test_class_of_one_image_is_named(image_folder):
    (image_folder / 'lonely').mkdir()
    shutil.copy(image_folder / 'red' / '0.png', image_folder / 'lonely')
    with pytest.raises(DataError, match="'lonely': has one image"):
        _splits(image_folder)


@pytest.mark.parametrize('content', [b'', b'no image', 'truncated'])
def test_broken_image_is_named_when_it_is_read(image_folder, content):
    broken = image_folder / 'red' / 'broken.png'
    if content == 'truncated':
        Image.effect_noise((64, 64), 50.).save(broken)
        content = broken.read_bytes()[:-2000]
    broken.write_bytes(content)
    splits = _splits(image_folder)
    part = splits.train if broken in splits.train.images else splits.val
    with pytest.raises(DataError, match=r'broken\.png: cannot be read as an image'):
        part[part.images.index(broken)]


def test_truncated_jpeg_is_named_when_it_is_read(image_folder):
    # its header is fine, and a JPEG has no checksums
    broken = image_folder / 'red' / 'broken.jpg'
    Image.effect_noise((256, 256), 50.).save(broken)
    broken.write_bytes(broken.read_bytes()[:-5000])
    splits = _splits(image_folder)
    part = splits.train if broken in splits.train.images else splits.val
    with pytest.raises(DataError, match=r'broken\.jpg: cannot be read as an image'):
        part[part.images.index(broken)]


def test_images_are_upright(tmp_path, image_folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = image_folder / 'red' / '0.png'
    Image.new('L', (30, 10)).save(path, exif=exif)
    splits = _splits(image_folder)
    part = splits.train if path in splits.train.images else splits.val
    assert part.image(part.images.index(path)).size == (10, 30)


def test_transforms_give_bytes(image_folder):
    recipe = Recipe(data=str(image_folder), color_jitter=0.)
    splits = load_splits(recipe)
    for transform in (create_train_transform(recipe, DATA_CONFIG), create_eval_transform(DATA_CONFIG)):
        for i, target in enumerate(splits.train.targets):
            image = transform(splits.train.image(i))
            assert image.shape == (3, 16, 16) and str(image.dtype).endswith('uint8')
            # a blue image has nothing in its red channel
            red, blue = image[0].max(), image[2].max()
            full, empty = (blue, red) if splits.class_names[target] == 'blue' else (red, blue)
            assert full > 0 and empty == 0


@pytest.mark.parametrize('auto_augment', ['rand-m10-inc1', 'v0', 'augmix-m10', '3a'])
def test_augmentation_of_any_strength(auto_augment):
    # Pillow refuses to posterize to no bits, which timm asks for
    random.seed(0)
    transform = create_train_transform(Recipe(auto_augment=auto_augment), DATA_CONFIG)
    for _ in range(100):
        assert transform(Image.effect_noise((20, 20), 50.).convert('RGB')).shape == (3, 16, 16)


def _factory(name, folder, **kwargs):
    return load_splits(Recipe(data=name, data_dir=str(folder), **kwargs))


def test_torchvision_data_set(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / 'parts' / 'train')
    shutil.copytree(image_folder / 'red', tmp_path / 'parts' / 'val' / 'red')
    splits = _factory('torch/folder', tmp_path / 'parts', val_split='val')
    assert splits.class_names == ['blue', 'red'] and (len(splits.train), len(splits.val)) == (16, 8)
    splits.set_mode('L')
    assert splits.train.image(0).mode == 'L' and splits.train[15][1] == 1
    assert splits.class_counts().tolist() == [8, 8]


def test_hugging_face_data_set(image_folder, tmp_path):
    pytest.importorskip('datasets')
    shutil.copytree(image_folder, tmp_path / 'parts' / 'train')
    shutil.copytree(image_folder, tmp_path / 'parts' / 'test')
    splits = _factory(f'hfds/{tmp_path / "parts"}', tmp_path / 'cache', val_split='test')
    assert splits.class_names == ['blue', 'red'] and (len(splits.train), len(splits.val)) == (16, 16)
    red, blue = splits.train.image(0).getpixel((5, 5))[::2]
    assert (splits.class_names[splits.train[0][1]] == 'red') == (red > blue)
    with pytest.raises(RecipeError, match='class_balance'):
        splits.class_counts()


def test_web_data_set(shards):
    with pytest.raises(RecipeError, match='num_classes: .* does not say how many'):
        _factory('wds/shards', shards)
    splits = _factory('wds/shards', shards, num_classes=2)
    assert splits.is_stream and len(splits.val) == 8
    splits.set_mode('L')
    image, target = next(iter(splits.val))
    assert image.mode == 'L' and target in (0, 1)


@pytest.mark.parametrize('name', ['torch/no_such_set', 'hfds/no/such/folder', 'wds/nothing'])
def test_data_set_that_cannot_be_opened_is_named(tmp_path, name):
    with pytest.raises(DataError, match=f'{name}.*cannot be opened'):
        _factory(name, tmp_path)
