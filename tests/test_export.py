"""ONNX files, checked here by their own means: what they hold, what runtimes make of them, what is refused."""
import errno
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import assert_near, drawn_picture
from timm.data import create_transform, resolve_model_data_config
from torch.nn.utils import parametrizations, prune, weight_norm

import elsa_models
from elsa_models import export_onnx
from elsa_models._images import find_images
from elsa_models.export import rewrite_for_runtimes
from elsa_models.export.onnx import _load_images
from elsa_models.export.resize import resize_matrices
from elsa_models.inference import ModelError, load_classifier
from elsa_models.layers import ElsaAttention
from elsa_models.layers.rotated_conv import RotatedDepthwiseConv2d

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

SMALL = ['test_elsa_swin', 'test_elsa_volo']
LARGE = [n for n in timm.list_models(['elsa_swin_*', 'elsa_volo_*'])]
# all that any file may hold, of ONNX's own domain
OPERATORS = {
    'Abs', 'Add', 'And', 'Cast', 'Concat', 'Conv', 'Div', 'Equal', 'Expand', 'Gather', 'Gelu', 'Gemm', 'Greater',
    'GreaterOrEqual', 'Identity', 'LayerNormalization', 'Less', 'MatMul', 'Max', 'Min', 'Mod', 'Mul', 'Neg', 'Not',
    'Or', 'Pad', 'Range', 'Reciprocal', 'ReduceMax', 'ReduceMean', 'ReduceSum', 'Relu', 'Reshape', 'Shape', 'Slice',
    'Softmax', 'Split', 'Sqrt', 'Squeeze', 'Sub', 'Transpose', 'Unsqueeze', 'Where',
}
FIXED = OPERATORS - {  # what is known in advance is not computed by the graph
    'Abs', 'And', 'Div', 'Equal', 'Greater', 'GreaterOrEqual', 'Identity', 'Less', 'Max', 'Min', 'Mod', 'Neg', 'Not',
    'Range', 'Reciprocal', 'ReduceSum', 'Sqrt', 'Sub', 'Where',
}


def _model(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():  # every parameter shows in the result
            parameter.add_(.02 * torch.randn_like(parameter))
    return model.eval()


def _shallow(name='test_elsa_swin', **kwargs):
    """Two stages of a block, for tests of what is around a graph; a VOLO as it is."""
    return _model(name, **({} if 'volo' in name else dict(depths=(1, 1), num_heads=(1, 2))), **kwargs)


def _bytes(model):
    return 4 * sum(p.numel() for p in model.parameters())


def _session(path):
    return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])


def _run(path, images):
    return [torch.from_numpy(y) for y in _session(path).run(None, {'image': images.numpy()})]


def _metadata(path):
    return {p.key: p.value for p in onnx.load(str(path)).metadata_props}


def _operators(path):
    proto = onnx.load(str(path))
    assert {n.domain for n in proto.graph.node} == {''} and not proto.functions
    assert [(i.domain, i.version) for i in proto.opset_import] == [('', 20)]
    return {n.op_type for n in proto.graph.node}


