"""Segmentation from data to results: folders, transforms, a run and its scripts."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import elsa_models  # noqa: F401
from elsa_models.dense.draw import contact_sheet, overlay, palette, with_legend
from elsa_models.dense.shapes import Shapes
from elsa_models.models._checkpoint import WeightsError
from elsa_models.training import DataError, RecipeError, World, load_recipe, run_job

pytest.importorskip('segmentation_models_pytorch')

from elsa_models.dense.segmentation import build_segmenter, load_segmenter, predict_labels  # noqa: E402
from elsa_models.training.jobs.segmentation import (  # noqa: E402
    SegmentationJob,
    SegmentationRecipe,
    train_transform,
)

ROOT = Path(__file__).parents[2]
SMALL = dict(
    size=48, train_images=8, val_images=5, epochs=1, batch_size=4, decoder_args=dict(decoder_channels=16),
    aux_channels=8, crop_size=64, short_sides=(40, 60))
NAMES = ['background', 'circle', 'square', 'triangle']


def _recipe(**kwargs):
    return SegmentationRecipe(**{**SMALL, **kwargs})


def _labels(scene):
    labels = np.zeros((48, 48), np.uint8)
    for mask, label in zip(scene.masks, scene.labels):
        labels[mask] = label + 1
    return labels


@pytest.fixture(params=['plain', 'ade20k'])
def folder(request, tmp_path):
    """Shapes as files, in both layouts; ADE20K's labels are one more, and 0 is none."""
    folder, ade = tmp_path / 'files', request.param == 'ade20k'
    for split, seed in (('training' if ade else 'train', 0), ('validation' if ade else 'val', 1)):
        images, masks = (folder / d / split for d in ('images', 'annotations' if ade else 'masks'))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(4):
            scene = Shapes(4, 48, seed)[i]
            scene.image.save(images / f'{i}.jpg')
            labels = _labels(scene)
            labels = np.where(labels == 3, 255, labels)  # no class
            Image.fromarray(np.where(labels == 255, 0, labels + 1).astype(np.uint8) if ade else labels).save(
                masks / f'{i}.png')
    (folder / 'classes.txt').write_text('background\ncircle\nsquare\n')
    return folder


def test_shapes():
    splits = SegmentationJob.load(_recipe())
    assert splits.class_names == NAMES and len(splits.train) == 8 and len(splits.val) == 5
    image, labels = splits.train.read(3)
    assert np.array_equal(labels, _labels(Shapes(8, 48)[3])) and image.size == (48, 48)
    assert splits.val.read(0)[0].tobytes() != splits.train.read(0)[0].tobytes()
    assert [len(s) for s in SegmentationJob.load(_recipe(limit=6))[:2]] == [6, 5]


def test_folders(folder):
    splits = SegmentationJob.load(_recipe(data=str(folder)))
    assert splits.class_names == NAMES[:3]
    for i in range(4):
        expected = _labels(Shapes(4, 48)[i]).astype(int)
        assert np.array_equal(splits.train.read(i)[1], np.where(expected == 3, 255, expected))
    assert len(SegmentationJob.load(_recipe(data=str(folder), limit=2)).train) == 2


def _first_mask(folder):
    return sorted(folder.glob('*/train*/0.png'))[0]


@pytest.mark.parametrize('content, message', [
    (np.full((48, 48), 9, np.uint8), 'has class'),
    (np.zeros((48, 40), np.uint8), 'is of 40 x 48 pixels'),
    (np.zeros((48, 48, 3), np.uint8), 'one channel'),
    (None, 'cannot be read'),
])
def test_bad_label_maps_are_named(folder, content, message):
    file = _first_mask(folder)
    if content is None:
        file.write_bytes(b'no image')
    else:
        Image.fromarray(content).save(file)
    splits = SegmentationJob.load(_recipe(data=str(folder)))
    with pytest.raises(DataError, match=message):
        splits.train[0]


def test_missing_parts_are_named(folder, tmp_path):
    (folder / 'classes.txt').unlink()
    with pytest.raises(DataError, match='classes.txt'):
        SegmentationJob.load(_recipe(data=str(folder)))
    assert SegmentationJob.load(_recipe(data=str(folder), num_classes=3)).class_names == ['0', '1', '2']
    _first_mask(folder).unlink()
    with pytest.raises(DataError, match='0.png: is missing'):
        SegmentationJob.load(_recipe(data=str(folder), num_classes=3))
    with pytest.raises(DataError, match='data: got'):
        SegmentationJob.load(_recipe(data=str(tmp_path)))


