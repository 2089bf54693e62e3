import argparse
import dataclasses
import importlib

import pytest
import yaml

from elsa_models.training import BaseRecipe, Recipe, RecipeError, add_arguments, load_recipe


def _write(path, text):
    path.write_text(text)
    return path


def _parse(*argv, kind=Recipe):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, kind)
    return vars(parser.parse_args(argv))


def test_file_sets_values_and_leaves_the_rest(tmp_path):
    text = 'epochs: 3\nlr: 1e-3\nscale: [0.5, 1]\nmodel_args: {img_size: 32}'
    recipe = load_recipe(_write(tmp_path / 'r.yaml', text))
    expected = Recipe(epochs=3, lr=1e-3, scale=(0.5, 1.), model_args={'img_size': 32})
    assert recipe == expected
    assert recipe.lr == 0.001 and recipe.batch_size == Recipe().batch_size


def test_unknown_key_is_refused_by_name(tmp_path):
    path = _write(tmp_path / 'r.yaml', 'epoch: 3')
    with pytest.raises(RecipeError, match=r"r\.yaml: unknown key 'epoch'; did you mean 'epochs'"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="unknown key 'nonsense'"):
        load_recipe(overrides={'nonsense': 1})


@pytest.mark.parametrize('line, kind', [
    ('epochs: 1.5', 'a whole number'),
    ('epochs: true', 'a whole number'),
    ('epochs: null', 'a whole number'),
    ("epochs: '3'", 'a whole number'),
    ('lr: fast', 'a finite number'),
    ('lr: false', 'a finite number'),
    ('clip_grad: [1]', 'a finite number'),
    ('figures: 1', 'true or false'),
    ('model: 3', 'text'),
    ('scale: 0.5', 'a list of 2 numbers'),
    ('scale: [0.5, 0.6, 1]', 'a list of 2 numbers'),
    ('lr: .inf', 'a finite number'),
    ('lr: 1e999', 'a finite number'),
    (f'lr: 1{"0" * 400}', 'a finite number'),
    ('mean: [red]', 'a finite number'),
    ('model_args: [img_size]', 'a mapping of names to values'),
    ('model_args: {1: 2}', 'a mapping of names to values'),
])
def test_wrong_type_is_refused_by_name(tmp_path, line, kind):
    name = line.partition(':')[0]
    with pytest.raises(RecipeError, match=rf'r\.yaml: {name}: got .*must be {kind}'):
        load_recipe(_write(tmp_path / 'r.yaml', line))


@pytest.mark.parametrize('values', [
    {'epochs': 0}, {'batch_size': 0}, {'lr': -1.}, {'lr': float('nan')}, {'val_fraction': 0.}, {'val_fraction': 1.},
    {'epochs': 99999999999999999999}, {'epochs': 10 ** 5000}, {'limit': 2 ** 40},
    {'hflip': 1.5}, {'scale': (-1., 1.)}, {'limit': -1}, {'sched': 'cosin'}, {'interpolation': 'cubic'},
])
def test_value_out_of_range_is_refused_by_name(values):
    with pytest.raises(RecipeError, match=f'{next(iter(values))}: got '):
        Recipe(**values)


@pytest.mark.parametrize('text', ['- epochs', 'epochs', 'a: [', ''])
def test_file_that_is_no_mapping(tmp_path, text):
    path = _write(tmp_path / 'r.yaml', text)
    if not text:
        assert load_recipe(path) == Recipe()
    else:
        with pytest.raises(RecipeError, match=r'r\.yaml'):
            load_recipe(path)


@pytest.mark.parametrize('text', [
    'model_args: ' + '{a: ' * 5000 + '1' + '}' * 5000, 'model_args: ' + '[' * 5000 + ']' * 5000,
    'model_args: {a: ' + '[' * 50 + ']' * 50 + '}', 'model_args: &x {a: *x}', 'freeze: &x [*x]',
    f'epochs: {"9" * 5000}', '\0', 'a: \x80',
    # lists that stand for nine of the one before, 9 ** 15 parts in all
    'model_args: {a0: &a0 [0], ' + ', '.join(
        f'a{i + 1}: &a{i + 1} [{", ".join([f"*a{i}"] * 9)}]' for i in range(15)) + '}',
])
def test_file_that_nobody_wrote_for_this(tmp_path, text, capsys):
    with pytest.raises(RecipeError, match=r'r\.yaml: '):
        load_recipe(_write(tmp_path / 'r.yaml', text))
    value = text.partition(': ')[2] or '{'
    for arguments in (['--limit', value], ['--model-args', f'a={value}'], ['--clip-grad', value]):
        with pytest.raises((SystemExit, RecipeError)):
            load_recipe(overrides=_parse(*arguments))