def _assert_agrees(path, model, images, tolerance=1e-4):
    with torch.no_grad():
        expected = model(images)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    for y, e in zip(_run(path, images), expected, strict=True):
        assert (y - e).abs().max() <= tolerance * e.abs().max()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    image = pytest.importorskip('PIL.Image')
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = np.kron(rng.integers(0, 256, (6, 7, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        image.fromarray(pixels).save(folder / f'{i}.png')
    return folder


@pytest.fixture(scope='module', params=SMALL)
def exported(request, tmp_path_factory):
    """A model and its file, whose batch is dynamic."""
    model = _model(request.param)
    return model, export_onnx(model, tmp_path_factory.mktemp('exported') / 'model.onnx')


@pytest.fixture(scope='module', params=SMALL)
def exported_open(request, tmp_path_factory, images):
    """A model and its file, whose batch, height and width are dynamic."""
    model = _shallow(request.param, dynamic_img_size=True)  # the slow set has whole ones
    path = tmp_path_factory.mktemp('exported_open') / 'model.onnx'
    return model, export_onnx(model, path, dynamic_size=True, images=images)


# what is written


def test_dynamic_batch(exported):
    model, path = exported
    assert _operators(path) <= FIXED
    for batch in (1, 2, 5):
        _assert_agrees(path, model, torch.randn(batch, 3, 64, 64))
    image, = _session(path).get_inputs()
    assert image.name == 'image' and image.shape == ['batch', 3, 64, 64]
    assert [o.name for o in _session(path).get_outputs()] == ['logits']
    assert list(path.parent.iterdir()) == [path]


def test_dynamic_size(exported_open):
    model, path = exported_open
    assert _operators(path) <= OPERATORS
    assert _session(path).get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    for batch, height, width in ((1, 64, 64), (2, 48, 80), (1, 65, 61), (3, 97, 50), (1, 128, 192)):
        _assert_agrees(path, model, torch.randn(batch, 3, height, width))


def test_fixed_rectangle(tmp_path):
    model = _shallow(img_size=(50, 70))
    path = export_onnx(model, tmp_path / 'model.onnx', dynamic_batch=False)
    assert _session(path).get_inputs()[0].shape == [1, 3, 50, 70]
    _assert_agrees(path, model, torch.randn(1, 3, 50, 70))


@pytest.mark.parametrize('name, outputs', [
    ('test_elsa_swin', ['features_4', 'features_8', 'features_16', 'features_32']),
    ('test_elsa_volo', ['features_0', 'features_1', 'features_2', 'features_3']),
])
def test_feature_pyramid(tmp_path, name, outputs):
    model = _model(name, features_only=True)
    path = export_onnx(model, tmp_path / 'model.onnx')
    assert [o.name for o in _session(path).get_outputs()] == outputs
    _assert_agrees(path, model, torch.randn(2, 3, 64, 64))
    assert json.loads(_metadata(path)['feature_strides']) == model.feature_info.reduction()


def test_preprocessing_in_the_graph(tmp_path):
    model = _shallow()
    path = export_onnx(model, tmp_path / 'model.onnx', preprocess=True)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[k]) for k in ('mean', 'std'))
    normalised = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert_near(_run(path, pixels)[0], model(normalised), 1e-4)


@pytest.mark.parametrize('mode, size, from_size', [
    ('center', (64, 64), (190, 240)), ('center', (48, 80), (65, 201)), ('squash', (64, 64), (50, 40)),
    ('border', (48, 80), (130, 90)), ('border', (64, 64), (3, 5))])
def test_matrices_resize_and_crop_as_timm_does(mode, size, from_size):
    picture = drawn_picture(*from_size)
    pixels = torch.tensor(np.array(picture)).float()
    for interpolation in ('bilinear', 'bicubic', 'lanczos', 'nearest'):
        config = dict(
            input_size=(3, *size), mean=(0.5, 0.3, 0.2), std=(0.5,) * 3, crop_pct=0.9, crop_mode=mode,
            interpolation=interpolation)
        rows, columns, margin = resize_matrices(from_size, size, config)
        found = columns @ (rows @ pixels.flatten(1)).unflatten(1, pixels.shape[1:])
        expected = create_transform(**config, use_prefetcher=True)(picture).permute(1, 2, 0)
        assert (found.clamp(0, 255) + margin - expected).abs().max() < 1.5  # Pillow rounds twice


def test_resizing_in_the_graph(tmp_path):
    openvino = pytest.importorskip('openvino')
    model = _shallow()
    path = export_onnx(model, tmp_path / 'model.onnx', preprocess=True, resize_from=(90, 130))
    assert json.loads(_metadata(path)['resize_from']) == [90, 130]
    picture = drawn_picture(90, 130)
    pixels = torch.from_numpy(np.array(picture))[None]
    found, = _run(path, pixels)
    compiled = openvino.Core().compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    assert_near(torch.from_numpy(compiled([pixels.numpy()])[0]), found, 1e-4)
    with torch.no_grad():
        assert_near(found, model(create_transform(**resolve_model_data_config(model))(picture)[None]), 2e-2)
    with pytest.raises(ModelError, match='takes pictures of 90 x 130 pixels alone'):
        load_classifier(str(path), torch.device('cpu'))


def test_float16(tmp_path):
    model = _shallow(embed_dim=96)
    path = export_onnx(model, tmp_path / 'half.onnx', precision='float16')
    assert path.stat().st_size < .75 * _bytes(model)
    x = torch.randn(2, 3, 64, 64)
    _assert_agrees(path, model, x, 2e-2)
    with torch.no_grad(), pytest.raises(AssertionError):
        _assert_agrees(path, model, x, 1e-6)
    assert next(model.parameters()).dtype == torch.float32


def test_int8(tmp_path, images):
    model = _shallow(embed_dim=96)
    path = export_onnx(model, tmp_path / 'int8.onnx', precision='int8', images=images, preprocess=True)
    assert path.stat().st_size < .5 * _bytes(model)
    nodes = onnx.load(str(path)).graph.node
    assert {n.op_type for n in nodes} <= FIXED | {'QuantizeLinear', 'DequantizeLinear'}
    # every linear layer and nothing else
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    quantised = {o for n in nodes if n.op_type == 'DequantizeLinear' for o in n.output}
    assert sum(n.op_type in ('MatMul', 'Gemm') and n.input[1] in quantised for n in nodes) == linears
    assert list(tmp_path.iterdir()) == [path]


def test_images_that_training_skips_are_skipped(images, tmp_path, caplog):
    folder = shutil.copytree(images, tmp_path / 'pictures')
    number = len(find_images([str(folder)]))
    (folder / 'broken.jpg').write_bytes(b'no image')
    (folder / '.hidden.jpg').write_bytes(b'no image')
    assert len(_load_images(folder, resolve_model_data_config(_shallow()), (64, 64))) == number
    assert caplog.text.count('cannot be read as an image') == 1
    (tmp_path / 'none').mkdir()
    shutil.move(folder / 'broken.jpg', tmp_path / 'none')
    with pytest.raises(ValueError, match='images: got .*none can be read'):
        export_onnx(_shallow(), tmp_path / 'model.onnx', images=tmp_path / 'none')


def test_metadata(tmp_path):
    model = _shallow(num_classes=3)
    path = export_onnx(model, tmp_path / 'model.onnx', label_names=['a', 'b', 'ü'])
    metadata = _metadata(path)
    assert json.loads(metadata['label_names']) == ['a', 'b', 'ü']
    assert metadata['architecture'] == 'test_elsa_swin' and metadata['precision'] == 'float32'
    assert json.loads(metadata['img_size']) == [64, 64]
    assert json.loads(metadata['data_config'])['mean'] == list(model.pretrained_cfg['mean'])
    assert json.loads(metadata['pretrained_cfg'])['paper_ids'] == 'arXiv:2112.12786'
    assert _session(path).get_modelmeta().custom_metadata_map == metadata


def test_labels_of_a_saved_model(tmp_path):
    from timm.models import save_for_hf
    model = _shallow(num_classes=2)
    save_for_hf(model, str(tmp_path / 'saved'), model_config=dict(
        label_names=['x', 'y'], model_args=dict(depths=(1, 1), num_heads=(1, 2))))
    model = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    assert json.loads(_metadata(export_onnx(model, tmp_path / 'a.onnx'))['label_names']) == ['x', 'y']
    model.reset_classifier(3)
    assert 'label_names' not in _metadata(export_onnx(model, tmp_path / 'b.onnx'))


def test_external_data_only_when_needed(tmp_path, monkeypatch):
    model = _shallow(embed_dim=96)
    monkeypatch.setattr(elsa_models.export.onnx, '_MAX_PROTOBUF', 10 ** 6)
    path = export_onnx(model, tmp_path / 'model.onnx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.onnx', 'model.onnx.data']
    assert path.stat().st_size < 10 ** 6
    _assert_agrees(path, model, torch.randn(2, 3, 64, 64))
    (tmp_path / 'elsewhere').mkdir()
    for file in ('model.onnx', 'model.onnx.data'):  # the pair can be moved
        shutil.move(tmp_path / file, tmp_path / 'elsewhere' / file)
    _assert_agrees(tmp_path / 'elsewhere' / 'model.onnx', model, torch.randn(1, 3, 64, 64))


def _shape_environments():
    return [x for x in gc.get_objects() if type(x) is torch.fx.experimental.symbolic_shapes.ShapeEnv]


def test_model_is_left_as_it_was(tmp_path):
    model = _shallow().train()
    model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    others = _shape_environments()  # of tests before this one
    export_onnx(model, tmp_path / 'model.onnx')
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    # PyTorch keeps them, and a thousand entries in each
    assert not any(x.fake_tensor_cache for x in _shape_environments() if all(x is not y for y in others))


def test_models_of_timm(tmp_path):
    model = _model('test_vit')
    path = export_onnx(model, tmp_path / 'model.onnx')
    _assert_agrees(path, model, torch.randn(2, 3, 160, 160))


@pytest.mark.slow
@pytest.mark.parametrize('name', LARGE)
def test_every_model(tmp_path, name):
    model = _model(name)
    path = export_onnx(model, tmp_path / 'model.onnx', dynamic_batch=False)  # which checks the outputs
    assert _operators(path) <= FIXED


@pytest.mark.slow
@pytest.mark.parametrize('name', ['elsa_swin_tiny', 'elsa_volo_d1_224'])
def test_every_family_at_any_size(tmp_path, name):
    path = export_onnx(_model(name, dynamic_img_size=True), tmp_path / 'model.onnx', dynamic_size=True)
    assert _operators(path) <= OPERATORS


# the rewritten model


@pytest.mark.parametrize('width', [1, 2, 4, 8, 16])
@pytest.mark.parametrize('bias, dilation', [(True, 1), (False, 3)])
def test_rewritten_attention(width, bias, dilation):
    attn = ElsaAttention(
        48, 3, kernel_size=5, qk_dim=32, group_width=width, qkv_bias=bias, dilation=dilation).double().eval()
    x = torch.randn(2, 9, 11, 48, dtype=torch.float64)
    rewritten = rewrite_for_runtimes(attn)
    assert isinstance(rewritten.attn_conv, RotatedDepthwiseConv2d) == (width in (2, 4, 8))
    assert isinstance(attn.attn_conv, torch.nn.Conv2d)
    assert_near(rewritten(x), attn(x), 1e-12)


# what is refused


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(precision='float8'), ValueError, "precision: got 'float8', must be one of"),
    (dict(precision='int8'), ValueError, 'images: got None'),
    (dict(opset=17), ValueError, 'opset: got 17, must be 20 to'),
    (dict(opset=99), ValueError, 'opset: got 99, must be 20 to'),
    (dict(img_size=96), ValueError, r'img_size: got \(96, 96\), must be \(64, 64\)'),
    (dict(img_size=(64, 64, 3)), ValueError, 'img_size: got'),
    (dict(dynamic_size=True), ValueError, 'dynamic_size: .* dynamic_img_size=True'),
    (dict(images='/nowhere'), FileNotFoundError, "images: got '/nowhere'"),
    (dict(resize_from=(9, 9)), ValueError, 'resize_from: is for preprocess=True'),
    (dict(resize_from=(9, 0), preprocess=True), ValueError, r'resize_from: got \(9, 0\)'),
    (dict(label_names=['one']), ValueError, 'label_names: got 1 names, must be 1000'),
])
def test_bad_arguments(tmp_path, kwargs, error, message):
    with pytest.raises(error, match=message):
        export_onnx(_model('test_elsa_swin'), tmp_path / 'model.onnx', **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_bad_paths(tmp_path):
    model = _model('test_elsa_swin')
    with pytest.raises(FileNotFoundError, match="path: got .*absent.model.onnx', its folder does not exist"):
        export_onnx(model, tmp_path / 'absent' / 'model.onnx')
    with pytest.raises(ValueError, match='a folder; must be a file'):
        export_onnx(model, tmp_path)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='which holds no image files'):
        export_onnx(model, tmp_path / 'model.onnx', images=tmp_path / 'empty')
    assert [p.name for p in tmp_path.iterdir()] == ['empty']