def test_transforms_move_labels_with_the_image():
    recipe = _recipe(photometric=False)
    splits = SegmentationJob.load(recipe)
    splits.train.transform = train_transform(recipe)
    none = []
    for i in range(8):
        scene_image = np.zeros((48, 48, 3), np.uint8)
        labels = _labels(Shapes(8, 48)[i])
        scene_image[..., 0] = labels * 60
        splits.train.read = lambda _, a=scene_image, b=labels: (Image.fromarray(a), b.astype(np.int64))
        image, moved = splits.train[i]
        assert image.shape == (3, 64, 64) and moved.shape == (64, 64) and moved.dtype == torch.int64
        none.append((moved == 255).float().mean().item())
        valid = moved != 255
        agree = ((image[0].float() / 60).round() == moved)[valid].float().mean()
        assert agree > .85 and (image[:, ~valid] == 0).all()
    assert 0. < np.mean(none) < .8


def test_a_run(tmp_path):
    result = run_job(_recipe(output=str(tmp_path)), SegmentationJob)
    assert sorted(p.name for p in result.files) == ['log.csv', 'model', 'predictions.png', 'recipe.yaml']
    assert 0. < result.metrics['val_miou'] <= result.metrics['val_pixel_acc'] <= 100.
    model, config = load_segmenter(result.folder / 'model')
    assert config['class_names'] == NAMES
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    found = predict_labels(model, image, config)
    assert found.shape == (50, 70)
    assert torch.equal(found, predict_labels(result.job.model.eval(), image, config))


def test_a_run_on_files_with_everything(folder, tmp_path):
    result = run_job(_recipe(
        output=str(tmp_path / 'out'), data=str(folder), eval_short_side=64, eval_window=40, eval_scales=(.75, 1.),
        eval_flip=True, ema_decay=.9, decoder='fpn', decoder_args={}, aux_channels=0), SegmentationJob)
    assert result.folder.name == 'files' and result.metrics['val_pixel_acc'] > 0.


def test_an_image_that_cannot_be_read_does_not_count(folder, tmp_path):
    sorted(folder.glob('images/val*/0.jpg'))[0].write_bytes(b'no image')
    job = SegmentationJob(_recipe(data=str(folder)), World(torch.device('cpu')))
    for file in folder.glob('*/val*/0.*'):
        file.unlink()
    others = SegmentationJob(_recipe(data=str(folder)), World(torch.device('cpu')))
    assert len(others.splits.val) == 3
    with torch.no_grad():
        assert job.evaluate(job.model.eval()) == others.evaluate(job.model)


def test_nothing_to_evaluate_is_an_error(folder):
    for file in folder.glob('images/val*/*.jpg'):
        file.write_bytes(b'no image')
    job = SegmentationJob(_recipe(data=str(folder)), World(torch.device('cpu')))
    with torch.no_grad(), pytest.raises(DataError, match='none of the images to evaluate on can be read'):
        job.evaluate(job.model.eval())


def test_repeated_images_do_not_count(monkeypatch):
    job = SegmentationJob(_recipe(), World(torch.device('cpu'), 1, 2))
    monkeypatch.setattr(World, 'gather', lambda self, value: [value])
    totals = []
    monkeypatch.setattr('elsa_models.training.jobs.segmentation.segmentation_metrics', totals.append)
    with torch.no_grad():
        job.evaluate(job.model.eval())
    assert len(job._eval_loader) == 3 and totals[0].sum() == 2 * 48 * 48


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(WeightsError, match='config.json'):
        load_segmenter(tmp_path)
    (tmp_path / 'config.json').write_text('{"task": "object-detection"}')
    with pytest.raises(WeightsError, match='object-detection'):
        load_segmenter(tmp_path)


@pytest.mark.parametrize('values, message', [
    (dict(decoder='none'), 'decoder'), (dict(batch_size=1), 'batch_size'), (dict(short_sides=(90, 60)), 'short_sides'),
    (dict(fsdp=True), 'fsdp'),
    (dict(model_args=dict(patch_size=8)), 'strides'), (dict(decoder_args=dict(no_such=1)), 'decoder_args'),
])
def test_bad_recipes_are_named(values, message):
    with pytest.raises(RecipeError, match=message):
        SegmentationJob(_recipe(**values), World(torch.device('cpu')))


