import csv
import json
import os
import shutil
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
from elsa_models.hub.publish import publish
from elsa_models.training import (
    ClassificationJob,
    DivergedError,
    OutputError,
    Recipe,
    RecipeError,
    World,
    load_recipe,
    run_job,
)
from elsa_models.training.jobs.classification import keeps_licence, save_model

SMALL = dict(
    epochs=2, limit=8, batch_size=16, hflip=0., color_jitter=0., onnx=False, figures=False,
    model_args=dict(img_size=32, kernel_size=3))


def run(recipe):
    return run_job(recipe, ClassificationJob)


def _run(tmp_path, **kwargs):
    return run(Recipe(**{**SMALL, 'output': str(tmp_path / 'output'), **kwargs}))


def _weights(result):
    return (result.folder / 'model' / 'model.safetensors').read_bytes()


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """A run with everything that it writes."""
    tmp_path = tmp_path_factory.mktemp('full')
    return run(Recipe(**{**SMALL, 'output': str(tmp_path / 'output'), 'onnx': True, 'figures': True, 'crop_pct': 0.75}))


def test_writes_everything(full):
    pictures = ['curves.png', 'confusion.png', 'predictions.png', 'attention.png']
    names = ['model', 'model.onnx', 'labels.json', *pictures, 'classes.csv', 'log.csv', 'recipe.yaml']
    assert sorted(f.name for f in full.files) == sorted(names)
    assert sorted(p.name for p in full.folder.iterdir()) == sorted([*names, 'checkpoints'])
    assert full.folder.name == 'digits' and full.metrics['val_images'] == 20
    assert [p.name for p in full.folder.parent.iterdir()] == ['digits']
    for name in pictures:
        with Image.open(full.folder / name) as image:
            assert min(image.size) > 400 and len(image.convert('RGB').getcolors(1 << 24)) > 50


def test_a_run_can_be_published_and_shown_on_a_page(full):
    names = json.loads((full.folder / 'model' / 'config.json').read_text())['label_names']
    assert json.loads((full.folder / 'labels.json').read_text()) == names == [str(i) for i in range(10)]
    card = (full.folder / 'model' / 'README.md').read_text()
    assert f'{full.metrics["val_top1"]:.2f} % top-1' in card and '20 held-out images' in card
    assert str(full.folder.parent) not in card and 'Licence: unknown' in card
    for folder in (full.folder, full.folder / 'model', f'local-dir:{full.folder}'):
        published = publish(folder, 'me/digits', dry_run=True)
        assert [line.split()[0] for line in published.files] == ['README.md', 'config.json', 'model.safetensors']


