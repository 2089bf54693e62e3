import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import elsa_models  # noqa: F401
from elsa_models.training import ClassificationJob, DataError, LabelledImages, Recipe, RecipeError, run_job
from elsa_models.training.token_labels import (
    TokenLabelledImages,
    TokenLabelTask,
    TokenMaps,
    TokenTargets,
    classify_places,
    collate,
    make_label_maps,
)

VOLO = dict(model='test_elsa_volo', model_args=dict(img_size=32, use_mix_token=True))


def _write(folder, names, indices, scores, num_classes=4):
    folder.mkdir()
    (folder / 'names.txt').write_text('\n'.join(names) + '\n')
    np.save(folder / 'indices.npy', indices.astype(np.uint16))
    np.save(folder / 'scores.npy', scores.astype(np.float16))
    (folder / 'info.json').write_text(json.dumps(dict(num_classes=num_classes, teacher='x')))
    return folder


def _targets(classes, box=(0., 0., 1., 1.), flips=(False, False)):
    """One image whose map has one class in each place."""
    indices = torch.tensor(classes)[None, None]
    return TokenTargets(
        torch.zeros(1, dtype=torch.long), indices, torch.ones(indices.shape), torch.tensor([box]),
        torch.tensor([flips]))


@pytest.mark.parametrize('file, content, message', [
    ('indices.npy', np.zeros((2, 1, 2, 2), np.int64), 'indices are int64'),
    ('scores.npy', np.ones((2, 1, 2, 2), np.float32), 'scores float32'),
    ('indices.npy', np.full((2, 1, 2, 2), 65535, np.uint16), "'a.png' has class 65535"),
    ('scores.npy', np.full((2, 1, 2, 2), np.nan, np.float16), 'with score nan'),
    ('scores.npy', np.full((2, 1, 2, 2), -1, np.float16), 'with score -1'),
    ('indices.npy', np.zeros((2, 1, 0, 2), np.uint16), 'do not fit'),
    ('indices.npy', np.zeros((3, 1, 2, 2), np.uint16), 'do not fit'),
    ('indices.npy', b'cut', 'is no folder of label maps'),
    ('indices.npy', b'', 'is no folder of label maps'),
    ('names.txt', b'a.png\na.png\n', 'names an image twice'),
    ('names.txt', b'\xff\xfe', 'is no folder of label maps'),
    *(('info.json', text, 'num_classes|is no folder') for text in (
        b'[]', b'{', b'{}', b'3', b'{"num_classes": "4"}', b'{"num_classes": 4.5}', b'{"num_classes": -1}',
        b'{"num_classes": null}', b'{"num_classes": 1e400}', b'[' * 10000)),
])
def test_maps_are_checked_when_they_are_opened(tmp_path, file, content, message):
    folder = _write(tmp_path / 'maps', ['a.png', 'b.png'], np.zeros((2, 1, 2, 2)), np.ones((2, 1, 2, 2)))
    assert TokenMaps(folder).num_classes == 4
    if isinstance(content, np.ndarray):
        np.save(folder / file, content)
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-3] if content == b'cut' else content)
    with pytest.raises(DataError, match=f'token_labels: .*({message})'):
        TokenMaps(folder)


def test_whole_image_keeps_its_map():
    dense = _targets([[0, 1], [2, 3]]).dense((2, 2), 4)
    assert dense.shape == (1, 2, 2, 4) and dense.argmax(dim=-1).tolist() == [[[0, 1], [2, 3]]]
    torch.testing.assert_close(dense.sum(dim=-1), torch.ones(1, 2, 2))


@pytest.mark.parametrize('box, flips, expected', [
    ((0., 0., 1., 1.), (True, False), [[1, 0], [3, 2]]),
    ((0., 0., 1., 1.), (False, True), [[2, 3], [0, 1]]),
    ((.5, 0., 1., .5), (False, False), [[1, 1], [1, 1]]),
    ((0., .5, 1., 1.), (True, False), [[3, 2], [3, 2]]),
])
def test_map_is_cropped_and_mirrored(box, flips, expected):
    # each place of 4 x 4, so that a half of the image has places of its own
    classes = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(4, 0).repeat_interleave(4, 1).tolist()
    assert _targets(classes, box, flips).dense((2, 2), 4).argmax(dim=-1).tolist() == [expected]


