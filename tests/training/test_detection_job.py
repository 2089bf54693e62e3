"""Detection from data to results: COCO's format, transforms, AP, a run and its scripts."""
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
from elsa_models.dense.shapes import Shapes, boxes_of
from elsa_models.models._checkpoint import read_checkpoint
from elsa_models.models._naming import ModelError, find_model
from elsa_models.training import ClassificationJob, DataError, Recipe, RecipeError, World, load_recipe, run_job

pytest.importorskip('pycocotools')

from elsa_models.dense.coco import ObjectImages, average_precision, to_coco  # noqa: E402
from elsa_models.dense.detection import detect, load_detector  # noqa: E402
from elsa_models.training.jobs.dense import create_backbone, model_config  # noqa: E402
from elsa_models.training.jobs.detection import (  # noqa: E402
    DetectionJob,
    DetectionRecipe,
    RandomRangeCrop,
    train_transform,
)

ROOT = Path(__file__).parents[2]
SMALL = dict(
    size=48, train_images=8, val_images=5, epochs=1, batch_size=2, fpn_channels=16, head_channels=32,
    anchor_sizes=(8, 16, 24, 32, 48), short_sides=(48, 56), eval_short_side=48, max_side=100,
    detector_args=dict(box_batch_size_per_image=16, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=30))


def _recipe(**kwargs):
    return DetectionRecipe(**{**SMALL, **kwargs})


def _objects(recipe):
    return DetectionJob.load(recipe)


def _box(mask):
    left, top, right, bottom = boxes_of(mask[None])[0].tolist()
    return [left, top, right - left, bottom - top]


@pytest.fixture
def coco(tmp_path):
    """Shapes as a data set in COCO's format, with category numbers that leave gaps."""
    folder = tmp_path / 'coco'
    (folder / 'annotations').mkdir(parents=True)
    for split, seed in (('train2017', 0), ('val2017', 1)):
        (folder / split).mkdir()
        images, annotations = [], []
        for i, scene in enumerate(Shapes(4, 48, seed)[j] for j in range(4)):
            scene.image.save(folder / split / f'{i}.png')
            images.append(dict(id=10 + i, file_name=f'{i}.png', height=48, width=48))
            for mask, label in zip(scene.masks, scene.labels.tolist()):
                counts, last = [0], 0
                for v in mask.T.ravel().astype(int):  # uncompressed run lengths, column by column
                    if v != last:
                        counts.append(0)
                        last = v
                    counts[-1] += 1
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=10 + i, category_id=(3, 7, 90)[label], iscrowd=0,
                    area=int(mask.sum()), bbox=_box(mask), segmentation=dict(size=[48, 48], counts=counts)))
        categories = [dict(id=i, name=n) for i, n in ((3, 'circle'), (7, 'square'), (90, 'triangle'))]
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return folder


def _change(coco, change, split='train2017'):
    file = coco / 'annotations' / f'instances_{split}.json'
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_coco_folder(coco):
    train, val = _objects(_recipe(data=str(coco)))
    assert train.class_names == ['circle', 'square', 'triangle'] and train.category_ids == [3, 7, 90]
    for i in range(4):
        scene, found = Shapes(4, 48)[i], train.read(i)
        assert np.array_equal(found.masks.astype(bool), scene.masks)
        assert np.array_equal(found.labels, scene.labels + 1)
        assert np.array_equal(found.boxes, boxes_of(scene.masks))
    assert val.image_ids == [10, 11, 12, 13]


def test_crowds_and_what_is_outside_are_left_out(coco):
    def change(content):
        first = content['annotations'][0]
        content['annotations'] = [
            dict(first, id=1, bbox=[-5, 40, 20, 30]), dict(first, id=2, bbox=[60, 5, 10, 10]),
            dict(first, id=3, iscrowd=1)]
        for a in content['annotations']:
            a['image_id'] = 10
    _change(coco, change)
    train, _ = _objects(_recipe(data=str(coco)))
    assert train.read(0).boxes.tolist() == [[0, 40, 15, 48]]
    empty = train[1][1]
    assert empty['boxes'].shape == (0, 4) and empty['labels'].shape == (0,) and empty['masks'].shape == (0, 48, 48)
    train.skip_empty()
    assert train.image_ids == [10]