def test_what_a_killed_export_has_left_goes_with_the_next(tmp_path):
    left = tmp_path / '.model.onnx-0123abcd.tmp'
    left.mkdir()
    (left / 'model.onnx').write_bytes(b'half')
    export_onnx(_shallow(), tmp_path / 'model.onnx')
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']


@pytest.mark.parametrize('number, kind, message', [
    (errno.EACCES, PermissionError, 'path: got .*cannot be written to .Permission denied'),
    (errno.ENOSPC, OSError, 'No space left on device'),
])
def test_folder_that_cannot_be_written_to(tmp_path, monkeypatch, number, kind, message):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(Path, 'mkdir', refuse)
    with pytest.raises(OSError, match=message) as caught:
        export_onnx(_model('test_elsa_swin'), tmp_path / 'model.onnx')
    assert caught.type is kind and list(tmp_path.iterdir()) == []


def test_half_precision_model(tmp_path):
    with pytest.raises(ValueError, match='model: got parameters that are not float32'):
        export_onnx(_model('test_elsa_swin').half(), tmp_path / 'model.onnx')


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'onnxscript'])
def test_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"The package '{package}' is not installed.*\[onnx\]"):
        export_onnx(_model('test_elsa_swin'), tmp_path / 'model.onnx')
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_numbers_are_refused():
    x = torch.ones(1, 3)
    with pytest.raises(RuntimeError, match='differs from the model in logits by nan'):
        elsa_models.export.onnx._compare('logits', x, x * float('nan'), 'float32', x.shape)


