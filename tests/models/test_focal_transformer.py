"""Focal Transformer against the authors' numbers and a plain float64 network; what its weights go with."""
import numpy as np
import pytest
import torch
from focal_reference import MISTAKES, network, to_authors
from helpers import DATA, assert_near, max_error
from keyed import check_record, keyed, keyed_state_dict, load, randn
from timm import create_model

from elsa_models.dense.features import DenseBackbone
from elsa_models.hub import WeightsError
from elsa_models.inspect import count_macs
from elsa_models.models.focal_transformer import to_own_names

TINY, USECONV = 'focal_tiny_patch4_window7_224', 'focal_tiny_useconv_patch4_window7_224'
TEST = dict(depths=(1, 1, 2, 1), heads=(1, 2, 4, 8), window=3, expand_sizes=(1, 1, 1, 0), focal_windows=(5, 3, 3, 1))


def keyed_test_model(size, **kwargs):
    """A small model and its weights in the authors' names."""
    shapes = to_authors(create_model('test_focal', img_size=size, device='meta', **kwargs).state_dict())
    state_dict = {k: x if x.dtype == torch.long else keyed(k, x.shape) for k, x in shapes.items()}
    return load('test_focal', state_dict, img_size=size, **kwargs), state_dict


@pytest.mark.parametrize('record,name,listing,size', [
    ('focal_tiny_224', TINY, 'tiny', (224, 224)),
    ('focal_tiny_useconv_224', USECONV, 'tiny_useconv', (224, 224)),
    ('focal_tiny_224x448', TINY, 'tiny', (224, 448)),
])
def test_equals_the_authors(record, name, listing, size):
    record = np.load(DATA / f'focal/{record}.npz')
    model = load(name, keyed_state_dict(f'focal/keys_focal_{listing}_224.tsv'), img_size=size)
    x = randn(f'image.{size[0]}x{size[1]}', (len(record['logits']), 3, *size))
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        logits = model.forward_head(model.norm(maps[-1].permute(0, 2, 3, 1)))
    check_record(record, logits, maps, 1e-12)


def test_gradients_equal_the_authors():
    record = np.load(DATA / 'focal/focal_tiny_useconv_224_grad.npz')
    state_dict = keyed_state_dict('focal/keys_focal_tiny_useconv_224.tsv')
    model = load(USECONV, state_dict)
    x = randn('image.224x224', (1, 3, 224, 224)).requires_grad_()
    y = model(x)
    assert_near(y, torch.from_numpy(record['logits']), 1e-12)
    y.backward(randn('up.logits', y.shape))
    assert_near(x.grad[:, :, [0, 112, 223], :56], torch.from_numpy(record['grad_in_rows']), 1e-12)
    grads = to_authors({k: p.grad for k, p in model.named_parameters()})
    lines = (DATA / 'focal/focal_tiny_useconv_224_grad_grads.tsv').read_text().splitlines()[1:]
    assert {line.split('\t')[0] for line in lines} <= set(grads)
    for line in lines:
        key, probe, norm = line.split('\t')
        grad = grads[key].view(state_dict[key].shape)
        assert grad.norm().item() == pytest.approx(float(norm), rel=1e-10), key
        assert (grad * randn('probe:' + key, grad.shape)).sum().item() == pytest.approx(
            float(probe), abs=1e-10 * float(norm) * grad.numel() ** .5), key


@pytest.mark.parametrize('use_conv_embed', [False, True])
@pytest.mark.parametrize('size,kwargs', [
    ((64, 64), {}),
    ((48, 96), {}),
    ((96, 72), dict(wrap=False)),
    ((72, 56), dict(pad_odd=False)),  # stages of 18 x 14, 9 x 7, 4 x 3 and 2 x 1 pixels
    ((96, 128), dict(expand_sizes=1)),
    ((64, 64), dict(shrink_window=True)),
    ((32, 96), dict(shrink_window=True)),
])
def test_equals_the_reference(size, kwargs, use_conv_embed):
    if use_conv_embed and size == (72, 56):
        pytest.skip('the authors\' model takes no odd maps there')
    model, state_dict = keyed_test_model(size, use_conv_embed=use_conv_embed, **kwargs)
    x = randn('image', (2, 3, *size))
    expand_sizes = (1, 1, 1, 1) if 'expand_sizes' in kwargs else TEST['expand_sizes']
    expected, maps = network(state_dict, x, **{
        **TEST, 'expand_sizes': expand_sizes, 'shrink': 'shrink_window' in kwargs, 'wrap': kwargs.get('wrap', True)})
    assert_near(model(x), expected, 1e-12)
    for ours, theirs in zip(model.forward_intermediates(x, intermediates_only=True), maps, strict=True):
        assert_near(ours.permute(0, 2, 3, 1), theirs, 1e-12)


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_show(mistake):
    model, state_dict = keyed_test_model((96, 72))
    x = randn('image', (1, 3, 96, 72))
    assert_near(model(x), network(state_dict, x, shrink=False, **TEST)[0], 1e-12)
    assert max_error(model(x), network(state_dict, x, shrink=False, mistake=mistake, **TEST)[0]) > 1e-7


@pytest.mark.parametrize('name,gmacs', [
    (TINY, 4.914), (USECONV, 5.160), ('focal_small_patch4_window7_224', 9.412),
    ('focal_small_useconv_patch4_window7_224', 9.659), ('focal_base_patch4_window7_224', 16.338),
    ('focal_base_useconv_patch4_window7_224', 16.763)])
def test_multiply_accumulates(name, gmacs):
    assert count_macs(create_model(name, device='meta')) / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.parametrize('size', [256, 448])