@pytest.mark.parametrize('change, message', [
    (lambda c: c['images'][0].update(width=50), 'is of 48 x 48 pixels, its annotations of 50 x 48'),
    (lambda c: c['images'][0].update(file_name='gone.png'), 'gone.png'),
])
def test_images_that_are_not_as_annotated(coco, change, message):
    _change(coco, lambda c: [c.update(annotations=c['annotations'][-1:]), change(c)])
    train, _ = _objects(_recipe(data=str(coco)))
    with pytest.raises((DataError, OSError), match=message):
        train[0]


def _first(key):
    return lambda **values: lambda c: c[key][0].update(values)


_annotation, _image = _first('annotations'), _first('images')


@pytest.mark.parametrize('change, message', [
    (_annotation(category_id=4), 'annotation 1 has an unlisted category 4'),
    (_annotation(category_id=[3]), 'annotation 1 has an unlisted category'),
    (_annotation(image_id=99), 'annotation 1 has an unlisted image 99'),
    (_annotation(segmentation=dict(size=[48, 47], counts=[9, 48 * 47 - 9])), 'annotation 1 has a mask of size'),
    (_annotation(segmentation=dict(size=[48, 48], counts=[9])), 'run lengths add up to 9, must be 2304'),
    (_annotation(segmentation=dict(size=[48, 48], counts=[2305, -1])), 'run lengths are no whole numbers'),
    (_annotation(segmentation=dict(size=[48, 48], counts='0' * 9)), 'run lengths add up to 0'),
    (_annotation(segmentation=dict(size=[48, 48], counts='\u00ff\u0100')), 'run lengths cannot be read'),
    (_annotation(segmentation=dict(size=[48, 48])), 'run lengths are no'),
    (_annotation(segmentation=[[0, 0, 1e9, 0, 5, 5]]), 'no list of polygons'),
    (_annotation(segmentation=[[0, 0, 1e6, 0, 5, 5]]), 'far beyond the image'),
    (_annotation(segmentation=[[0, 0, 5, 5]]), 'no list of polygons'),
    (_annotation(segmentation=[[0, 0, 5, '5', 1, 1]]), 'no list of polygons'),
    (_annotation(segmentation='mask'), 'a mask of type str'),
    (_annotation(segmentation=None), 'annotation 1 has no mask'),
    (_annotation(bbox=[0, 0, float('nan'), 5]), 'has bbox'),
    (_annotation(bbox=[0, 0, float('inf'), 5]), 'has bbox'),
    (_annotation(bbox=[0, 0, 5]), 'has bbox'),
    (_annotation(bbox=[0, 0, -5, 5]), 'has bbox'),
    (_annotation(bbox={}), 'has bbox'),
    (_annotation(iscrowd='0'), 'has iscrowd'),
    (_annotation(area='9'), 'has area'),
    (_annotation(area=float('inf')), 'has area'),
    (_annotation(id='1'), "annotation at place 0 has id '1'"),
    (_annotation(id=2), 'annotation 2 is there twice'),
    (_image(id=11), 'image 11 is there twice'),
    (_image(file_name='../x.png'), 'leaves the folder'), (_image(file_name='/etc/x.png'), 'leaves the folder'),
    (_image(file_name=None), 'image 10 has file_name None'), (_image(height=None), 'image 10 has height None'),
    (_image(width='48'), "image 10 has width '48'"), (_image(width=0), 'image 10 has width 0'),
    (lambda c: c['categories'][0].pop('name'), 'category 3 has no name'),
    (lambda c: c.update(annotations={}), 'annotations must be a list'),
    (lambda c: c['images'].append(3), 'images must be a list of objects'),
])
def test_bad_annotations_are_named_when_they_are_opened(coco, change, message):
    _change(coco, change)
    with pytest.raises(DataError, match=rf'instances_train2017\.json: .*{message}'):
        _objects(_recipe(data=str(coco)))


def test_what_exporters_leave_out_is_filled_in(coco):
    def change(content):
        for annotation in content['annotations']:
            del annotation['area'], annotation['iscrowd']

    _change(coco, change)
    train = _objects(_recipe(data=str(coco)))[0]
    annotations = train.ground_truth().dataset['annotations']
    areas = [mask.sum() for i in range(4) for mask in train.read(i).masks]
    assert [a['area'] for a in annotations] == areas and not any(a['iscrowd'] for a in annotations)


def test_code_of_run_lengths_is_that_of_pycocotools():
    from pycocotools import mask

    from elsa_models.dense.coco_format import _decode_counts
    rng = np.random.default_rng(0)
    for p in (0., 0.01, 0.5, 1.):
        x = np.asfortranarray(rng.random((97, 131)) < p).astype(np.uint8)
        counts = _decode_counts(mask.encode(x)['counts'].decode())
        assert sum(counts) == x.size and sum(counts[1::2]) == x.sum()


