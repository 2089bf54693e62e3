"""The command `elsa` and the scripts that call its parts."""
import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elsa_command
import elsa_models
from elsa_models import commands
from elsa_models.training import RecipeError, load_recipe
from elsa_models.training.config import recipe_names

ROOT = Path(__file__).parents[1]


def test_every_module_is_a_command():
    modules = {p.stem.replace('_', '-') for p in Path(commands.__file__).parent.glob('[!_]*.py')}
    assert modules == set(elsa_command.COMMANDS)


def test_entry_point():
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    name, target = config['options.entry_points']['console_scripts'].strip().split(' = ')
    module, _, function = target.partition(':')
    assert name == 'elsa' and getattr(importlib.import_module(module), function) is elsa_command.main


@pytest.mark.parametrize('argv', [[], ['-h'], ['--help']])
def test_usage(argv, capsys):
    assert elsa_command.main(argv) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf'^  {name} +{re.escape(text)}$', out, re.M) for name, text in elsa_command.COMMANDS.items())


@pytest.mark.parametrize('name', elsa_command.COMMANDS)
def test_help(name, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['elsa', name, '--help'])
    with pytest.raises(SystemExit) as stop:
        elsa_command.main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f'usage: elsa {name} ')
    examples = re.findall(r'elsa ([\w-]+)', importlib.import_module(
        f'elsa_models.commands.{name.replace("-", "_")}').__doc__)
    assert name in examples and set(examples) <= set(elsa_command.COMMANDS)


def test_unknown_command(capsys):
    assert elsa_command.main(['exprt', 'model.onnx']) == 2
    assert capsys.readouterr().err == "error: elsa has no command 'exprt'; did you mean 'export'?\n"
    assert elsa_command.main(['xyz']) == 2
    assert 'elsa --help' in capsys.readouterr().err


def test_status_of_a_command(capsys):
    assert elsa_command.main(['predict', 'nothing.png', '--model', 'no/such/folder']) == 2
    assert capsys.readouterr().err.startswith('error: ')


def test_scripts_are_the_commands():
    used = set()
    for path in (ROOT / 'scripts').glob('*.py'):
        text = path.read_text()
        module = re.search(r'^from elsa_models\.commands\.(\w+) import main$', text, re.M)
        if module:
            used.add(module[1].replace('_', '-'))
            assert len(text.splitlines()) < 12 and f'`elsa {module[1].replace("_", "-")}`' in text
    assert used == set(elsa_command.COMMANDS) - {'quickstart', 'recipes'}  # the former's script needs Python alone


@pytest.mark.parametrize('argument', ['--help', '--version', 'trian'])
def test_what_is_offered_is_told_without_pytorch(argument):
    code = f'import sys, elsa_command; elsa_command.main([{argument!r}]); assert "torch" not in sys.modules'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    if argument == '--version':
        assert done.stdout == f'elsa_models {elsa_models.__version__}\n'


def test_list_of_recipes(capsys):
    assert elsa_command.main(['recipes']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert any(re.match('folder +your own pictures', line) for line in lines)


def test_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()  # pictures, say
    names = recipe_names()
    assert {'digits', 'folder', 'finetune', 'imagenet/elsa_swin_tiny', 'detection/shapes'} <= set(names)
    assert not any(name.startswith('study') for name in names)
    assert load_recipe('digits') == load_recipe(ROOT / 'configs' / 'digits.yaml')
    assert load_recipe('imagenet/elsa_swin_tiny').model == 'elsa_swin_tiny'
    (tmp_path / 'digits').write_text('epochs: 3')  # a file goes before a name
    assert load_recipe('digits').epochs == 3
    with pytest.raises(RecipeError, match="^diggits: is no file, and no recipe .*; did you mean 'digits'"):
        load_recipe('diggits')
    with pytest.raises(RecipeError, match='^nothing.yaml: cannot be read'):
        load_recipe('nothing.yaml')
