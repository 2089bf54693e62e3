"""Axial-ResNet against the authors' numbers, its checkpoints and its sizes."""
import re

import pytest
import timm
import torch
from helpers import assert_near
from resnet_records import keyed_images, keyed_state_dict, part, record

from elsa_models.layers.mixers.axial import AxialAttention, FoldedAxialLayer
from elsa_models.models._checkpoint import WeightsError
from elsa_models.models._resnet import MixerBottleneck
from elsa_models.models.axial_resnet import checkpoint_filter_fn, convert_authors


def small(**kwargs):
    return timm.create_model('test_axial_resnet', **kwargs)


def randomize(model):
    """Give norms statistics and weights that do something, and the blocks more than their shortcuts."""
    for name, x in model.state_dict().items():
        if name.endswith('running_var'):
            x.uniform_(.5, 2)
        elif name.endswith(('running_mean', 'bias')):
            x.normal_(std=.1)
        elif x.dim() == 1:
            x.uniform_(.5, 1.5)
    return model


@pytest.fixture(scope='module')
def authors():
    return keyed_state_dict('axial26s')


@pytest.fixture(scope='module')
def authors_file(authors, tmp_path_factory):
    path = tmp_path_factory.mktemp('authors') / 'axial26s.pth'
    torch.save({'net': {f'module.{k}': x for k, x in authors.items()}, 'epoch': 130, 'optim': {'lr': .1}}, path)
    return str(path)


# tables of the size of the images, and of a larger one
@pytest.mark.parametrize('name, size, img_size', [
    ('axial26s_224', 224, 224),
    pytest.param('axial26s_224', 224, 256, marks=pytest.mark.slow),
    ('axial26s_160x160_slicedtables', 160, 224),
    ('axial26s_160x160_slicedtables', 160, 160),
])
def test_logits_of_the_authors(authors_file, name, size, img_size):
    model = timm.create_model(
        'axial_resnet26s', pretrained=True, pretrained_cfg_overlay=dict(file=authors_file),
        img_size=img_size, dtype=torch.float64).eval()
    meta, arrays = record(f'{name}_logits')
    with torch.no_grad():
        features = model.forward_intermediates(keyed_images(size, size), intermediates_only=True)
        logits = model.forward_head(features[-1])
    for feature, (shape, mean, std) in zip(features[1:], list(meta['stages'].values())[1:]):
        assert list(feature.shape) == shape
        assert abs(feature.mean() - mean) < 1e-12 and abs(feature.std(correction=0) - std) < 1e-12
    assert_near(logits, arrays['logits'], 1e-12)


def test_logits_after_resizing_in_float32(authors):
    model = timm.create_model('axial_resnet26s').eval()
    model.load_state_dict(checkpoint_filter_fn(authors, model))
    model.set_input_size(160)
    _, arrays = record('axial26s_160x160_slicedtables_logits')
    with torch.no_grad():
        assert_near(model(keyed_images(160, 160).float()), arrays['logits'], 1e-5)


def test_block_of_the_authors():
    meta, arrays = record('axial_csr_block_s2')
    renamed = {k: convert_authors({f'layer1.0.{n}': x for n, x in part(arrays, k).items()}) for k in ('p.', 'g.')}
    block = MixerBottleneck(
        16, 32, AxialAttention, (6, 6), stride=2, bottle_ratio=.5, mixer_strides=True, norm_after_mixer=False)
    block = block.double().eval()
    state = {k.removeprefix('stages.0.0.'): x for k, x in renamed['p.'].items()}
    missing, unknown = block.load_state_dict(state, strict=False)
    assert not unknown and all(k.endswith('num_batches_tracked') for k in missing)
    x = arrays['x'].requires_grad_()
    y = block(x)
    assert_near(y, arrays['y'], 1e-12)
    y.backward(arrays['gy'])
    assert_near(x.grad, arrays['gx'], 1e-12)
    gradients = {k: p.grad for k, p in block.named_parameters()}
    assert len(renamed['g.']) == len(gradients)
    for name, want in renamed['g.'].items():
        assert_near(gradients[name.removeprefix('stages.0.0.')], want, 1e-12, name)


@pytest.mark.parametrize('name, parameters, with_long_tables', [
    ('axial_resnet26s', 5_944_936, 6_378_792),
    ('axial_resnet50s', 11_586_216, 12_481_000),
    ('axial_resnet50m', 25_179_400, 26_521_576),
    ('axial_resnet50l', 43_973_480, 45_763_048),
])
def test_parameters(name, parameters, with_long_tables):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters
    model = timm.create_model(name, device='meta', table_length=255)
    assert sum(p.numel() for p in model.parameters()) == with_long_tables
    model.set_input_size(448)
    assert sum(p.numel() for p in model.parameters()) == with_long_tables