def test_log_has_a_row_for_each_epoch(full):
    with open(full.folder / 'log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['1', '2']
    assert max(float(row['val_top1']) for row in rows) == full.metrics['val_top1']
    assert all(0. < float(row['train_loss']) < 10. and row['unreadable'] == '0' for row in rows)
    assert load_recipe(full.folder / 'recipe.yaml').epochs == 2


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
    a, b, c = (_weights(_run(tmp_path, name=f'{i}', seed=seed, epochs=1)) for i, seed in enumerate((1, 1, 2)))
    assert a == b != c


def test_it_learns(tmp_path, image_folder):
    result = _run(tmp_path, data=str(image_folder), limit=0, epochs=6, lr=2e-3, batch_size=4)
    assert result.metrics['val_top1'] == 100. and result.job.splits.class_names == ['blue', 'red']
    assert result.folder.name == 'pictures'


@pytest.mark.parametrize('values', [
    dict(mixup=0.8, cutmix=1., mixup_off_epochs=1, re_prob=0.5, auto_augment='rand-m9-mstd0.5-inc1', smoothing=0.),
    dict(loss='bce', class_balance='effective_num'), dict(class_balance='inv_freq', mixup=0.2),
    dict(loss='poly', mixup_mode='elem', cutmix=1.), dict(loss='asl', scale=(0.5, 1.)),
    dict(model='resnet10t', model_args={}, crop_pct=1., mean=(0.5,) * 3, freeze=('layer1',), channels_last=True),
    *(pytest.param(dict(compile=True, **values), marks=[pytest.mark.slow, pytest.mark.compiler]) for values in (
        dict(ema_decay=.9),
        dict(model='test_elsa_volo', token_labels='image', model_args=dict(img_size=32, use_mix_token=True)))),
])
def test_options_train(tmp_path, values):
    result = _run(tmp_path, epochs=2, **{**dict(model_args=dict(img_size=32, kernel_size=3)), **values})
    assert 0. < result.metrics['train_loss'] < 20.


@pytest.mark.parametrize('values', [
    dict(mixup=0.2, batch_size=15), dict(mixup=0.2, loss='asl'), dict(loss='poly', class_balance='inv_freq'),
    dict(token_labels='image'), dict(warm_start='no_such_model'), dict(num_classes=4, data='torch/folder'),
])
def test_options_that_contradict_are_named(tmp_path, image_folder, values):
    name = {'mixup': 'batch_size' if 'batch_size' in values else 'loss'}.get(next(iter(values)), next(iter(values)))
    with pytest.raises(RecipeError, match=f'{name}:'):
        _run(tmp_path, data_dir=str(image_folder), **values)
    assert not (tmp_path / 'output').exists()


def test_web_data_set_is_trained_on(tmp_path, shards):
    arguments = dict(
        data='wds/shards', data_dir=str(shards), num_classes=2, limit=0, batch_size=4, epochs=3, lr=2e-3,
        figures=True, workers=0)
    result = _run(tmp_path, **arguments)
    assert result.metrics['val_images'] == 8 and result.metrics['step'] % 4 == 0
    assert (result.folder / 'confusion.png').exists() and not (result.folder / 'predictions.png').exists()
    assert _weights(_run(tmp_path, name='again', **arguments)) == _weights(result)


def test_confusion_of_a_share_of_a_stream_is_not_drawn(tmp_path, shards, caplog):
    caplog.set_level('INFO')
    recipe = Recipe(**{
        **SMALL, 'data': 'wds/shards', 'data_dir': str(shards), 'num_classes': 2, 'limit': 0, 'batch_size': 4,
        'figures': True})
    job = ClassificationJob(recipe, World(torch.device('cpu')))
    job.world = World(torch.device('cpu'), 0, 2)  # nothing is gathered at the end
    job.finish(job.model.eval(), tmp_path, [dict(epoch=1, train_loss=1., val_loss=1., val_top1=50., val_images=8)])
    assert (tmp_path / 'curves.png').exists() and not (tmp_path / 'confusion.png').exists()
    assert 'confusion.png: not drawn' in caplog.text


def test_unreadable_images_are_skipped_and_counted(tmp_path, image_folder, caplog):
    parts = tmp_path / 'parts'
    for part, number in (('train', 3), ('val', 2)):
        shutil.copytree(image_folder, parts / part)
        for i in range(number):
            (parts / part / 'red' / f'x{i}.jpg').write_bytes(b'no image')
    result = _run(tmp_path, data=str(parts), limit=0, epochs=1, batch_size=19)
    # x0, x1, x2 are the last, and each is replaced by the next that can be read: 3 + 2 + 1 attempts fail
    assert result.metrics['unreadable'] == 6 and result.metrics['val_images'] == 16
    assert 'in epoch 1, attempts at images that cannot be read: 6' in caplog.text
    assert 'x1.jpg: cannot be read as an image' in caplog.text and 'and do not count: 2' in caplog.text


def test_each_unreadable_image_is_named_once_a_run(tmp_path, image_folder, caplog):
    shutil.copytree(image_folder, tmp_path / 'parts' / 'train')
    shutil.copytree(image_folder, tmp_path / 'parts' / 'val')
    files = [tmp_path / 'parts' / part / 'red' / 'broken.jpg' for part in ('train', 'val')]
    for file in files:
        file.write_bytes(b'no image')
    result = _run(tmp_path, data=str(tmp_path / 'parts'), limit=0, figures=True, epochs=2, batch_size=4)
    assert [caplog.text.count(f'{file}: cannot be read') for file in files] == [1, 1]
    assert caplog.text.count('do not count: 1') == 1
    assert 'Accuracy on 16 held-out images' in (result.folder / 'model' / 'README.md').read_text()


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


@pytest.mark.parametrize('at', [
    'run', 'export_onnx', *(pytest.param(x, marks=pytest.mark.slow) for x in ('save_folder', 'write_classes'))])
def test_failure_in_the_middle_leaves_the_former_result_and_goes_on(tmp_path, monkeypatch, at):
    from elsa_models.inference import figures
    modules = {'write_classes': figures, 'run': sys.modules['elsa_models.training.run'].Trainer}
    module = modules.get(at, sys.modules['elsa_models.training.jobs.classification'])
    first = _run(tmp_path, epochs=1)
    before = _bytes(first.folder)

    def half(*args, **kwargs):
        if at == 'save_folder':
            (Path(args[1])).mkdir()
            (Path(args[1]) / 'model.safetensors').write_bytes(b'half')
        raise RuntimeError('power cut')

    arguments = dict(
        epochs=1, seed=7, onnx=at == 'export_onnx', figures=at == 'write_classes', name='digits', overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='power cut'):
        patch.setattr(module, at, half)
        _run(tmp_path, **arguments)
    assert _bytes(first.folder) == before
    left = [p.name for p in first.folder.parent.iterdir() if p != first.folder]
    assert left == ([] if at == 'run' else ['digits-running'])
    if left:  # the training is not repeated
        monkeypatch.setattr(ClassificationJob, 'evaluate', None)
        second = _run(tmp_path, **arguments)
        assert [p.name for p in first.folder.parent.iterdir()] == ['digits']
        assert _weights(second) != before['model/model.safetensors']


def test_no_figure_ends_a_run_that_has_its_result(tmp_path, image_folder, monkeypatch, caplog):
    from elsa_models.inference import figures
    (image_folder / 'red').rename(image_folder / '$x^{$')
    os.rename(image_folder / 'blue', os.fsencode(image_folder) + b'/bl\xffe')
    arguments = dict(data=str(image_folder), limit=0, epochs=1, batch_size=4, figures=True)
    result = _run(tmp_path, **arguments, onnx=True)
    assert 'is not drawn' not in caplog.text and (result.folder / 'confusion.png').exists()
    for name in ('curves', 'confusion', 'predictions', 'attention'):
        monkeypatch.setattr(figures, f'draw_{name}', lambda *args: 1 / 0)
    again = _run(tmp_path, **arguments)
    assert caplog.text.count('is not drawn (ZeroDivisionError') == 4 and _weights(again) == _weights(result)
    assert not (again.folder / 'confusion.png').exists() and (again.folder / 'classes.csv').exists()


def test_full_disk_at_the_end_is_a_clear_error(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OutputError, match='the results cannot be written .*No space'):
        patch.setattr(sys.modules['elsa_models.training.jobs.classification'], 'save_folder',
                      lambda *args, **kwargs: (_ for _ in ()).throw(OSError('No space left on device')))
        _run(tmp_path, epochs=1)
    assert (tmp_path / 'output' / 'digits-running' / 'checkpoints' / 'best.pt').exists()
    assert _run(tmp_path, epochs=1).metrics['epoch'] == 1


def _interrupted(tmp_path, monkeypatch, **kwargs):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClassificationJob, 'finish', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        _run(tmp_path, **kwargs)


def test_unfinished_run_of_another_recipe_is_not_continued(tmp_path, monkeypatch):
    _interrupted(tmp_path, monkeypatch, epochs=1)
    before = _bytes(tmp_path / 'output')
    with pytest.raises(RecipeError, match=r'resume: .*digits-running holds .* \(lr: 0\.001 there, 0\.5 here\)'):
        _run(tmp_path, epochs=1, lr=0.5)
    assert _bytes(tmp_path / 'output') == before
    afresh = _run(tmp_path, epochs=1, seed=7, resume=False)
    assert _weights(afresh) == _weights(_run(tmp_path, epochs=1, seed=7, name='x'))


def test_two_runs_of_one_name_are_kept_apart(tmp_path, monkeypatch):
    from filelock import FileLock
    _interrupted(tmp_path, monkeypatch, epochs=1)
    with FileLock(tmp_path / 'output' / 'digits-running' / '.lock'):
        with pytest.raises(OutputError, match='another run of this name is at work'):
            _run(tmp_path, epochs=1)
    assert _run(tmp_path, epochs=1).metrics['epoch'] == 1


def test_finished_run_is_never_replaced_unless_asked(tmp_path, caplog):
    caplog.set_level('INFO')
    first = _run(tmp_path, epochs=1)
    before = _bytes(first.folder)
    second = _run(tmp_path, epochs=1, seed=7)
    assert second.folder.name == 'digits-2' and 'digits is there already; this run is' in caplog.text
    assert _bytes(first.folder) == before and _weights(second) != _weights(first)
    with pytest.raises(OutputError, match=r'digits: is there already.*--overwrite'):
        _run(tmp_path, epochs=1, seed=7, name='digits')
    assert _bytes(first.folder) == before
    third = _run(tmp_path, epochs=1, seed=7, name='digits', overwrite=True)
    assert third.folder == first.folder and _weights(third) == _weights(second)
    assert sorted(p.name for p in third.folder.parent.iterdir()) == ['digits', 'digits-2']


def test_folders_of_one_name_do_not_meet(tmp_path, image_folder, monkeypatch):
    other = tmp_path / 'other' / image_folder.name
    shutil.copytree(image_folder, other)
    arguments = dict(limit=0, epochs=1, batch_size=4)
    _interrupted(tmp_path, monkeypatch, data=str(image_folder), **arguments)
    assert _run(tmp_path, data=str(other), **arguments).folder.name == 'pictures-2'
    assert _run(tmp_path, data=str(image_folder), **arguments).folder.name == 'pictures'  # goes on
    _interrupted(tmp_path, monkeypatch, data=str(other), seed=9, **arguments)
    assert (tmp_path / 'output' / 'pictures-3-running').is_dir()
    assert _run(tmp_path, data=str(other), seed=9, **arguments).folder.name == 'pictures-3'


@pytest.mark.parametrize('name', ['../esc', '/tmp/esc', '..', '.', 'a/b', 'a\\b', 'a\0b', 'a\nb'])
def test_name_stays_in_the_output_folder(name):
    with pytest.raises(RecipeError, match='name: got .* must be the name of a folder within output'):
        Recipe(name=name)
    assert Recipe(data=f'x/{name}').run_name.isprintable() and '/' not in Recipe(data=f'x/{name}').run_name


def test_no_finished_run_has_the_name_of_an_unfinished_one(tmp_path, image_folder):
    with pytest.raises(RecipeError, match="name: got 'mine-running', must not end in '-running'"):
        Recipe(name='mine-running')
    data = image_folder.rename(image_folder.with_name('pictures-running'))
    finished = _run(tmp_path, data=str(data), limit=0, epochs=1, batch_size=4).folder
    assert finished.name == 'pictures'
    assert Recipe(data='-running-running').run_name == 'run'


@pytest.mark.parametrize('values, helps', [
    ({}, True), (dict(model=True), False), (dict(data='digits', limit=8), False)])
def test_advice_at_the_end_is_for_runs_from_random_weights(tmp_path, full, image_folder, capsys, values, helps):
    from elsa_models.commands.train import report
    if values.get('model'):  # a path comes with its weights
        values = dict(model=str(full.folder), model_args={})
    arguments = dict(data=str(image_folder), limit=0, epochs=1, batch_size=4)
    report(_run(tmp_path, **{**arguments, **values}))
    assert ('what would help most: weights' in capsys.readouterr().out) == helps


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(RecipeError, match='output: got'):
        Recipe(output='a\0b')
    for arguments in (dict(output=str(tmp_path / 'file')), dict(output=str(tmp_path), name='x' * 300)):
        with pytest.raises(OutputError, match='cannot be written|is a file'):
            run(Recipe(**{**SMALL, **arguments}))


def test_saved_model_that_differs_is_refused(tmp_path, monkeypatch):
    module = sys.modules['elsa_models.training.jobs.classification']
    save = module.save_folder

    def save_another(model, *args, **kwargs):
        with torch.no_grad():
            model.head.fc.bias[0] += 1.
        save(model, *args, **kwargs)
        with torch.no_grad():
            model.head.fc.bias[0] -= 1.

    monkeypatch.setattr(module, 'save_folder', save_another)
    with pytest.raises(RuntimeError, match='differs from the trained one'):
        _run(tmp_path, epochs=1)
    assert not (tmp_path / 'output' / 'digits').exists()


def test_folder_of_the_data_is_not_overwritten(tmp_path, image_folder):
    before = _bytes(image_folder)
    with pytest.raises(OutputError, match='pictures: holds'):
        _run(tmp_path, data=str(image_folder), output=str(image_folder.parent))
    assert _bytes(image_folder) == before


@pytest.mark.parametrize('values, message', [
    (dict(model='no_such_model'), 'no_such_model'),
    (dict(model='models/mine'), 'no such file or folder'),
    (dict(model_args={'kernal_size': 3}), 'kernal_size'),
    (dict(model_args={'kernel_size': 4}), 'kernel_size: got 4'),
    (dict(model_args={'num_classes': 4}), "'num_classes' is not to be given"),
    (dict(pretrained=True), r'^pretrained: .*--checkpoint FILE.*--no-pretrained(?s:.*)no weights are known'),
    (dict(checkpoint=__file__), r"^checkpoint: '.*test_run\.py' cannot be used\. "),
    (dict(checkpoint='absent.pth'), r'absent\.pth'),
    (dict(opt='addam'), 'addam'),
    (dict(opt_args={'betta': 1}), 'betta'),
    (dict(device='abacus'), 'abacus'),
    (dict(mean=(0.5, 0.5)), 'mean'),
])
def test_values_that_cannot_be_used_are_named(tmp_path, values, message):
    with pytest.raises(RecipeError, match=message):
        _run(tmp_path, **values)
    assert not (tmp_path / 'output').exists()


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(DivergedError, match='the loss of epoch 1 is'):
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
@pytest.mark.parametrize('name', ['digits', 'digits_focal', 'digits_lg'])
def test_digits_recipe_reaches_its_accuracy(tmp_path, name):
    path = Path(__file__).parents[2] / 'configs' / f'{name}.yaml'
    result = run(load_recipe(path, dict(output=str(tmp_path), onnx=False, figures=False)))
    assert result.metrics['val_images'] == 450 and result.metrics['val_top1'] >= 97.
