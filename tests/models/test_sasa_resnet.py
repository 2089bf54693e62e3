"""SASA-ResNet against recorded numbers, its checkpoints, its options and its sizes."""
import pytest
import timm
import torch
from helpers import assert_near
from resnet_records import keyed_images, keyed_state_dict, record

from elsa_models.models._checkpoint import WeightsError
from elsa_models.models.sasa_resnet import AttentionStem, checkpoint_filter_fn


def small(**kwargs):
    return timm.create_model('test_sasa_resnet', **kwargs)


@pytest.fixture(scope='module')
def keyed():
    return keyed_state_dict('sasa_resnet26')


def test_logits(keyed, tmp_path):
    torch.save(keyed, tmp_path / 'keyed.pth')
    model = timm.create_model(
        'sasa_resnet26', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'keyed.pth')),
        dtype=torch.float64).eval()
    meta, arrays = record('sasa_resnet26_224x224_zero_logits')
    assert sum(p.numel() for p in model.parameters()) == meta['params']
    with torch.no_grad():
        features = model.forward_intermediates(keyed_images(224, 224), intermediates_only=True)
        logits = model.forward_head(features[-1])
    for feature, (shape, mean, std) in zip(features[1:], list(meta['stages'].values())[1:]):
        assert list(feature.shape) == shape
        assert abs(feature.mean() - mean) < 1e-12 and abs(feature.std(correction=0) - std) < 1e-12
    assert_near(logits, arrays['logits'], 1e-12)


def test_logits_in_float32(keyed):
    model = timm.create_model('sasa_resnet26').eval()
    model.load_state_dict(checkpoint_filter_fn(keyed, model))
    _, arrays = record('sasa_resnet26_224x224_zero_logits')
    with torch.no_grad():
        assert_near(model(keyed_images(224, 224).float()), arrays['logits'], 1e-5)


@pytest.mark.parametrize('name, conv_stages, parameters', [
    ('sasa_resnet26', 0, 10_331_264), ('sasa_resnet38', 0, 14_173_384), ('sasa_resnet50', 0, 18_015_504),
    ('sasa_resnet50', 1, 18_089_064), ('sasa_resnet50', 2, 18_481_832), ('sasa_resnet50', 3, 20_839_784),
])
def test_parameters(name, conv_stages, parameters):
    model = timm.create_model(name, device='meta', conv_stages=conv_stages)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_options_reach_the_layers():
    model = small(kernel_size=3, border='mask', num_heads=2, attn_drop_rate=.25, conv_stages=1)
    assert not hasattr(model.stages[0][0], 'self_attn')
    for stage in model.stages[1:]:
        attn = stage[0].self_attn
        assert (attn.kernel_size, attn.border, attn.num_heads, attn.attn_drop_rate) == (3, 'mask', 2, .25)


@pytest.mark.parametrize('kwargs', [dict(), dict(stem='attention'), dict(border='mask', conv_stages=2)], ids=str)
@pytest.mark.parametrize('size', [(32, 32), (47, 90), (225, 33)])
def test_any_size(size, kwargs):
    model = small(**kwargs).eval()
    features = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    for feature, info in zip(features, model.feature_info):
        assert feature.shape[1:] == (info['num_chs'], *(-(-s // info['reduction']) for s in size))
    assert model.forward_head(features[-1]).isfinite().all()


def stem_by_pixel(stem, x):
    """The stem's attention before norm and pooling, pixel by pixel (B, dim, H, W)."""
    B, C, H, W = x.shape
    G, d = stem.num_heads, stem.query.shape[0] // stem.num_heads
    y = torch.zeros(B, G * d, H, W, dtype=x.dtype)
    for a in range(H):
        for b in range(W):
            block = [(a // 4 * 4 + i, b // 4 * 4 + j) for i in range(4) for j in range(4)]
            keys, values = [], []
            for h, w in block:
                pixel = x[:, :, h, w] if h < H and w < W else torch.zeros(B, C, dtype=x.dtype)
                mixing = ((stem.embed_row[h % 4] + stem.embed_col[w % 4]) @ stem.mixture.t()).softmax(dim=0)
                matrix = sum(p * m for p, m in zip(mixing, stem.value))
                keys.append(pixel @ stem.key.t())
                values.append(pixel @ matrix.t())
            for g in range(G):
                head = slice(g * d, (g + 1) * d)
                query = (x[:, :, a, b] @ stem.query.t())[:, head]
                weights = torch.stack([(query * k[:, head]).sum(dim=1) for k in keys], dim=1).softmax(dim=1)
                y[:, head, a, b] = sum(weights[:, t, None] * v[:, head] for t, v in enumerate(values))
    return y


def test_attention_stem():
    stem = AttentionStem(3, 8, 2, 3, 5, dtype=torch.float64).eval()
    with torch.no_grad():
        for p in stem.parameters():
            p.normal_()
        x = torch.randn(2, 3, 33, 38, dtype=torch.float64)
        expected = stem.bn(stem_by_pixel(stem, x))
        expected = torch.nn.functional.max_pool2d(expected, 4, ceil_mode=True)
        assert_near(stem(x), expected, 1e-12)


@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: {'state_dict': {f'module.{k}': v for k, v in x.items()}}])
def test_checkpoints_in_parts(wrap):
    model = small()
    parts = {}
    for name, x in model.state_dict().items():
        if name.endswith('qkv.weight'):
            for letter, y in zip('qkv', x.chunk(3)):
                parts[name.replace('qkv', letter)] = y[..., None, None]
        else:
            parts[name] = x
    fitted = checkpoint_filter_fn(wrap(parts), model)
    assert all(torch.equal(fitted[k], x) for k, x in model.state_dict().items())


@pytest.mark.parametrize('message, change', [
    ('rel_row has shape', lambda x: {k: y[1:-1] if k.endswith('rel_row') else y for k, y in x.items()}),
    ('qkv.weight', lambda x: {k: y for k, y in x.items() if not k.endswith('qkv.weight')}),
    ('rel_depth', lambda x: {**x, 'stages.0.0.self_attn.rel_depth': torch.zeros(7, 2)}),
])
def test_checkpoints_of_another_kind(message, change, tmp_path):
    torch.save(change(small().state_dict()), tmp_path / 'other.pth')
    with pytest.raises(WeightsError, match=message):
        small(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'other.pth')))


@pytest.mark.parametrize('message, kwargs', [
    (r'^kernel_size: got 4', dict(kernel_size=4)),
    (r'^num_heads: got 5', dict(num_heads=5)),
    (r'^border: got ', dict(border='same')),
    (r"^stem: got 'patch', must be one of conv, attention", dict(stem='patch')),
    (r'^stem_heads: got 3, must be a divisor of stem_width, which is 16', dict(stem='attention', stem_heads=3)),
    (r'^conv_stages: got 5, must be at most 4', dict(conv_stages=5)),
    (r'^conv_stages: got -1', dict(conv_stages=-1)),
    (r'^img_size: got 16', dict(img_size=16)),
])
def test_bad_arguments(message, kwargs):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


@pytest.mark.parametrize('stem', ['conv', 'attention'])
def test_images_that_are_too_small(stem):
    with pytest.raises(ValueError, match=r'^x: got images of 31 x 64 pixels, must be at least 32 x 32'):
        small(stem=stem)(torch.randn(1, 3, 31, 64))


def test_no_weights_are_known():
    with pytest.raises(WeightsError, match='no weights are known'):
        timm.create_model('sasa_resnet26', pretrained=True)