def test_folded_model_is_the_same():
    model = randomize(small(dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 65, 72, dtype=torch.float64)
    with torch.no_grad():
        folded = model(x)
        layers = [m for m in model.modules() if isinstance(m, AxialAttention)]
        for layer in layers:
            for axis in (layer.height, layer.width):
                axis.forward = axis.forward_unfolded
        assert_near(folded, model(x), 1e-12)
        for layer in layers:
            layer.reparameterize()
            assert isinstance(layer.height, FoldedAxialLayer)
        assert_near(model(x), folded, 1e-12)


@pytest.mark.parametrize('beyond', ['clamp', 'resample'])
@pytest.mark.parametrize('size', [(32, 48), (97, 64), (128, 161)])
def test_sizes_agree(size, beyond, tmp_path):
    """A size means the same whether it comes with the images, at creation, with a checkpoint, or later."""
    model = randomize(small(beyond=beyond, dtype=torch.float64)).eval()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    overlay = dict(file=str(tmp_path / 'model.pth'))
    loaded = small(
        pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, beyond=beyond, dtype=torch.float64).eval()
    with torch.no_grad():
        want = model(x)
        assert_near(loaded(x), want, 1e-12)
        model.set_input_size(size)
        assert_near(model(x), want, 1e-12)
    for k, x in model.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[k])


def test_the_size_that_it_has_changes_nothing():
    model = small()
    before = dict(model.named_parameters())
    model.set_input_size(64)
    assert all(before[k] is p for k, p in model.named_parameters())
    model.requires_grad_(False)
    model.set_input_size(96)
    assert not any(p.requires_grad for p in model.parameters())


def test_pool():
    model = small(pool='stride', zero_init_last=False).eval()
    assert {layer.pool for layer in model.modules() if isinstance(layer, AxialAttention)} == {'stride'}
    other = small(zero_init_last=False).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 65, 71)
    features = model.forward_intermediates(x, intermediates_only=True)
    others = other.forward_intermediates(x, intermediates_only=True)
    assert [f.shape for f in features] == [f.shape for f in others]
    assert torch.equal(features[1], others[1])  # no stride up to here
    assert not torch.allclose(features[2], others[2], atol=1e-3)


def test_reads_what_it_writes(authors):
    """Names and orders of the authors, from ours: the inverse of what the filter does, entry by entry."""
    model = timm.create_model('axial_resnet26s', img_size=224)
    filtered = checkpoint_filter_fn(authors, model)
    assert {k: x.shape for k, x in filtered.items()} == {k: x.shape for k, x in model.state_dict().items()}
    layer, ours = 'layer3.2.width_block', 'stages.2.2.self_attn.width'
    h, d = 8, 32
    for head in (0, 5):
        for c in (0, d - 1):
            row = authors[f'{layer}.qkv_transform.weight'][head * 2 * d + d + c, :, 0]  # a value's
            assert torch.equal(filtered[f'{ours}.qkv.weight'][h * d + head * d + c], row)
            content, position = authors[f'{layer}.bn_output.bias'].view(h, d, 2)[head, c]
            assert filtered[f'{ours}.bn_content.bias'][head * d + c] == content
            assert filtered[f'{ours}.bn_position.bias'][head * d + c] == position
    relative = authors[f'{layer}.relative']
    assert torch.equal(filtered[f'{ours}.rel_query'][:, 0], relative[:d // 2, -1])
    assert torch.equal(filtered[f'{ours}.rel_key'][:, 0], relative[d // 2:d, 0])
    assert torch.equal(filtered[f'{ours}.rel_value'][:, 0], relative[d:, -1])


def test_bad_checkpoints(authors):
    model = small()
    state_dict = dict(model.state_dict())
    name = 'stages.1.0.self_attn.height.rel_key'
    with pytest.raises(WeightsError, match=re.escape(name)):
        checkpoint_filter_fn({**state_dict, name: torch.zeros(4, 30)}, model)
    with pytest.raises(WeightsError, match=re.escape(name)):
        checkpoint_filter_fn({k: x for k, x in state_dict.items() if k != name}, model)
    resnet = timm.create_model('resnet18').state_dict()
    with pytest.raises(WeightsError, match='does not fit AxialResNet'):
        checkpoint_filter_fn(resnet, model)
    cut = {k: x for k, x in authors.items() if k != 'layer2.0.hight_block.bn_similarity.weight'}
    with pytest.raises(WeightsError, match=r'stages.1.0.self_attn.height.bn_qk.weight'):
        checkpoint_filter_fn(cut, timm.create_model('axial_resnet26s', device='meta'))


@pytest.mark.parametrize('kwargs', [
    dict(num_heads=3), dict(num_heads=0), dict(pool='max'), dict(beyond='zero'), dict(table_length=0),
    dict(img_size=31), dict(output_stride=64), dict(depths=(1, 1)), dict(width_factor=0.),
])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'^{next(iter(kwargs))}: got'):
        small(**kwargs)
