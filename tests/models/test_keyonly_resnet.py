"""Key-only ResNets: their alternation, their sizes and their arguments."""
import pytest
import timm
import torch

from elsa_models.layers import KeyOnlyAttention


def test_convolution_and_attention_alternate():
    model = timm.create_model('keyonly_resnet50', device='meta', kernel_size=5)
    assert sum(p.numel() for p in model.parameters()) == 22_100_520
    for stage in model.stages:
        for j, block in enumerate(stage):
            attn = getattr(block, 'self_attn', None)
            assert (attn is None) == (j % 2 == 0)
            assert attn is None or isinstance(attn, KeyOnlyAttention) and attn.kernel_size == 5


@pytest.mark.parametrize('size', [(32, 32), (47, 90), (225, 33)])
def test_any_size(size):
    model = timm.create_model('test_keyonly').eval()
    features = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    for feature, info in zip(features, model.feature_info):
        assert feature.shape[1:] == (info['num_chs'], *(-(-s // info['reduction']) for s in size))


@pytest.mark.parametrize('message, kwargs', [
    (r'^kernel_size: got 4', dict(kernel_size=4)), (r'^num_heads: got 5', dict(num_heads=5)),
])
def test_bad_arguments(message, kwargs):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_keyonly', **kwargs)