def test_image_and_map_stay_together(tmp_path):
    """Every pixel's colour says its class; after any crop and flip, tokens still have the class of their pixels."""
    from elsa_models.training import create_train_transform
    colors = torch.tensor([[0, 80], [160, 240]], dtype=torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    classes = (colors // 80).numpy()[None, None]
    images = LabelledImages([Image.fromarray(colors.numpy()).resize((64, 32), 0)], [1], names=['a'])
    maps = TokenMaps(_write(tmp_path / 'maps', ['a'], classes, np.ones(classes.shape)))
    config = dict(
        input_size=(3, 32, 32), interpolation='bilinear', mean=(0.,) * 3, std=(1.,) * 3, crop_pct=1.,
        crop_mode='center')
    recipe = Recipe(color_jitter=0., vflip=0.5, scale=(0.2, 1.))
    dataset = TokenLabelledImages(
        images, maps, create_train_transform(recipe, config, separate=True), recipe.hflip, recipe.vflip)
    batch, targets = collate([dataset[0] for _ in range(40)])
    assert targets.classes.tolist() == [1] * 40 and len(targets.flips.unique(dim=0)) == 4
    dense = targets.dense((8, 8), 4)
    seen = torch.nn.functional.avg_pool2d(batch[:, :1].float(), 4)[:, 0] / 80
    expected = (dense * torch.arange(4)).sum(dim=-1)
    assert (seen - expected).abs().mean() < 0.1  # borders aside, where both are blurred
    assert ((seen - expected).abs() < 0.3).float().mean() > 0.9


@pytest.mark.parametrize('name', [
    'test_resnet', 'test_vit', 'test_elsa_swin', 'test_elsa_volo', 'test_convnext', 'swin_tiny_patch4_window7_224'])
def test_places_of_any_teacher(name):
    torch.manual_seed(0)
    sizes = dict(test_vit=dict(img_size=64), swin_tiny_patch4_window7_224=dict(
        img_size=64, embed_dim=24, depths=(1, 1), num_heads=(1, 2), window_size=4))
    model = timm.create_model(name, num_classes=5, **sizes.get(name, {})).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = classify_places(model, images)
        assert logits.ndim == 4 and logits.shape[0] == 2 and logits.shape[3] == 5 and logits.isfinite().all()
        assert logits.shape[1] == logits.shape[2] > 1
        if name in ('test_resnet', 'swin_tiny_patch4_window7_224'):  # a linear head on the mean
            torch.testing.assert_close(logits.mean(dim=(1, 2)), model(images), atol=1e-4, rtol=1e-4)


def test_maps_are_made_and_read(tmp_path, image_folder):
    from elsa_models.training import load_splits
    images = load_splits(Recipe(data=str(image_folder))).part('all')
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=2, pretrained=False).eval()
    make_label_maps(model, 'teacher', images, tmp_path / 'maps', size=(3, 3), top_k=5, batch_size=6)
    maps = TokenMaps(tmp_path / 'maps')
    assert maps.info == dict(teacher='teacher', num_classes=2) and len(maps.rows) == 16
    indices, scores = maps['red/3.png']
    assert indices.shape == scores.shape == (2, 3, 3)
    torch.testing.assert_close(scores.sum(dim=0), torch.ones(3, 3), atol=1e-3, rtol=0.)
    row = images.names.index('red/3.png')
    from timm.data import resolve_data_config
    config = resolve_data_config(model=model)
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    tensor = (torch.as_tensor(images[row][0]) / 255. - mean) / std
    with torch.no_grad():
        places = classify_places(model, tensor[None]).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(places, (3, 3), mode='bilinear').softmax(dim=1)[0]
    dense = torch.zeros(2, 3, 3).scatter_(0, indices.long(), scores)
    torch.testing.assert_close(dense, expected, atol=2e-3, rtol=0.)


def test_unreadable_image_leaves_the_former_maps(tmp_path, image_folder):
    from elsa_models.training import load_splits
    model = timm.create_model('test_resnet', num_classes=2).eval()
    images = load_splits(Recipe(data=str(image_folder))).part('all')
    make_label_maps(model, 'first', images, tmp_path / 'maps')
    (image_folder / 'red' / '3.png').write_bytes(b'no image')
    with pytest.raises(DataError, match=r'red/3\.png: cannot be read'):
        make_label_maps(model, 'second', images, tmp_path / 'maps')
    assert TokenMaps(tmp_path / 'maps').info['teacher'] == 'first'


def _run(tmp_path, **kwargs):
    return run_job(Recipe(**{**dict(
        output=str(tmp_path / 'output'), epochs=6, limit=12, batch_size=16, lr=2e-3, hflip=0., color_jitter=0.,
        onnx=False, figures=False, **VOLO), **kwargs}), ClassificationJob)


def test_training_with_labels_of_images(tmp_path):
    result = _run(tmp_path, token_labels='image', ema_decay=0.5, scale=(0.6, 1.))
    with open(result.folder / 'log.csv') as file:
        rows = file.read().splitlines()[1:]
    losses = [float(row.split(',')[3]) for row in rows]
    assert losses[-1] < losses[0]
    model = timm.create_model(f'local-dir:{result.folder / "model"}', pretrained=True)
    assert model.aux_head is not None


def test_training_with_label_maps(tmp_path, image_folder):
    red_blue = np.zeros((16, 1, 4, 4))
    names = [f'{c}/{i}.png' for c in ('blue', 'red') for i in range(8)]
    red_blue[8:] = 1
    maps = _write(tmp_path / 'maps', names, red_blue, np.ones((16, 1, 4, 4)), num_classes=2)
    result = _run(
        tmp_path, data=str(image_folder), token_labels=str(maps), limit=0, batch_size=6, hflip=0.5, epochs=8)
    assert result.metrics['val_top1'] == 100.

    for values, message in (
            (dict(train_crop_mode='rkrc'), 'train_crop_mode: must be rrc'), (dict(data='digits'), 'maps are of 2')):
        with pytest.raises(RecipeError, match=message):
            _run(tmp_path, **{**dict(data=str(image_folder)), **values}, token_labels=str(maps))
    (maps / 'names.txt').write_text('\n'.join(['x', *names[1:]]))
    with pytest.raises(DataError, match="has no map of 'blue/"):
        _run(tmp_path, data=str(image_folder), token_labels=str(maps), limit=0, val_fraction=0.2, val_seed=1)
    (maps / 'info.json').unlink()
    with pytest.raises(DataError, match='is no folder of label maps'):
        _run(tmp_path, data=str(image_folder), token_labels=str(maps))


def test_options_that_do_not_fit_token_labels(tmp_path):
    with pytest.raises(RecipeError, match='mixup, cutmix: must be 0 with token_labels'):
        _run(tmp_path, token_labels='image', mixup=0.2)
    with pytest.raises(RecipeError, match='token_labels: .* has no aux head'):
        _run(tmp_path, token_labels='image', model_args=dict(img_size=32, use_aux_head=False))


def test_loss_is_that_of_the_model():
    from elsa_models.models import token_label_loss
    model = timm.create_model('test_elsa_volo', num_classes=3, img_size=32).eval()
    task = TokenLabelTask(model, 0.5, 0.1, torch.device('cpu'))
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    dense = torch.rand(2, 4, 4, 3).softmax(dim=-1)
    expected = token_label_loss(model.forward_train(images), targets, dense, 0.5, 0.1)
    torch.testing.assert_close(task(images, (targets, dense))['loss'], expected)
    assert task.get_eval_model() is model
