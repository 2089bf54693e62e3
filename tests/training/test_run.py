import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import to_authors
from PIL import Image
from safetensors.torch import load_file

import elsa_models  # noqa: F401
from elsa_models.training import DataError, OutputError, Recipe, RecipeError, run
from elsa_models.training.run import keeps_licence, save_model

SMALL = dict(
    epochs=2, limit=8, batch_size=16, hflip=0., color_jitter=0., onnx=False, figures=False,
    model_args=dict(img_size=32, kernel_size=3))


def _run(tmp_path, **kwargs):
    return run(Recipe(**{**SMALL, 'output': str(tmp_path / 'output'), **kwargs}))


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """A run with everything that it writes."""
    tmp_path = tmp_path_factory.mktemp('full')
    return run(Recipe(**{**SMALL, 'output': str(tmp_path / 'output'), 'onnx': True, 'figures': True, 'crop_pct': 0.75}))


def test_writes_everything(full):
    names = ['model', 'model.onnx', 'predictions.png', 'attention.png', 'log.csv', 'recipe.yaml']
    assert [f.name for f in full.files] == names
    assert sorted(p.name for p in full.folder.iterdir()) == sorted(names)
    assert full.folder.name == 'digits' and (full.num_train, full.num_val) == (60, 20)
    assert [p.name for p in full.folder.parent.iterdir()] == ['digits']
    for name in ('predictions.png', 'attention.png'):
        with Image.open(full.folder / name) as image:
            assert min(image.size) > 400 and len(image.convert('RGB').getcolors(1 << 24)) > 50


def test_log_has_a_row_for_each_epoch(full):
    with open(full.folder / 'log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['1', '2']
    assert list(rows[0]) == ['epoch', 'loss', 'lr', 'accuracy']
    assert float(rows[-1]['accuracy']) == pytest.approx(full.accuracy, abs=1e-3)
    assert all(0. < float(row['loss']) < 10. for row in rows)


def test_config_names_labels_and_preprocessing(full):
    config = json.loads((full.folder / 'model' / 'config.json').read_text())
    assert config['label_names'] == list('0123456789')
    assert config['num_classes'] == 10 and config['architecture'] == 'test_elsa_swin'
    assert config['model_args']['kernel_size'] == 3
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32] and config['pretrained_cfg']['crop_pct'] == 0.75


def test_licence_is_that_of_the_start(full, tmp_path):
    config = json.loads((full.folder / 'model' / 'config.json').read_text())['pretrained_cfg']
    assert not any(config.get(k) for k in ('license', 'origin_url', 'tag'))
    assert config['paper_ids'] == 'arXiv:2112.12786'
    model = timm.create_model('test_elsa_swin')
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    torch.save(to_authors(model.state_dict()), tmp_path / 'authors.pth')
    assert keeps_licence(Recipe(pretrained=True)) and not keeps_licence(Recipe())
    assert keeps_licence(Recipe(checkpoint=str(tmp_path / 'authors.pth')))
    assert not keeps_licence(Recipe(checkpoint=str(tmp_path / 'own.pth'), pretrained=True))
    data_config = timm.data.resolve_data_config(model=model)
    save_model(model.eval(), tmp_path / 'x', ['a'] * 1000, data_config, keep_licence=True)
    config = json.loads((tmp_path / 'x' / 'config.json').read_text())['pretrained_cfg']
    assert config['license'] == 'mit' and not config.get('origin_url')


def test_saved_model_loads_again_and_equals_the_export(full):
    model = timm.create_model(f'local-dir:{full.folder / "model"}', pretrained=True).eval()
    weights = load_file(full.folder / 'model' / 'model.safetensors')
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert model.pretrained_cfg['label_names'] == list('0123456789')
    import onnxruntime
    session = onnxruntime.InferenceSession(full.folder / 'model.onnx', providers=['CPUExecutionProvider'])
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images).numpy()
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_same_seed_same_bytes(tmp_path):
    results = [_run(tmp_path, name=name, seed=seed, epochs=1) for name, seed in (('a', 1), ('b', 1), ('c', 2))]
    contents = [_bytes(result.folder) for result in results]
    for name in ('log.csv', 'model/model.safetensors', 'model/config.json'):
        assert contents[0][name] == contents[1][name]
    assert contents[0]['model/model.safetensors'] != contents[2]['model/model.safetensors']


def test_it_learns(tmp_path, image_folder):
    result = _run(tmp_path, data=str(image_folder), limit=0, epochs=6, lr=2e-3, batch_size=4)
    assert result.accuracy == 100. and result.class_names == ['blue', 'red']
    assert result.folder.name == 'pictures'


