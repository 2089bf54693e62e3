import csv
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from elsa_models.commands.predict import main as predict
from elsa_models.commands.validate import main as validate
from elsa_models.inference import ModelError, load_classifier
from elsa_models.models._saving import save_folder
from elsa_models.training import ClassificationJob, Recipe, load_splits, run_job


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A small model of the digits with its ONNX file, and some digits as files, one of them broken."""
    folder = tmp_path_factory.mktemp('trained')
    result = run_job(Recipe(
        output=str(folder), limit=20, epochs=4, batch_size=16, lr=2e-3, hflip=0., color_jitter=0., figures=False,
        scale=(0.6, 1.), crop_pct=1., model_args=dict(img_size=32, kernel_size=3)), ClassificationJob)
    splits = load_splits(Recipe(limit=20))
    for i in range(6):
        (folder / 'images').mkdir(exist_ok=True)
        splits.val.image(i).save(folder / 'images' / f'{i}.png')
    return result


def _measure(tmp_path, *arguments):
    file = tmp_path / 'numbers.json'
    assert validate([*map(str, arguments), '--limit', '20', '--device', 'cpu', '--output', str(file)]) == 0
    return json.loads(file.read_text())


def test_same_numbers_as_in_training_from_folder_checkpoint_and_onnx(tmp_path, trained, capsys):
    folder = trained.folder
    expected = {k: trained.metrics[f'val_{k}'] for k in ('loss', 'top1', 'top5', 'images')}
    model = ('--model', f'local-dir:{folder / "model"}')
    found = _measure(tmp_path, *model)
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-6)
    assert f'top-1:    {expected["top1"]:.3f} %' in capsys.readouterr().out
    onnx = _measure(tmp_path, *model, '--onnx', folder / 'model.onnx', '--batch-size', 7)
    assert onnx['top1'] == expected['top1'] and onnx['loss'] == pytest.approx(expected['loss'], rel=1e-4)
    again = _measure(
        tmp_path, '--model', 'test_elsa_swin', '--num-classes', 10, '--model-args', 'img_size=32', 'kernel_size=3',
        '--checkpoint', folder / 'model' / 'model.safetensors', '--crop-pct', 1., '--batch-size', 3)
    assert again['top1'] == expected['top1'] and again['loss'] == pytest.approx(expected['loss'], rel=1e-5)


@pytest.mark.parametrize('name', [
    '', 'model', 'model/model.safetensors', 'model.onnx', 'checkpoints/best.pt', 'local-dir:model'])
def test_one_way_to_name_a_model(tmp_path, trained, name, capsys):
    """By its path, whatever is named, with the data of its run."""
    prefix, _, path = name.rpartition(':')
    model = f'{prefix}:{trained.folder / path}' if prefix else trained.folder / path
    file = tmp_path / 'numbers.json'
    assert validate(['--model', str(model), '--output', str(file)]) == 0
    found = json.loads(file.read_text())
    assert found['images'] == trained.metrics['val_images'] == 50 and found['top1'] == trained.metrics['val_top1']
    images = trained.folder.parent / 'images'
    capsys.readouterr()
    assert predict([str(images), '--model', str(model), '--output', str(tmp_path / 'out')]) == 0
    assert (tmp_path / 'out' / 'attention.png').exists() == (name != 'model.onnx')


@pytest.fixture(scope='module')
def coloured(tmp_path_factory):
    """The folder of a run on two colours, whose recipe says how images are prepared."""
    folder = tmp_path_factory.mktemp('coloured')
    for color in ('blue', 'red'):
        (folder / 'pictures' / color).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (40, 40), color).save(folder / 'pictures' / color / f'{i}.png')
    return run_job(Recipe(
        data=str(folder / 'pictures'), output=str(folder), name='run', epochs=1, batch_size=4, figures=False,
        crop_pct=0.5, mean=(0.25, 0.5, 0.5), model_args=dict(img_size=32, kernel_size=3)), ClassificationJob).folder


@pytest.mark.parametrize('name', [
    '', 'local-dir:', 'model', 'model/model.safetensors', 'checkpoints/best.pt', 'model.onnx', 'local-dir:model.onnx'])
def test_every_name_brings_classes_and_preparation(coloured, name):
    prefix, _, path = name.rpartition(':')
    classifier = load_classifier(f'{prefix}:{coloured / path}' if prefix else coloured / path, torch.device('cpu'))
    assert classifier.label_names == ['blue', 'red']
    assert classifier.data_config['crop_pct'] == 0.5 and tuple(classifier.data_config['mean']) == (0.25, 0.5, 0.5)
    expected = load_classifier(str(coloured), torch.device('cpu'))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(x), expected.logits(x), atol=1e-4)


def test_file_of_a_run_says_nothing_of_this_machine_or_of_other_weights(coloured):
    session = pytest.importorskip('onnxruntime').InferenceSession(
        coloured / 'model.onnx', providers=['CPUExecutionProvider'])
    metadata = session.get_modelmeta().custom_metadata_map
    cfg = json.loads(metadata['pretrained_cfg'])
    assert cfg['num_classes'] == 2 and not cfg.keys() & {'license', 'origin_url', 'tag'}
    assert str(coloured) not in str(metadata) and coloured.name not in str(metadata)


def test_unfinished_run_brings_its_preparation(coloured, tmp_path):
    running = shutil.copytree(coloured, tmp_path / 'run-running')
    shutil.rmtree(running / 'model')
    for name in (running, running / 'checkpoints' / 'best.pt'):
        classifier = load_classifier(str(name), torch.device('cpu'))
        assert classifier.data_config['crop_pct'] == 0.5 and tuple(classifier.data_config['mean']) == (0.25, 0.5, 0.5)
        assert classifier.data_config['input_size'] == (3, 32, 32) and classifier.num_classes == 2
    for text in ('model: [', 'model: 3', '[]', 'model: test_elsa_swin'):
        (running / 'recipe.yaml').write_text(text)
        with pytest.raises(ModelError, match=r"recipe\.yaml' does not say what model the run trains"):
            load_classifier(str(running), torch.device('cpu'))


def test_file_of_weights_goes_before_those_of_a_path(coloured, tmp_path):
    other = timm.create_model('test_elsa_swin', num_classes=2, img_size=32, kernel_size=3)
    torch.save(other.state_dict(), tmp_path / 'other.pt')
    for name in (coloured, f'local-dir:{coloured / "model"}'):
        model = load_classifier(str(name), torch.device('cpu'), checkpoint=str(tmp_path / 'other.pt')).model
        assert torch.equal(model.head.fc.weight, other.head.fc.weight)
        assert model.pretrained_cfg['label_names'] == ['blue', 'red']


@pytest.mark.parametrize('model, message', [
    ('test_elsa_swim', 'Near are test_elsa_swin'), ('elsa_swin_tinny.damo_in1k', 'Near are elsa_swin_tiny'),
    ('no/such', "got 'no/such', no such file or folder"),
    ('.', 'holds no config.json'), (__file__, 'nothing says what model it is of'),
])
def test_model_that_is_none(model, message, tmp_path, capsys, monkeypatch):
    Image.new('RGB', (9, 9)).save(tmp_path / 'x.png')
    monkeypatch.chdir(tmp_path)
    assert predict([str(tmp_path / 'x.png'), '--model', model]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: model: ') and message in error


def test_parts(tmp_path, trained):
    model = ('--model', f'local-dir:{trained.folder / "model"}')
    parts = {part: _measure(tmp_path, *model, '--part', part) for part in ('train', 'val', 'all')}
    assert [parts[p]['images'] for p in ('train', 'val', 'all')] == [150, 50, 200]
    for name in ('top1', 'loss'):
        mean = (150 * parts['train'][name] + 50 * parts['val'][name]) / 200
        assert parts['all'][name] == pytest.approx(mean)


def test_classes_are_matched_by_name(tmp_path, trained):
    folder = tmp_path / 'data'
    splits = load_splits(Recipe(limit=20))
    for i, target in enumerate(splits.train.targets):
        if target in (3, 7):
            name = {3: '3', 7: '7'}[target]
            (folder / name).mkdir(parents=True, exist_ok=True)
            splits.train.image(i).save(folder / name / f'{i}.png')
    model = ('--model', f'local-dir:{trained.folder / "model"}')
    found = _measure(tmp_path, *model, '--data', folder, '--part', 'all')
    assert found['images'] == 30 and found['top1'] > 80.
    (folder / '3').rename(folder / 'three')
    assert validate([*map(str, model), '--data', str(folder)]) == 2


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'no_such_model'], 'no_such_model'),
    (['--model', 'test_elsa_swin'], 'no weights are known'),
    (['--model', 'test_elsa_swin', '--no-pretrained'], 'it has 1000 classes, the data has 10'),
    (['--model', 'test_elsa_swin', '--checkpoint', 'absent.pth'], "checkpoint: got 'absent.pth', no such file"),
    (['--onnx', 'absent.onnx'], "onnx: got 'absent.onnx', no such file"),
    (['--onnx', __file__], 'cannot be read'),
    (['--data', 'nowhere'], 'nowhere'),
])
def test_errors_of_validate_are_one_line(arguments, message, capsys):
    assert validate(arguments) == 2
    assert message in capsys.readouterr().err


def test_predicts_files_folders_and_patterns(tmp_path, trained, capsys):
    images = trained.folder.parent / 'images'
    model = ['--model', f'local-dir:{trained.folder / "model"}', '--device', 'cpu']
    assert predict([str(images), *model, '--top-k', '3', '--output', str(tmp_path)]) == 0
    with open(tmp_path / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [Path(row['file']).name for row in rows] == [f'{i}.png' for i in range(6)]
    targets = load_splits(Recipe(limit=20)).val.targets[:6]
    assert sum(int(row['label1']) == target for row, target in zip(rows, targets)) >= 5
    for row in rows:
        assert 1. >= float(row['probability1']) >= float(row['probability2']) >= float(row['probability3']) > 0.
    assert f'{images / "0.png"}: {rows[0]["label1"]} ' in capsys.readouterr().out
    for name in ('contact.png', 'attention.png'):
        with Image.open(tmp_path / name) as image:
            assert len(image.convert('RGB').getcolors(1 << 24)) > 50

    pattern = [str(images / '[0-2].png'), str(images / '5.png'), str(images / '0.png')]
    onnx = ['--onnx', str(trained.folder / 'model.onnx')]
    assert predict([*pattern, *model, *onnx, '--output', str(tmp_path / 'onnx'), '--format', 'json']) == 0
    answers = json.loads((tmp_path / 'onnx' / 'predictions.json').read_text())
    assert [Path(a['file']).name for a in answers] == ['0.png', '1.png', '2.png', '5.png']
    assert [a['labels'][0] for a in answers] == [rows[i]['label1'] for i in (0, 1, 2, 5)]
    assert answers[0]['probabilities'][0] == pytest.approx(float(rows[0]['probability1']), abs=1e-4)
    assert not (tmp_path / 'onnx' / 'attention.png').exists()


def test_unreadable_image_is_reported_and_the_rest_classified(tmp_path, trained, capsys):
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'no image')
    good = trained.folder.parent / 'images' / '1.png'
    model = ['--model', f'local-dir:{trained.folder / "model"}', '--output', str(tmp_path / 'out')]
    assert predict([str(broken), str(good), *model]) == 1
    out = capsys.readouterr().out
    assert f'{broken}: cannot be read' in out and f'{good}: ' in out
    lines = (tmp_path / 'out' / 'predictions.csv').read_text().splitlines()
    assert len(lines) == 3 and lines[1] == str(broken)


@pytest.mark.parametrize('arguments, message', [
    (['nowhere/*.png', '--model', 'test_elsa_swin'], 'nowhere/*.png: no such image'),
    ([__file__, '--model', 'no_such_model'], 'no_such_model'),
])
def test_errors_of_predict_are_one_line(arguments, message, capsys):
    assert predict(arguments) == 2
    assert message in capsys.readouterr().err


def test_any_model_of_timm(tmp_path, trained, capsys):
    torch.manual_seed(0)
    import timm
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=4), str(tmp_path / 'resnet'))
    image = str(trained.folder.parent / 'images' / '1.png')
    assert predict([image, '--model', f'local-dir:{tmp_path / "resnet"}', '--output', str(tmp_path / 'out')]) == 0
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['contact.png', 'predictions.csv']


def test_names_of_files_and_classes_that_are_no_text(tmp_path, trained, capsys):
    """And a picture that cannot be drawn costs no table."""
    model = timm.create_model('test_elsa_swin', num_classes=3, img_size=32)
    save_folder(model, tmp_path / 'model', dict(label_names=['$x^{$', '\udcff\n', '\u732b']))
    (tmp_path / 'in').mkdir()
    files = [os.path.join(os.fsencode(tmp_path), b'in', name) for name in (b'$x^{$.png', b'\xff.png')]
    for file in files:
        shutil.copy(os.fsencode(trained.folder.parent / 'images' / '1.png'), file)
    arguments = [str(tmp_path / 'in'), '--model', str(tmp_path / 'model'), '--output', str(tmp_path / 'out')]
    assert predict(arguments) == 0 and predict([*arguments, '--format', 'json']) == 0
    assert '\\udcff.png: ' in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'attention.png', 'contact.png', 'predictions.csv', 'predictions.json']
    answers = json.loads((tmp_path / 'out' / 'predictions.json').read_text(encoding='utf-8'))
    assert [os.fsencode(a['file']) for a in answers] == files and sorted(answers[0]['classes']) == [0, 1, 2]


def test_a_picture_that_cannot_be_drawn_costs_no_prediction(tmp_path, trained, monkeypatch, caplog):
    monkeypatch.setattr('elsa_models.inference.figures._save', lambda *args: 1 / 0)
    images = str(trained.folder.parent / 'images')
    assert predict([images, '--model', str(trained.folder), '--output', str(tmp_path / 'out')]) == 0
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['predictions.csv']
    assert 'contact.png: is not drawn (ZeroDivisionError' in caplog.text and 'attention.png: is not' in caplog.text


@pytest.mark.parametrize('architecture', ['test_elsa_swin', 'test_vit'])
@pytest.mark.parametrize('key, values', [
    ('', [[], 3, None, 'x', {}]), ('architecture', [None, 3, [], {}, 'x']),
    ('pretrained_cfg', [3, 'x', [1], dict(a=1)]),
    ('model_args', [3, 'x', [1], dict(a=1)]), ('num_classes', ['x', 2.5, [1], {}]), ('label_names', [3, True]),
    ('pretrained_cfg.mean', [[], 'x']), ('pretrained_cfg.std', [{}]),
    ('pretrained_cfg.interpolation', ['x', 3, [1]]), ('pretrained_cfg.crop_pct', ['x', [1], math.nan, -1, 1e-9]),
    ('pretrained_cfg.mean', [[math.nan] * 3, [math.inf] * 3]),
    ('pretrained_cfg.std', [[0] * 3, [math.nan] * 3, [-1] * 3]),
    ('pretrained_cfg.crop_mode', ['x', 3]), ('label_names', [[None, None], [{}, {}]]),
])
def test_config_of_wrong_types_is_one_error(architecture, key, values, tmp_path, capsys):
    model = timm.create_model(architecture, num_classes=2, img_size=32)
    save_folder(model, tmp_path, {})
    Image.new('RGB', (40, 40)).save(tmp_path / 'x.png')
    file = tmp_path / 'config.json'
    good = file.read_text()
    *inside, last = key.split('.')
    for value in values:
        config = json.loads(good)
        (config[inside[0]] if inside else config)[last] = value
        file.write_text(json.dumps(config if key else value))
        data = ['--data', 'digits', '--limit', '2']
        for script, arguments in ((predict, [str(tmp_path / 'x.png')]), (validate, data)):
            assert script([*arguments, '--model', str(tmp_path)]) == 2, value
            assert capsys.readouterr().err.startswith('error: ')


@pytest.mark.parametrize('architecture', ['test_elsa_swin', 'test_vit'])
@pytest.mark.parametrize('size', [[3, 0, 0], [3, 32], [3, 32.5, 32], [3, 1e9, 1e9], [True] * 3])
def test_input_size_that_is_none_is_one_error(architecture, size, tmp_path, capsys):
    save_folder(timm.create_model(architecture, num_classes=2), tmp_path, {})
    Image.new('RGB', (40, 40)).save(tmp_path / 'x.png')
    config = json.loads((tmp_path / 'config.json').read_text())
    config['pretrained_cfg']['input_size'] = size
    config['model_args'] = {}  # or timm takes their img_size
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert predict([str(tmp_path / 'x.png'), '--model', str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith('error: ')


def test_weights_that_compute_no_numbers_give_no_answer(tmp_path, capsys):
    model = timm.create_model('test_vit', num_classes=2)  # whose loading is timm's
    with torch.no_grad():
        model.head.bias[1] = math.nan
    save_folder(model, tmp_path, {})
    Image.new('RGB', (40, 40)).save(tmp_path / 'x.png')
    assert predict([str(tmp_path / 'x.png'), '--model', str(tmp_path)]) == 2
    assert 'its outputs are no finite numbers' in capsys.readouterr().err