@pytest.mark.parametrize('name,parameters', [(TINY, 29_190_844), (USECONV, 31_135_708)])
def test_parameters_with_a_surround_in_the_last_stage(name, parameters, size):
    for kwargs in (dict(expand_sizes=3), dict(expand_sizes=3, shrink_window=True)):
        model = create_model(name, img_size=size, device='meta', **kwargs)
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_one_set_of_weights_serves_every_size():
    model, state_dict = keyed_test_model((64, 64), dynamic_img_size=True)
    for size in ((64, 64), (96, 40), (20, 132)):
        other = load('test_focal', state_dict, img_size=size)
        x = randn('image', (1, 3, *size))
        assert_near(model(x), other(x), 1e-12)
        if size[0] > 40:
            assert_near(model(x), network(state_dict, x, shrink=False, **TEST)[0], 1e-12)


def test_names():
    state_dict = keyed_state_dict('focal/keys_focal_tiny_useconv_224.tsv')
    own = to_own_names(state_dict)
    assert set(own) == set(create_model(USECONV, device='meta').state_dict())
    assert set(to_own_names(own)) == set(own)
    back = to_authors(own)
    assert all(torch.equal(back[k], x) for k, x in state_dict.items() if x.is_floating_point())


@pytest.mark.parametrize('root', ['model', None])
def test_authors_files(tmp_path, root):
    _, state_dict = keyed_test_model((64, 64))
    path = tmp_path / 'focal.pth'
    torch.save(state_dict if root is None else {root: state_dict, 'epoch': 3}, path)
    model = create_model(
        'test_focal', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), num_classes=3, in_chans=1,
        img_size=(48, 80))
    assert_near(model.layers[1].downsample.proj.weight.double(), state_dict['layers.0.downsample.proj.weight'], 1e-6)
    assert model(torch.randn(1, 1, 48, 80)).shape == (1, 3)


def test_files_of_paddle_are_refused(tmp_path):
    path = tmp_path / 'focal.pdparams'
    path.write_bytes(b'anything')
    with pytest.raises(WeightsError, match='PaddlePaddle.*transposing'):
        create_model('test_focal', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_weights_move_between_windows_without_a_surround():
    kwargs = dict(expand_sizes=0)
    model, _ = keyed_test_model((64, 64), **kwargs)
    resized = load('test_focal', model.state_dict(), window_size=5, **kwargs)
    x = randn('image', (1, 3, 64, 64))
    model.set_input_size(window_size=5)
    assert_near(resized(x), model(x), 1e-12)


def test_refused_weights():
    _, state_dict = keyed_test_model((64, 64))
    with pytest.raises(WeightsError, match='surround_bias.*cannot be resampled'):
        load('test_focal', state_dict, window_size=5, expand_sizes=(2, 2, 2, 0))
    with pytest.raises(WeightsError, match='surround in stage 3'):
        load('test_focal', state_dict, expand_sizes=1)
    with pytest.raises(WeightsError, match='Unknown'):
        load('test_focal', {**state_dict, 'layers.0.blocks.0.pool_layers.1.weight': torch.zeros(1, 9)})
    with pytest.raises(WeightsError, match='none were ever|no weights are known'):
        create_model(TINY, pretrained=True)


def test_refused_arguments():
    for kwargs, message in [
            (dict(window_size=(7, 5)), 'window_size'), (dict(expand_sizes=(3, 3)), 'expand_sizes'),
            (dict(expand_sizes=4), 'expand_size: got 4'), (dict(focal_windows=4), 'focal_window'),
            (dict(shrink_window=True, dynamic_img_size=True), 'shrink_window')]:
        with pytest.raises(ValueError, match=message):
            create_model('test_focal', device='meta', **kwargs)


def test_set_input_size():
    model, state_dict = keyed_test_model((64, 64))
    model.set_input_size(img_size=(96, 72))
    x = randn('image', (1, 3, 96, 72))
    assert_near(model(x), network(state_dict, x, shrink=False, **TEST)[0], 1e-12)
    for kwargs in (dict(window_size=5), dict(window_size=(3, 5))):
        with pytest.raises(ValueError, match='window_size'):
            model.set_input_size(img_size=64, **kwargs)
    assert model.patch_embed.img_size == (96, 72)

    model = create_model('test_focal', use_conv_embed=True, shrink_window=True)
    model.set_input_size(img_size=(64, 80))
    for kwargs in (dict(img_size=(32, 64)), dict(window_size=3)):
        with pytest.raises(ValueError, match='shrink_window'):
            model.set_input_size(**kwargs)
    with pytest.raises(ValueError, match='patch_size: got 8'):
        create_model('test_focal', use_conv_embed=True).set_input_size(patch_size=8)


def test_no_weight_decay():
    spared = create_model(TINY, device='meta').no_weight_decay()
    assert len(spared) == 12 + 10 + 12  # no surround in the last stage


def test_initialisation():
    model = create_model('test_focal')
    block = model.layers[0].blocks[0]
    assert (block.attn.relative_position_bias_table == 0).all()
    assert 0 < block.attn.pool.weight.std() < .05 and block.attn.pool.weight.mean().abs() < .03
    assert .015 < block.mlp.fc1.weight.std() < .025


@pytest.mark.parametrize('size', [(64, 64), (70, 53)])
def test_dense_features(size):
    backbone = DenseBackbone('test_focal').eval()
    maps = backbone(torch.randn(1, 3, *size))
    assert [m.shape[2:] for m in maps] == [tuple(-(-s // stride) for s in size) for stride in (4, 8, 16, 32)]