def test_help_has_every_default_in_groups(capsys):
    with pytest.raises(SystemExit):
        _parse('--help')
    text = capsys.readouterr().out
    assert text.count('(default:') == len(dataclasses.fields(Recipe))
    for words in ('optimiser and schedule:', 'augmentation:', 'machine:', '(default: adamw)', '(default: 0.75 1.33'):
        assert words in ' '.join(text.split()), words


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match='absent.yaml'):
        load_recipe(tmp_path / 'absent.yaml')


def _kind(job):
    if job == 'classification':
        return Recipe
    pytest.importorskip({'detection': 'pycocotools', 'segmentation': 'segmentation_models_pytorch'}[job])
    module = importlib.import_module(f'elsa_models.training.jobs.{job}')
    return getattr(module, f'{job.title()}Recipe')


@pytest.mark.parametrize('job', ['classification', 'detection', 'segmentation'])
def test_every_value_has_an_option(job):
    kind = _kind(job)
    written = {
        'str': ['x'], 'int': ['96'], 'float': ['0.5'], 'bool': [], 'Optional[str]': ['x'], 'Optional[float]': ['0.5'],
        'Dict[str, Any]': ['a=1', 'b=[2, 3]'], 'Tuple[float, float]': ['0.5', '1'],
        'Optional[Tuple[float, ...]]': ['1'],
        'Tuple[str, ...]': ['a', 'b.*'], 'Optional[int]': ['2'], 'Tuple[float, ...]': ['1', '0.5'],
        'Tuple[int, ...]': ['96', '112'], 'Tuple[int, int]': ['96', '112'],
    }
    for field in dataclasses.fields(kind):
        name = getattr(field.type, '__name__', '') if isinstance(field.type, type) else str(field.type)
        words = written[name.replace('typing.', '')]
        if field.metadata['choices']:
            words = [field.metadata['choices'][-1]]
        overrides = _parse('--' + field.name.replace('_', '-'), *words, kind=kind)
        assert list(overrides) == [field.name]
        load_recipe(overrides=overrides, kind=kind)


def test_options_override_the_file(tmp_path):
    text = 'epochs: 3\nclip_grad: 1.\nonnx: true\nmodel_args: {img_size: 32, kernel_size: 5}'
    path = _write(tmp_path / 'r.yaml', text)
    recipe = load_recipe(path, _parse(
        '--epochs', '7', '--lr', '1e-4', '--clip-grad', 'null', '--no-onnx', '--name', '123', '--scale', '0.5', '1',
        '--model-args', 'kernel_size=3', '--model-args', 'depths=[1, 1]'))
    assert recipe == Recipe(
        epochs=7, lr=1e-4, clip_grad=None, onnx=False, name='123', scale=(0.5, 1.),
        model_args={'img_size': 32, 'kernel_size': 3, 'depths': [1, 1]})


def test_no_option_changes_nothing():
    assert _parse() == {}


def test_wrong_type_on_the_command_line_is_refused_by_name():
    with pytest.raises(RecipeError, match="epochs: got 'many'"):
        load_recipe(overrides=_parse('--epochs', 'many'))


def test_yaml_round_trip(tmp_path):
    recipe = Recipe(epochs=3, mean=(0.5,), model_args={'img_size': 32}, data='Bücher')
    path = tmp_path / 'r.yaml'
    path.write_text(recipe.to_yaml(), encoding='utf-8')
    assert load_recipe(path) == recipe
    assert list(yaml.safe_load(path.read_text(encoding='utf-8'))) == [f.name for f in dataclasses.fields(Recipe)]


def test_tuples_within_mappings_are_those_of_the_file(tmp_path):
    recipe = Recipe(model_args=dict(img_size=(48, 56), more=dict(depths=[(1, 2)])), opt_args=dict(betas=(0.8, 0.9)))
    assert load_recipe(_write(tmp_path / 'r.yaml', recipe.to_yaml())).differences(recipe) == []


def test_run_name_follows_the_data(tmp_path):
    assert Recipe().run_name == 'digits'
    assert Recipe(data=str(tmp_path / 'cats')).run_name == 'cats'
    assert Recipe(data=str(tmp_path / 'cats'), name='dogs').run_name == 'dogs'


def test_recipes_differ_by_what_decides_the_result():
    assert Recipe(workers=3, device='cpu', name='x').differences(Recipe()) == []
    differences = Recipe(lr=1., epochs=2).differences(Recipe(epochs=3))
    assert differences == ['epochs: 3 there, 2 here', 'lr: 0.001 there, 1.0 here']


def test_base_recipe_stands_alone(tmp_path):
    recipe = load_recipe(_write(tmp_path / 'r.yaml', 'lr: 1'), kind=BaseRecipe)
    assert recipe == BaseRecipe(lr=1.) and recipe.run_name == 'run'
    with pytest.raises(RecipeError, match="unknown key 'mixup'"):
        load_recipe(overrides=dict(mixup=1.), kind=BaseRecipe)