@pytest.mark.parametrize('change, message', [
    (lambda c: c.update(categories=[]), 'lists no categories'),
    (lambda c: c['categories'][0].update(name='ring'), 'other categories'),
    (lambda c: c.update(images=[], annotations=[]), 'no images to train on'),
    (lambda c: c.pop('images'), 'unlisted image|cannot be read'),
])
def test_bad_data_sets_are_named(coco, change, message):
    _change(coco, change)
    with pytest.raises(DataError, match=message):
        _objects(_recipe(data=str(coco)))


def test_files_that_are_no_annotations(coco, tmp_path):
    (coco / 'annotations' / 'instances_val2017.json').write_text('[1')
    with pytest.raises(DataError, match='instances_val2017.json: cannot be read'):
        _objects(_recipe(data=str(coco)))
    with pytest.raises(DataError, match='data: got'):
        _objects(_recipe(data=str(tmp_path / 'nowhere')))


def test_boxes_without_masks_are_for_a_retinanet(coco, tmp_path):
    def change(content):
        for annotation in content['annotations']:
            del annotation['segmentation']

    boxes = [_objects(_recipe(data=str(coco)))[0].read(i).boxes for i in range(4)]
    for split in ('train2017', 'val2017'):
        _change(coco, change, split)
    with pytest.raises(DataError, match='annotation 1 has no mask'):
        _objects(_recipe(data=str(coco)))
    recipe = _recipe(data=str(coco), detector='retinanet', detector_args={}, output=str(tmp_path / 'output'))
    images = _objects(recipe)[0]
    for i, expected in enumerate(boxes):
        found = images.read(i)
        np.testing.assert_array_equal(found.boxes, expected)
        np.testing.assert_array_equal(boxes_of(found.masks), expected)  # of whole pixels here
    assert run_job(recipe, DetectionJob).metrics['val_images'] == 4


@pytest.mark.parametrize('crop', [0., 1.])
def test_transforms_move_boxes_and_masks_with_the_image(crop):
    recipe = _recipe(crop_prob=crop, crop_short_sides=(60, 70), crop_range=(30, 40), short_sides=(40, 50, 90))
    images = ObjectImages(Shapes(30, 48))
    images.transform = train_transform(recipe)
    sizes, worst = set(), []
    for i in range(30):
        image, target = images[i]
        H, W = image.shape[1:]
        sizes.add((H, W))
        assert target['masks'].shape == (len(target['labels']), H, W) and image.dtype == torch.uint8
        for box, mask in zip(target['boxes'], target['masks'].numpy()):
            assert 0 <= box[0] < box[2] <= W and 0 <= box[1] < box[3] <= H
            if mask.any():
                worst.append(np.abs(boxes_of(mask[None])[0] - box.numpy()).max())
    assert len(sizes) > (5 if crop else 2)
    assert crop or np.median(worst) < 2  # a crop cuts masks, whose boxes keep what they cover


def test_crops_stay_within_their_range():
    crop = RandomRangeCrop(20, 30)
    shapes = [crop(torch.zeros(3, 64, 25)).shape for _ in range(50)]
    assert {s[1] for s in shapes} <= set(range(20, 31)) and {s[2] for s in shapes} <= set(range(20, 26))
    assert len({s[1] for s in shapes}) > 5 and max(s[2] for s in shapes) == 25


def test_perfect_detections_have_an_ap_of_100_and_worse_ones_less():
    images = ObjectImages(Shapes(12, 48))
    results, shifted = [], []
    for i in range(12):
        found = images.read(i)
        boxes = torch.from_numpy(found.boxes)
        perfect = dict(
            boxes=boxes, labels=torch.from_numpy(found.labels), scores=torch.ones(len(found.boxes)),
            masks=torch.from_numpy(found.masks)[:, None].float())
        results += to_coco(perfect, i, images.category_ids)
        side = (boxes[:, 2:] - boxes[:, :2]).mean(1, keepdim=True)
        shifted += to_coco(dict(perfect, boxes=boxes + .12 * side), i, images.category_ids)
    truth = images.ground_truth()
    for kind in ('bbox', 'segm'):
        assert average_precision(truth, results, images.image_ids, kind)['ap'] == pytest.approx(100)
    worse = average_precision(truth, shifted, images.image_ids, 'bbox')
    assert worse['ap50'] > 90 > worse['ap75']
    assert average_precision(truth, results[:-5], images.image_ids, 'bbox')['ap50'] < 100
    assert average_precision(truth, [], images.image_ids, 'bbox')['ap'] == 0.


