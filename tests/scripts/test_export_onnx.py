import json

import pytest
import timm
import torch
from helpers import keyed_state_dict
from timm.models import save_for_hf

from elsa_models.commands import export

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


@pytest.fixture(scope='module')
def main():
    return lambda *arguments: export.main([str(x) for x in arguments])


def _input(path):
    return [d.dim_param or d.dim_value for d in onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim]


def test_name(main, tmp_path, capsys):
    path = tmp_path / 'model.onnx'
    assert main('test_elsa_swin', path, '--img-size', 48, 80, '--fixed-batch', '--features-only', '--preprocess') == 0
    assert capsys.readouterr().out.startswith(f'wrote {path}: ')
    assert _input(path) == [1, 48, 80, 3]
    assert [o.name for o in onnx.load(str(path)).graph.output] == [f'features_{s}' for s in (4, 8, 16, 32)]


def test_fine_tuned_folder(main, tmp_path):
    model = timm.create_model('test_elsa_swin', num_classes=2)
    save_for_hf(model, str(tmp_path / 'run' / 'model'), model_config=dict(label_names=['no', 'yes']))
    assert main(tmp_path / 'run', tmp_path / 'model.onnx') == 0
    proto = onnx.load(str(tmp_path / 'model.onnx'))
    assert json.loads({p.key: p.value for p in proto.metadata_props}['label_names']) == ['no', 'yes']
    assert _input(tmp_path / 'model.onnx') == ['batch', 3, 64, 64]


def test_checkpoint_of_the_authors(main, tmp_path, monkeypatch):
    """Their names of entries, inside a training checkpoint."""
    entries = keyed_state_dict('tiny')
    torch.save({'state_dict': entries, 'epoch': 3}, tmp_path / 'tiny.pth.tar')
    models = []

    def written(model, path, **kwargs):
        models.append(model)
        path.write_bytes(b'')
        return path

    monkeypatch.setattr(export, 'export_onnx', written)
    arguments = ('elsa_swin_tiny', tmp_path / 'x.onnx', '--checkpoint', tmp_path / 'tiny.pth.tar')
    assert main(*arguments) == 0 and main(*arguments, '--num-classes', 1000) == 0
    assert main(*arguments, '--features-only') == 0
    assert len(models) == 3
    for model in models[:2]:
        assert torch.equal(model.head.fc.weight, entries['head.weight'])
        assert torch.equal(model.patch_embed.proj.weight, entries['patch_embed.proj.weight'])


def test_checkpoint_of_a_training(main, tmp_path, capsys):
    model = timm.create_model('test_elsa_swin', num_classes=2)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'two.pth')
    arguments = ('test_elsa_swin', tmp_path / 'x.onnx', '--fixed-batch', '--checkpoint', tmp_path / 'two.pth')
    assert main(*arguments, '--num-classes', 2) == 0
    head = model.head.fc.bias.detach().numpy()
    weights = onnx.load(str(tmp_path / 'x.onnx')).graph.initializer
    assert any((onnx.numpy_helper.to_array(x) == head).all() for x in weights if list(x.dims) == [2])
    capsys.readouterr()
    assert main(*arguments) == 2  # 1000 classes: no random classifier in its place
    assert f"error: --checkpoint: '{tmp_path / 'two.pth'}' cannot be used. " in capsys.readouterr().err


def test_missing_weights_name_the_option(main, tmp_path, capsys):
    assert main('test_elsa_swin', tmp_path / 'x.onnx', '--pretrained') == 2
    error = capsys.readouterr().err
    assert 'no weights are known' in error and '--checkpoint FILE' in error


@pytest.mark.parametrize('arguments, message', [
    (['elsa_swim', 'x.onnx'], "model: got 'elsa_swim', must be a name of timm, "),
    (['tests/absent', 'x.onnx'], "model: got 'tests/absent', no such file or folder."),
    (['test_elsa_swin', 'absent/x.onnx'], "path: got 'absent/x.onnx', its folder does not exist"),
    (['test_elsa_swin', 'x.onnx', '--checkpoint', 'absent.pth'], "checkpoint: got 'absent.pth', no such file."),
    (['test_elsa_swin', 'x.onnx', '--opset', '12'], 'opset: got 12, must be 20 to'),
    (['test_elsa_swin', 'x.onnx', '--precision', 'int8'], 'images: got None'),
])
def test_errors_are_one_line(main, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith(f'error: {message}')
    assert list(tmp_path.iterdir()) == []