def test_scripts(tmp_path):
    result = run_job(_recipe(output=str(tmp_path)), SegmentationJob)
    for place in ('a', 'b'):
        (tmp_path / place).mkdir()
        Shapes(1, 48)[0].image.resize((60, 40)).save(tmp_path / place / 'x.png')
    Shapes(1, 32)[0].image.save(tmp_path / 'a' / 'y.png')
    os.rename(tmp_path / 'a' / 'y.png', os.fsencode(tmp_path / 'a') + b'/$x^{$\xff.png')
    config = result.folder / 'model' / 'config.json'
    names = ['$x^{$', '\udcff', '\u732b\n', 'triangle']
    config.write_text(json.dumps({**json.loads(config.read_text()), 'class_names': names}))
    command = [
        sys.executable, str(ROOT / 'scripts' / 'predict_segmentation.py'), 'a', 'b', '--model',
        str(result.folder / 'model'), '--output', 'found', '--flip', '--scales', '1', '0.5', '--window', '32',
        '--device', 'cpu']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [
        '$x^{$\udcff.png', '$x^{$\udcff_overlay.png', 'classes.json', 'x-2.png', 'x-2_overlay.png', 'x.png',
        'x_overlay.png']
    assert sorted(p.name for p in (tmp_path / 'found').iterdir()) == written
    assert json.loads((tmp_path / 'found' / 'classes.json').read_text()) == names and '%' in done.stdout
    with Image.open(tmp_path / 'found' / 'x.png') as image:
        assert image.size == (60, 40) and np.asarray(image).max() <= 3


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr('elsa_models.training.jobs.segmentation.contact_sheet', lambda *args: 1 / 0)
    result = run_job(_recipe(output=str(tmp_path)), SegmentationJob)
    assert sorted(p.name for p in result.files) == ['log.csv', 'model', 'recipe.yaml']
    assert 'predictions.png: is not drawn (ZeroDivisionError' in caplog.text


def test_legends_and_headings():
    rows = [[Image.new('RGB', (30, 20), 'red')] * 3] * 2
    sheet = contact_sheet(rows, ('image', 'labelled', 'found'), {1: 'dog', 2: '\u732b\n', 7: 'x' * 900}, side=50)
    assert sheet.width == 160 and sheet.height > 2 * 50 + 2 * 18
    colors = {color for _, color in sheet.getcolors(1 << 16)}
    assert {tuple(c) for c in palette(8)[[1, 2, 7]].tolist()} <= colors
    assert (np.asarray(sheet.convert('L'))[:18] < 100).any()  # the headings
    assert with_legend(Image.new('RGB', (300, 40)), {}).size == (300, 58)


def test_overlays():
    colors = palette(20)
    assert colors[0].tolist() == [0, 0, 0] and len({tuple(c) for c in colors.tolist()}) == 20
    image = Image.new('RGB', (3, 2), (100, 100, 100))
    labels = np.array([[0, 1, 255], [0, 1, 255]])
    mixed = np.asarray(overlay(image, labels, .5))
    assert mixed[0, 2].tolist() == [100] * 3 and mixed[0, 0].tolist() == [50] * 3
    assert mixed[0, 1].tolist() == ((100 + colors[1].astype(int)) // 2).tolist()


@pytest.mark.parametrize('file', sorted((ROOT / 'configs' / 'segmentation').glob('*.yaml')), ids=lambda f: f.stem)
def test_recipes_build(file):
    recipe = load_recipe(file, kind=SegmentationRecipe)
    train_transform(recipe)
    names = NAMES if recipe.data == 'shapes' else [str(i) for i in range(recipe.num_classes)]
    with torch.device('meta'):
        model = build_segmenter({**recipe.__dict__, 'class_names': names})
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    published = {'ade20k_elsa_swin_tiny': 61, 'ade20k_elsa_swin_small': 85}.get(file.stem)
    backbones = {'ade20k_focal_tiny': 28.9, 'ade20k_focal_small': 51.1, 'ade20k_focal_base': 89.8}
    if file.stem == 'folder':
        assert 30 < millions < 61
    elif file.stem in backbones:
        assert 30 < millions - backbones[file.stem] < 34
    else:
        assert abs(millions - published) <= .5 if published else millions < 2


@pytest.mark.slow
@pytest.mark.parametrize('folder', ['ade20k'], indirect=True)
@pytest.mark.parametrize('size', ['tiny', 'small'])
def test_first_step_of_the_authors_recipes(folder, first_step, size):
    (folder / 'classes.txt').unlink()
    small = dict(
        data=str(folder), pretrained=False, batch_size=2, workers=0, crop_size=96, short_sides=(64, 128),
        eval_short_side=96)
    file = ROOT / 'configs' / 'segmentation' / f'ade20k_elsa_swin_{size}.yaml'
    trainer = first_step(load_recipe(file, small, SegmentationRecipe), SegmentationJob)
    assert len(trainer.job.splits.class_names) == 150