@pytest.mark.parametrize('detector', ['mask_rcnn', 'cascade_mask_rcnn', 'retinanet'])
def test_a_run(tmp_path, detector):
    args = SMALL['detector_args'] if detector != 'retinanet' else {}
    result = run_job(_recipe(output=str(tmp_path), detector=detector, detector_args=args), DetectionJob)
    assert sorted(p.name for p in result.files) == ['log.csv', 'model', 'predictions.png', 'recipe.yaml']
    assert result.metrics['val_images'] == 5 and 0. <= result.metrics['val_box_ap'] <= 100.
    assert ('val_mask_ap' in result.metrics) == (detector != 'retinanet')
    model, config = load_detector(result.folder / 'model')
    assert config['class_names'] == ['circle', 'square', 'triangle']
    image = Shapes(1, 48)[0].image
    a, b = detect(model, image, 0.), detect(result.job.model.eval(), image, 0.)
    assert all(torch.equal(a[k], b[k]) for k in a)
    names = ['', 'local-dir:', 'model/model.safetensors', 'checkpoints/best.pt']
    for prefix, _, path in (name.rpartition(':') for name in names):
        same = load_detector(f'{prefix}:{result.folder / path}' if prefix else result.folder / path)[0].state_dict()
        assert all(torch.equal(x, same[k]) for k, x in model.state_dict().items())
    for path in ('', 'checkpoints/best.pt'):
        with pytest.raises(ModelError, match="a model for 'object-detection', must be a classifier"):
            find_model(result.folder / path)


def test_backbone_from_a_run_is_saved_without_it(tmp_path):
    small = dict(output=str(tmp_path), epochs=1, limit=4, batch_size=16, onnx=False, figures=False)
    first = run_job(Recipe(**small, model_args=dict(img_size=32, kernel_size=3)), ClassificationJob).folder
    weights = read_checkpoint(first / 'model' / 'model.safetensors')
    for name in (first, first / 'checkpoints' / 'best.pt'):
        recipe = _recipe(model=str(name), model_args={})
        config = model_config(recipe, ())
        assert config['model'] == 'test_elsa_swin' and config['model_args']['kernel_size'] == 3
        backbone = create_backbone(recipe).state_dict()
        found = {k.rpartition('patch_embed.')[2]: x for k, x in backbone.items() if 'patch_embed.' in k}
        assert found and all(torch.equal(x, weights[f'patch_embed.{k}']) for k, x in found.items())


def test_a_run_on_a_folder_skips_what_cannot_be_read(coco, tmp_path):
    (coco / 'val2017' / '0.png').write_bytes(b'no image')
    result = run_job(_recipe(output=str(tmp_path / 'out'), data=str(coco)), DetectionJob)
    assert result.metrics['val_images'] == 3 and result.folder.name == 'coco'


@pytest.mark.parametrize('values, message', [
    (dict(model='local-dir:x'), 'model: got'), (dict(model='no_such_model'), 'no_such_model'),
    (dict(fsdp=True), 'fsdp'),
    (dict(layer_decay=.8), 'layer_decay'), (dict(checkpoint='gone.pth'), 'checkpoint'), (dict(mean=(.5,)), 'mean'),
    (dict(anchor_sizes=(8,)), 'anchor_sizes'), (dict(crop_range=(60, 40)), 'crop_range'),
    (dict(detector_args=dict(nothing=1)), 'detector_args'),
    (dict(pretrained=True), r'^pretrained: .*--checkpoint FILE.*--no-pretrained(?s:.*)no weights are known'),
    (dict(checkpoint=__file__), r"^checkpoint: '.*test_detection_job\.py' cannot be used\. "),
])
def test_bad_recipes_are_named(values, message):
    with pytest.raises(RecipeError, match=message):
        DetectionJob(_recipe(**values), World(torch.device('cpu')))


def test_repeated_images_do_not_count(monkeypatch):
    job = DetectionJob(_recipe(), World(torch.device('cpu'), 1, 2))
    gathered = []
    monkeypatch.setattr(World, 'gather', lambda self, value: gathered.append(value))
    monkeypatch.setattr(World, 'share', lambda self, value: value)
    with torch.no_grad():
        job.evaluate(job.model.eval())
    assert len(job._eval_loader) == 3 and gathered[0][1] == [1, 3]


