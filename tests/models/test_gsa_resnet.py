"""GSA-ResNet against recorded numbers, its checkpoints and its sizes."""
import re

import pytest
import timm
import torch
from helpers import assert_near
from resnet_records import keyed_images, keyed_state_dict, record

from elsa_models.models._checkpoint import WeightsError
from elsa_models.models.gsa_resnet import checkpoint_filter_fn


def small(**kwargs):
    return timm.create_model('test_gsa_resnet', **kwargs)


def randomize(model):
    """Give norms statistics and weights that do something, and the blocks more than their shortcuts."""
    for name, x in model.state_dict().items():
        if name.endswith('running_var'):
            x.uniform_(.5, 2)
        elif name.endswith(('running_mean', 'bias')):
            x.normal_(std=.1)
        elif x.dim() == 1:
            x.uniform_(.1, .3)
    return model


@pytest.fixture(scope='module')
def keyed():
    return keyed_state_dict('gsa_resnet26')


@pytest.mark.parametrize('name, size, train, img_size', [
    ('gsa_resnet26_224x224', (224, 224), False, 224),
    ('gsa_resnet26_96x128_train', (96, 128), True, 224),
    ('gsa_resnet26_96x128_train', (96, 128), True, (96, 128)),
])
def test_logits(keyed, tmp_path, name, size, train, img_size):
    torch.save(keyed, tmp_path / 'keyed.pth')
    model = timm.create_model(
        'gsa_resnet26', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'keyed.pth')),
        img_size=img_size, dtype=torch.float64).train(train)
    meta, arrays = record(f'{name}_logits')
    with torch.no_grad():
        features = model.forward_intermediates(keyed_images(*size), intermediates_only=True)
        logits = model.forward_head(features[-1])
    for feature, (shape, mean, std) in zip(features[1:], list(meta['stages'].values())[1:]):
        assert list(feature.shape) == shape
        assert abs(feature.mean() - mean) < 1e-12 and abs(feature.std(correction=0) - std) < 1e-12
    assert_near(logits, arrays['logits'], 1e-11)


def test_logits_in_float32(keyed):
    model = timm.create_model('gsa_resnet26').eval()
    model.load_state_dict(checkpoint_filter_fn(keyed, model))
    _, arrays = record('gsa_resnet26_224x224_logits')
    with torch.no_grad():
        assert_near(model(keyed_images(224, 224).float()), arrays['logits'], 1e-5)


@pytest.mark.parametrize('name, parameters', [
    ('gsa_resnet26', 10_352_600), ('gsa_resnet38', 14_202_728),
    ('gsa_resnet50', 18_052_856), ('gsa_resnet101', 30_398_392),
])
def test_parameters(name, parameters):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == parameters


def test_parameters_with_a_shared_norm():
    model = timm.create_model('gsa_resnet50', device='meta', share_norm=True)
    assert sum(p.numel() for p in model.parameters()) == 18_046_248


@pytest.mark.parametrize('beyond', ['zero', 'resample'])
@pytest.mark.parametrize('size', [(32, 48), (97, 64), (128, 161)])
def test_sizes_agree(size, beyond, tmp_path):
    """A size means the same whether it comes with the images, at creation, with a checkpoint, or later."""
    model = randomize(small(beyond=beyond, dtype=torch.float64)).eval()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    square = max(size)  # tables cover the longer side
    x = torch.randn(1, 3, square, square, dtype=torch.float64)
    overlay = dict(file=str(tmp_path / 'model.pth'))
    loaded = small(
        pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, beyond=beyond, dtype=torch.float64).eval()
    with torch.no_grad():
        want = model(x)
        assert_near(loaded(x), want, 1e-11)
        model.set_input_size(size)
        assert_near(model(x), want, 1e-11)
        assert model(x[..., :size[0], :size[1]]).isfinite().all()
    for k, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[k])


def test_bad_checkpoints():
    model = small()
    state_dict = dict(model.state_dict())
    name = 'stages.1.0.self_attn.rel_col'
    with pytest.raises(WeightsError, match=re.escape(name)):
        checkpoint_filter_fn({**state_dict, name: torch.zeros(30, 8)}, model)
    with pytest.raises(WeightsError, match=re.escape(name)):
        checkpoint_filter_fn({k: x for k, x in state_dict.items() if k != name}, model)
    with pytest.raises(WeightsError, match='does not fit GsaResNet'):
        checkpoint_filter_fn(timm.create_model('resnet18').state_dict(), model)


@pytest.mark.parametrize('kwargs', [
    dict(num_heads=3), dict(norm='before'), dict(beyond='clamp'), dict(img_size=31), dict(output_stride=64),
    dict(depths=(1, 1)), dict(widths=(64, 96)),
])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'^{next(iter(kwargs))}: got'):
        small(**kwargs)
