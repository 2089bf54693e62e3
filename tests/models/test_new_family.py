"""A family in one file, box_family.py, is served by all that is generic, with no other file changed."""
import ast
import importlib
import inspect
import re
import types
from pathlib import Path

import pytest
import test_contract
import timm
import torch
from timm.models import _registry

import elsa_models
from elsa_models.commands import models as models_command
from elsa_models.dense import DenseBackbone
from elsa_models.hub.convert import convert
from elsa_models.inspect import count_macs, count_macs_by_op
from elsa_models.models import _family, families, family_of

NAME = 'test_box_swin'
# a test module is no part of the package, and the table of parameters lists what the package registers
OF_THE_PACKAGE = ('test_entry_point', 'test_number_of_parameters')


@pytest.fixture(scope='module', autouse=True)
def family():
    """The family, for as long as the tests of this file run."""
    registries = [_family._families, *(x for x in vars(_registry).values() if isinstance(x, (dict, set)))]
    before = [x.copy() for x in registries]
    yield importlib.import_module('box_family')
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    _registry._module_to_models['box_family'].clear()


def _for_the_family(test):
    """A test of the contract with everything it is parametrised by, but for the model of this file alone."""
    twin = types.FunctionType(
        test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    others = [m for m in test.pytestmark if not (m.name == 'parametrize' and m.args[0] == 'name')]
    twin.pytestmark = [*others, pytest.mark.parametrize('name', [NAME]).mark]
    return staticmethod(twin)


TestKeepsTheContract = type('TestKeepsTheContract', (), {
    name: _for_the_family(test) for name, test in vars(test_contract).items()
    if name.startswith('test_') and 'name' in inspect.signature(test).parameters and name not in OF_THE_PACKAGE})


def test_belongs_to_its_family():
    model = timm.create_model(NAME, device='meta')
    assert family_of(model) is family_of(NAME) is family_of(type(model)) is families()[-1]
    assert family_of(NAME).model_names == (NAME,)
    assert family_of('resnet18') is None and family_of(timm.create_model('resnet18', device='meta')) is None


def test_multiply_accumulates():
    model = timm.create_model(NAME, device='meta')
    by_op = count_macs_by_op(model)
    sides, dims, depths = (16, 8, 4, 2), (24, 48, 96, 192), (1, 1, 2, 1)
    assert by_op['gate'] == sum(n * s * s * d for n, s, d in zip(depths, sides, dims))
    assert sum(by_op.values()) == count_macs(model)


def test_starts_from_a_relative():
    swin = timm.models.SwinTransformer(
        img_size=64, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=2)
    model = timm.create_model(NAME)
    report = elsa_models.warm_start(model, swin)
    assert {k.rpartition('.attn.')[2] for k in report.left} == {'box.weight', 'box.bias', 'proj.weight', 'proj.bias'}
    assert torch.equal(model.layers[2].blocks[1].mlp.fc1.weight, swin.layers[2].blocks[1].mlp.fc1.weight)
    with pytest.raises(elsa_models.WeightsError, match=r"warm_start\(model, 'swin_tiny_patch4_window7_224.ms_in1k'\)"):
        timm.create_model(NAME, pretrained=True)


def test_conversion(tmp_path):
    model = timm.create_model(NAME, num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    conversion = convert(tmp_path / 'x.pth', NAME)
    assert conversion.kind == 'weights' and conversion.report.count('same') == len(model.state_dict())


@pytest.mark.parametrize('frozen_stages', [0, 3])
def test_dense_backbone(frozen_stages):
    backbone = DenseBackbone(NAME, frozen_stages=frozen_stages).eval()
    assert [tuple(m.shape[1:]) for m in backbone(torch.randn(1, 3, 33, 47))] == [
        (24, 9, 12), (48, 5, 6), (96, 3, 3), (192, 2, 2)]
    frozen = {n.split('.')[1] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == ({'patch_embed', 'layers_0', 'layers_1'} if frozen_stages else set())


def test_training_by_recipe(tmp_path):
    from elsa_models.training import ClassificationJob, Recipe, run_job
    recipe = Recipe(
        model=NAME, model_args=dict(img_size=32), epochs=1, limit=8, batch_size=8, hflip=0., color_jitter=0.,
        figures=True, output=str(tmp_path / 'output'))
    result = run_job(recipe, ClassificationJob)
    assert (result.folder / 'model.onnx').is_file() and not (result.folder / 'attention.png').exists()
    loaded = timm.create_model(f'local-dir:{result.folder / "model"}', pretrained=True)
    assert isinstance(loaded, family_of(NAME).model_cls)


def test_model_table(capsys):
    assert models_command.main([NAME]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith(f'| {NAME} | 64 x 64 | 0.')


def _names_in(path):
    """What a file's code says, docstrings and comments left out: names, attributes, imported modules, strings."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
        and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        yield from (getattr(node, field, None) or '' for field in ('id', 'attr', 'module', 'name')
                    if isinstance(getattr(node, field, None) or '', str))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (a.name for a in node.names)


def test_generic_code_names_no_family():
    root = Path(elsa_models.__file__).parent
    generic = [p for room in ('inspect', 'export', 'hub', 'dense', 'inference', 'training')
               for p in (root / room).rglob('*.py')]
    generic += [p for p in (root / 'models').glob('_*.py') if p.name != '__init__.py']
    mixers = {c.__name__ for c in vars(elsa_models.layers).values() if isinstance(c, type)} & {
        c.__name__ for c in elsa_models.layers.Mixer.__subclasses__()}
    own = {n for f in families() for n in (f.name, f.model_cls.__name__, *f.model_names)} | mixers
    assert len(own) > 20 and len(generic) > 30
    pattern = re.compile(rf'\b({"|".join(map(re.escape, own))})\b')
    found = [(path.name, m[0]) for path in generic for text in _names_in(path) if (m := pattern.search(text))]
    assert not found
