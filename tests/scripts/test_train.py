import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from forked import Forked
from PIL import Image

import elsa_models  # noqa: F401
from elsa_models.training import ClassificationJob, World, load_recipe
from elsa_models.training.loop import create_optimizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'scripts' / 'train.py'


def _run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})


def _main(arguments):
    from elsa_models.commands.train import main
    sys.exit(main(arguments))


def test_digits_from_the_command_line(tmp_path):
    done = _run(
        '--config', ROOT / 'configs' / 'digits.yaml', '--epochs', 1, '--limit', 8, '--model-args', 'img_size=32',
        '--no-onnx', '--no-figures', '--name', 'mine', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'held-out accuracy: ' in done.stdout and 'of 20 images' in done.stdout
    assert 'epoch 1: loss ' in done.stderr and 'top1 ' in done.stderr
    assert 'epoch 1/1' not in done.stderr  # no bars where nobody looks
    folder = tmp_path / 'output' / 'mine'
    assert str(Path('output') / 'mine' / 'model') in done.stdout and (folder / 'model' / 'config.json').is_file()
    recipe = yaml.safe_load((folder / 'recipe.yaml').read_text())
    # from the command line, from the file, and from both
    assert recipe['epochs'] == 1 and recipe['crop_pct'] == 1.
    assert recipe['model_args'] == {'img_size': 32, 'drop_path_rate': 0.05}


@pytest.mark.parametrize('arguments, message', [
    (['--epochs', 'many'], "error: epochs: got 'many'"),
    (['--config', 'absent.yaml'], 'absent.yaml'),
    (['--data', 'nowhere'], 'nowhere'),
    (['--epoch', '3'], 'unrecognized arguments: --epoch'),
])
def test_errors_are_one_line(tmp_path, arguments, message):
    process = Forked(_main, (arguments,), cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert message in errors.splitlines()[-1] and 'Traceback' not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pictures(tmp_path):
    """Two parts of two classes of four pictures."""
    for part in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / 'data' / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (40, 30), (60 * i, 0, 0)).save(tmp_path / 'data' / part / name / f'{i}.png')
    return tmp_path / 'data'


CLASSIFIERS = [p for p in sorted((ROOT / 'configs').rglob('*.yaml')) if p.parent.name in ('configs', 'imagenet')]


@pytest.mark.parametrize('path', CLASSIFIERS, ids=lambda path: path.stem)
def test_recipe_builds(path, pictures, monkeypatch):
    """Model, data, loss, optimiser and schedule of every recipe; the model holds no values."""
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: create(*args, device='meta', **kwargs))
    recipe = load_recipe(path)
    assert path.stem.endswith(recipe.model.partition('.')[0]) or path.parent.name == 'configs'
    overrides = dict(data=str(pictures), pretrained=False, workers=0, reestimate=0)
    if recipe.token_labels not in (None, 'image'):
        overrides.update(token_labels='image')  # label maps have tests of their own
    recipe = load_recipe(path, overrides)
    job = ClassificationJob(recipe, World(torch.device('meta')))
    size = job.data_config['input_size']
    images, targets = next(iter(job.train_loader.loader.loader))
    assert images.dtype == torch.uint8 and tuple(images.shape) == (8, *size) and targets.shape == (8,)
    if path.parent.name == 'imagenet':
        assert recipe.name == path.stem  # or a run of one would replace that of another
        last = path.stem.rpartition('_')[2]
        assert size[1] == (int(last) if last.isdigit() else 224)
    optimizer, scheduler = create_optimizer(recipe, job.model, 10)
    decays = {group['weight_decay'] for group in optimizer.param_groups}
    assert decays == {0., recipe.weight_decay}
    rates = []
    for step in range(10 * (recipe.epochs + recipe.cooldown_epochs)):
        scheduler.step_update(step)
        rates.append(max(group['lr'] for group in optimizer.param_groups))
    assert rates[0] == pytest.approx(recipe.warmup_lr) and recipe.lr * 0.9 < max(rates) <= recipe.lr
    assert rates[-1] < max(rates) / 1.8 and rates[-1] >= recipe.min_lr
    if path.parent.name == 'imagenet':
        assert recipe.amp == ('bfloat16' if 'refiner' in path.stem else 'float16')  # small entries of its maps
        assert recipe.checkpoint_steps and recipe.batch_size >= 240