def test_targets_are_checked_on_their_way_to_the_model():
    job = DetectionJob(_recipe(), World(torch.device('cpu')))
    images, targets = next(job.train_loader.epoch(0))[0]
    i = next(i for i, t in enumerate(targets) if len(t['labels']))
    assert job.prepare((images, targets), 0)[0][0].max() <= 1.
    targets[i]['labels'][0] = 4
    with pytest.raises(ValueError, match=f'labels of image {i}: got class 4'):
        job.prepare((images, targets), 0)


def test_scripts(tmp_path, coco):
    result = run_job(_recipe(output=str(tmp_path)), DetectionJob)
    (coco / 'val2017' / 'broken.png').write_bytes(b'no image')
    config = result.folder / 'model' / 'config.json'
    config.write_text(config.read_text().replace('"circle"', '"$x^{$\\udcff"'))
    os.rename(coco / 'val2017' / '1.png', os.fsencode(coco / 'val2017') + b'/\xff.png')
    command = [
        sys.executable, str(ROOT / 'scripts' / 'predict_detection.py'), str(coco / 'val2017'), '--model',
        str(result.folder / 'model'), '--output', str(tmp_path / 'found'), '--threshold', '0', '--device', 'cpu']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and 'broken.png: cannot be read' in done.stderr, done.stderr
    objects = json.loads((tmp_path / 'found' / 'objects.json').read_text())
    keys = {'label', 'number', 'bbox', 'score', 'segmentation'}
    assert len(objects) == 4 and all(set(o) == keys for found in objects.values() for o in found)
    assert '\\udcff.png: ' in done.stdout and '$x^{$' in (tmp_path / 'found' / 'objects.json').read_text()
    for name in ('2.png', '\udcff.png'):
        with Image.open(tmp_path / 'found' / name) as image:
            assert image.size == (48, 48)
    command[command.index('--threshold') + 1] = '1.5'
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.count('nothing with a score of 1.5 or more; a lower --threshold shows more') == 4


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr('elsa_models.training.jobs.detection.draw_objects', lambda *args: 1 / 0)
    result = run_job(_recipe(output=str(tmp_path)), DetectionJob)
    assert sorted(p.name for p in result.files) == ['log.csv', 'model', 'recipe.yaml']
    assert 'predictions.png: is not drawn (ZeroDivisionError' in caplog.text


RECIPES = sorted((ROOT / 'configs' / 'detection').glob('*.yaml'))


@pytest.mark.parametrize('file', [
    pytest.param(f, id=f.stem, marks=[pytest.mark.slow] * ('small' in f.stem or 'base' in f.stem)) for f in RECIPES])
def test_recipes_build(file):
    from elsa_models.dense.detection import build_detector
    recipe = load_recipe(file, kind=DetectionRecipe)
    train_transform(recipe)
    names = list('abc') if recipe.data == 'shapes' else [str(i) for i in range(80)]
    with torch.device('meta'):
        model = build_detector({**recipe.__dict__, 'class_names': names})
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    if 'elsa_swin' in file.stem:
        published = {
            'mask_rcnn_elsa_swin_tiny': 49, 'mask_rcnn_elsa_swin_small': 72, 'cascade_mask_rcnn_elsa_swin_tiny': 86,
            'cascade_mask_rcnn_elsa_swin_small': 110}[file.stem[:-3]]
        assert abs(millions - published) <= .5
    elif 'focal' in file.stem:
        published = {'tiny': 48.8, 'small': 71.2, 'base': 110.0}[file.stem.split('_')[3]]
        assert abs(millions - published) <= 1
    else:
        assert 46 < millions < 49 if file.stem == 'folder' else millions < 5


@pytest.mark.slow
@pytest.mark.parametrize('file', [f for f in RECIPES if 'shapes' not in f.stem], ids=lambda f: f.stem)
def test_first_step_of_the_authors_recipes(coco, first_step, file):
    def rename(content):
        content['categories'] += [dict(id=100 + i, name=str(i)) for i in range(77)]
    for split in ('train2017', 'val2017'):
        _change(coco, rename, split)
    small = dict(
        data=str(coco), pretrained=False, batch_size=2, workers=0, short_sides=(96, 128), max_side=160,
        crop_short_sides=(96, 112), crop_range=(64, 96), eval_short_side=96)
    trainer = first_step(load_recipe(file, small, DetectionRecipe), DetectionJob)
    assert len(trainer.job.class_names) == 80