def test_one_channel(tmp_path):
    result = _run(tmp_path, epochs=1, model_args=dict(img_size=32, in_chans=1))
    config = json.loads((result.folder / 'model' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [1, 32, 32]
    with pytest.raises(RecipeError, match='2 input channels'):
        _run(tmp_path, model_args=dict(img_size=32, in_chans=2))


def test_starts_from_a_saved_model(tmp_path, full, image_folder):
    model = f'local-dir:{full.folder / "model"}'
    arguments = dict(
        data=str(image_folder), limit=0, model=model, model_args={}, pretrained=True, lr=0., warmup_epochs=0., epochs=1)
    result = _run(tmp_path, **arguments)
    before = load_file(full.folder / 'model' / 'model.safetensors')
    after = load_file(result.folder / 'model' / 'model.safetensors')
    assert after['head.fc.weight'].shape[0] == 2
    assert all(torch.equal(x, before[name]) for name, x in after.items() if not name.startswith('head.'))
    config = json.loads((result.folder / 'model' / 'config.json').read_text())
    assert config['label_names'] == ['blue', 'red']

    arguments.update(model='test_elsa_swin', pretrained=False, model_args=SMALL['model_args'])
    arguments.update(checkpoint=str(full.folder / 'model' / 'model.safetensors'))
    after = load_file(_run(tmp_path, **arguments).folder / 'model' / 'model.safetensors')
    assert all(torch.equal(x, before[name]) for name, x in after.items() if not name.startswith('head.'))


@pytest.mark.parametrize('at', ['fit', 'save_for_hf', 'export_onnx', 'draw_predictions'])
def test_failure_in_the_middle_leaves_the_former_result(tmp_path, monkeypatch, at):
    from elsa_models.training import figures
    module = figures if at == 'draw_predictions' else sys.modules['elsa_models.training.run']
    first = _run(tmp_path, epochs=1)
    before = _bytes(first.folder)

    def half(*args, **kwargs):
        if at == 'save_for_hf':
            (Path(args[1])).mkdir()
            (Path(args[1]) / 'model.safetensors').write_bytes(b'half')
        raise RuntimeError('power cut')

    monkeypatch.setattr(module, at, half)
    with pytest.raises(RuntimeError, match='power cut'):
        _run(tmp_path, epochs=1, seed=7, onnx=True, figures=True)
    assert _bytes(first.folder) == before
    left = [p for p in first.folder.parent.iterdir() if p != first.folder]
    if at in ('export_onnx', 'draw_predictions'):  # the trained model is not thrown away
        assert len(left) == 1
        timm.create_model(f'local-dir:{left[0] / "model"}', pretrained=True)
    if at == 'fit':
        assert left == []


def test_second_run_replaces_the_first(tmp_path):
    first = _bytes(_run(tmp_path, epochs=1).folder)
    second = _run(tmp_path, epochs=1, seed=7)
    assert _bytes(second.folder)['model/model.safetensors'] != first['model/model.safetensors']
    assert [p.name for p in second.folder.parent.iterdir()] == ['digits']


def test_saved_model_that_differs_is_refused(tmp_path, monkeypatch):
    module = sys.modules['elsa_models.training.run']
    save = module.save_for_hf

    def save_another(model, *args, **kwargs):
        with torch.no_grad():
            model.head.fc.bias[0] += 1.
        save(model, *args, **kwargs)
        with torch.no_grad():
            model.head.fc.bias[0] -= 1.

    monkeypatch.setattr(module, 'save_for_hf', save_another)
    with pytest.raises(RuntimeError, match='differs from the trained one'):
        _run(tmp_path, epochs=1)
    assert not (tmp_path / 'output' / 'digits').exists()


def test_bad_data_leaves_the_former_result(tmp_path, image_folder):
    first = _run(tmp_path, epochs=1, name='x')
    before = _bytes(first.folder)
    broken = image_folder / 'red' / 'broken.jpg'
    Image.effect_noise((256, 256), 50.).save(broken)
    broken.write_bytes(broken.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r'broken\.jpg'):
        _run(tmp_path, name='x', data=str(image_folder), limit=0)
    assert _bytes(first.folder) == before
    assert [p.name for p in first.folder.parent.iterdir()] == ['x']


def test_folder_of_the_data_is_not_overwritten(tmp_path, image_folder):
    before = _bytes(image_folder)
    with pytest.raises(OutputError, match='pictures: holds'):
        _run(tmp_path, data=str(image_folder), output=str(image_folder.parent))
    assert _bytes(image_folder) == before


@pytest.mark.parametrize('values, message', [
    (dict(model='no_such_model'), 'no_such_model'),
    (dict(model='models/mine'), 'local-dir:'),
    (dict(model_args={'kernal_size': 3}), 'kernal_size'),
    (dict(model_args={'kernel_size': 4}), 'kernel_size: got 4'),
    (dict(model_args={'num_classes': 4}), "'num_classes' is not to be given"),
    (dict(pretrained=True), 'no weights are known'),
    (dict(checkpoint='absent.pth'), r'absent\.pth'),
    (dict(opt='addam'), 'addam'),
    (dict(opt_args={'betta': 1}), 'betta'),
    (dict(device='abacus'), 'abacus'),
    (dict(mean=(0.5, 0.5)), 'mean'),
])
def test_values_that_cannot_be_used_are_named(tmp_path, values, message):
    with pytest.raises(RecipeError, match=message):
        _run(tmp_path, **values)
    assert not list((tmp_path / 'output').glob('*'))


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match='the loss of epoch 1 is'):
        _run(tmp_path, lr=1e30, warmup_epochs=0., opt='sgd')
    assert not list((tmp_path / 'output').iterdir())


@pytest.mark.parametrize('name, extra, values', [
    ('tqdm', 'train', {}), ('matplotlib', 'train', dict(figures=True)), ('onnxruntime', 'onnx', dict(onnx=True)),
    ('sklearn', 'train', {}),
])
def test_missing_package_is_named_before_training(tmp_path, monkeypatch, name, extra, values):
    monkeypatch.setitem(sys.modules, name, None)
    if name == 'sklearn':
        monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match=rf"{name}.*pip install '\.\[{extra}\]' in a clone"):
        _run(tmp_path, **values)
    assert not (tmp_path / 'output').exists()


@pytest.mark.slow
def test_digits_recipe_reaches_its_accuracy(tmp_path):
    from elsa_models.training import load_recipe
    path = Path(__file__).parents[2] / 'configs' / 'digits.yaml'
    result = run(load_recipe(path, dict(output=str(tmp_path), onnx=False, figures=False)))
    assert result.num_val == 450 and result.accuracy >= 97.
