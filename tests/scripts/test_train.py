import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'scripts' / 'train.py'


def _run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=600,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})


def test_digits_from_the_command_line(tmp_path):
    done = _run(
        '--config', ROOT / 'configs' / 'digits.yaml', '--epochs', 1, '--limit', 8, '--model-args', 'img_size=32',
        '--no-onnx', '--no-figures', '--name', 'mine', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'test accuracy: ' in done.stdout and '20 held-out images' in done.stdout
    assert 'epoch 1/1' in done.stderr and '100%' in done.stderr
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
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.yaml')), ids=lambda path: path.name)
def test_recipes_are_valid(path):
    from elsa_models.training import load_recipe
    from elsa_models.training.classification import create_model
    create_model(load_recipe(path), num_classes=3)