def test_a_wrong_graph_is_not_written(tmp_path, monkeypatch):
    (tmp_path / 'model.onnx').write_bytes(b'earlier')

    def rewrite_wrongly(model):
        model = rewrite_for_runtimes(model)
        model.head.fc.bias = torch.nn.Parameter(model.head.fc.bias + .01)
        return model
    monkeypatch.setattr(elsa_models.export.onnx, 'rewrite_for_runtimes', rewrite_wrongly)
    with pytest.raises(RuntimeError, match='differs from the model in logits by'):
        export_onnx(_shallow(), tmp_path / 'model.onnx')
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b'earlier']


# other runtimes


def _assert_openvino_agrees(path, model, sizes):
    openvino = pytest.importorskip('openvino')
    compiled = openvino.Core().compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(x)
        y = torch.from_numpy(compiled([x.numpy()])[0])
        assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_openvino(exported):
    model, path = exported
    _assert_openvino_agrees(path, model, [(1, 64, 64), (3, 64, 64)])


def test_openvino_at_any_size(exported_open):
    model, path = exported_open
    _assert_openvino_agrees(path, model, [(1, 64, 64), (2, 49, 91), (1, 97, 50), (1, 40, 130)])


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_torch_export_saved_and_loaded(tmp_path, name):
    model = _model(name, dynamic_img_size=True)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    torch.export.save(program, tmp_path / 'model.pt2')
    loaded = torch.export.load(tmp_path / 'model.pt2').module()
    for batch, height, width in ((2, 96, 96), (3, 66, 80), (2, 81, 97), (2, 97, 150), (5, 128, 66)):
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            assert_near(loaded(x), model(x), 1e-5)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize('name', SMALL)
def test_ahead_of_time_compiled(tmp_path, name):
    model = _model(name)
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
    compiled = torch._inductor.aoti_load_package(path)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            assert_near(compiled(x), model(x), 1e-4)


@pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning')
@pytest.mark.parametrize('change', [
    weight_norm,
    parametrizations.weight_norm,
    lambda layer: prune.l1_unstructured(layer, 'weight', .3),
], ids=['weight_norm', 'parametrised', 'pruned'])
def test_weights_that_are_computed(tmp_path, change):
    model = _shallow()
    for layer in list(model.modules()):
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            change(layer)
    path = export_onnx(model, tmp_path / 'model.onnx')
    _assert_agrees(path, model, torch.randn(2, 3, 64, 64))
