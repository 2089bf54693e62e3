"""The ResNet around mixers of maps, with a mixer that remembers what it was given."""
from functools import partial

import pytest
import torch
import torch.nn as nn
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

from elsa_models.models import families
from elsa_models.models._resnet import MixerResNet

DEPTHS = (1, 2, 1, 1)
WIDTHS = (16, 32, 64, 128)


class Scale(nn.Module):
    """A mixer that multiplies channels, and keeps the sizes that it was told."""

    def __init__(self, dim, feat_size, stride=1, device=None, dtype=None):
        super().__init__()
        self.feat_size = feat_size
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def set_input_size(self, feat_size):
        self.feat_size = feat_size

    def forward(self, x):
        return x[:, ::self.stride, ::self.stride] * self.weight


class NCHWScale(nn.Module):
    """The same for timm's `self_attn` slot."""

    def __init__(self, dim, stride=1, feat_size=None, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.pool = nn.AvgPool2d(2, 2) if stride == 2 else nn.Identity()

    def forward(self, x):
        return self.pool(x * self.weight[:, None, None])


def build(mixer=Scale, **kwargs):
    model_args = dict(mixers=[(mixer,) * d for d in DEPTHS], widths=WIDTHS, stem_width=8, num_classes=5, img_size=64)
    return MixerResNet(**{**model_args, **kwargs})


def sizes(model):
    return [[block.self_attn.feat_size for block in stage] for stage in model.stages]


def test_equals_byobnet():
    cfg = ByoModelCfg(
        blocks=tuple(
            ByoBlockCfg(type='self_attn', d=d, c=c, s=1 if i == 0 else 2, gs=0, br=.25)
            for i, (d, c) in enumerate(zip(DEPTHS, WIDTHS))),
        stem_chs=8, stem_type='7x7', stem_pool='maxpool', act_layer='relu', self_attn_layer=NCHWScale)
    reference = ByobNet(cfg, num_classes=5).double()
    model = build().double()
    model.load_state_dict(reference.state_dict())
    assert list(model.state_dict()) == list(reference.state_dict())
    for block in (block for stage in model.stages for block in stage):
        nn.init.ones_(block.conv3_1x1.bn.weight)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for train in (True, False):
        torch.testing.assert_close(model.train(train)(x), reference.train(train)(x), rtol=0, atol=1e-12)
    assert model.feature_info == reference.feature_info
    assert model.stage_ends == reference.stage_ends
    ours, theirs = model.forward_intermediates(x)[1], reference.forward_intermediates(x)[1]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_convolutions_equal_byobnet():
    cfg = ByoModelCfg(
        blocks=tuple(
            ByoBlockCfg(type='bottle', d=d, c=c, s=1 if i == 0 else 2, gs=0, br=.25)
            for i, (d, c) in enumerate(zip(DEPTHS, WIDTHS))),
        stem_chs=8, stem_type='7x7', stem_pool='maxpool', act_layer='relu')
    reference = ByobNet(cfg, num_classes=5, zero_init_last=False).double().eval()
    model = build(None).double().eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 65, 33, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', [(32, 32), (33, 63), (65, 97), (225, 31 + 8)])
def test_odd_sizes(size):
    model = build(zero_init_last=False).eval()
    H, W = size
    features = model.forward_intermediates(torch.randn(1, 3, H, W), intermediates_only=True)
    assert [tuple(f.shape[2:]) for f in features] == [(-(-H // s), -(-W // s)) for s in (2, 4, 8, 16, 32)]


def test_pooling_at_edges():
    block = build().double().stages[1][0]
    x = torch.randn(1, 8, 5, 7, dtype=torch.float64)
    pooled = block.pool(x)
    for i in range(3):
        for j in range(4):
            want = x[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].mean(dim=(2, 3))
            torch.testing.assert_close(pooled[:, :, i, j], want, rtol=0, atol=1e-15)


def test_mixers_can_do_their_own_striding():
    model = build(mixer_strides=True, zero_init_last=False).eval()
    assert [block.self_attn.stride for stage in model.stages for block in stage] == [1, 2, 1, 2, 2]
    assert all(isinstance(block.pool, nn.Identity) for stage in model.stages for block in stage)
    assert model(torch.randn(2, 3, 65, 47)).shape == (2, 5)


def test_sizes_are_those_of_the_maps():
    model = build(img_size=(225, 64))
    maps = []
    for stage in model.stages:
        for block in stage:
            block.self_attn.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    model.eval()(torch.randn(2, 3, 225, 64))
    assert all(x.is_contiguous() for x in maps)
    assert [tuple(x.shape[1:3]) for x in maps] == [size for stage in sizes(model) for size in stage]


def test_set_input_size():
    model = build()
    before = sizes(model)
    for wrong in (31, (64, 16), 64.5, (64, 64, 64), 'large'):
        with pytest.raises(ValueError, match='^img_size: got'):
            model.set_input_size(wrong)
    assert sizes(model) == before
    model.set_input_size((97, 64))
    assert sizes(model) == sizes(build(img_size=(97, 64)))
    assert model._model_args['img_size'] == (97, 64)
    model.prune_intermediate_layers([1])
    model.set_input_size(64)
    assert sizes(model) == before[:1]


@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride(output_stride):
    model = build(output_stride=output_stride, zero_init_last=False).eval()
    features = model.forward_intermediates(torch.randn(1, 3, 65, 96), intermediates_only=True)
    for info, feature in zip(model.feature_info, features):
        assert info['reduction'] <= output_stride
        assert tuple(feature.shape[1:]) == (info['num_chs'], -(-65 // info['reduction']), 96 // info['reduction'])


def test_mixed_blocks():
    mixers = [(None,), (None, Scale), (Scale,), (Scale,)]
    model = build(mixers=mixers, zero_init_last=False)
    assert isinstance(model.stages[1][1].self_attn, Scale)
    model(torch.randn(2, 3, 65, 65)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.set_input_size(96)
    assert model.stages[1][1].self_attn.feat_size == (12, 12)


def test_rates_and_pooling_are_those_asked_for():
    mixers = [(None,), (None, Scale), (Scale,), (Scale,)]
    model = build(mixers=mixers, drop_path_rate=.4, drop_rate=.3, global_pool='max')
    blocks = [block for stage in model.stages for block in stage]
    assert [getattr(b.drop_path, 'drop_prob', 0.) for b in blocks] == pytest.approx([0., .1, .2, .3, .4])
    assert model.head.drop.p == .3 and model.head.global_pool.pool_type == 'max'


def test_blocks_without_a_norm_after_the_mixer():
    block = build(norm_after_mixer=False).double().eval().stages[0][0]
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    y = (block.conv1_1x1(x) * block.self_attn.weight[:, None, None]).relu()
    nn.init.ones_(block.conv3_1x1.bn.weight)
    torch.testing.assert_close(block(x), (block.conv3_1x1(y) + block.shortcut(x)).relu(), rtol=0, atol=1e-12)


def test_initialisation_is_that_of_resnets():
    model = build(zero_init_last=False, num_classes=100)
    last = model.stages[3][0].conv3_1x1  # of 32 channels to 128
    assert (last.bn.weight == 1).all()
    assert last.conv.weight.std().item() == pytest.approx((2 / 128) ** .5, rel=.1)
    assert model.head.fc.weight.std().item() == pytest.approx(.01, rel=.1) and not model.head.fc.bias.any()


def test_empty_model_can_be_initialised():
    model = build(device='meta').to_empty(device='cpu')
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.constant_(tensor, float('nan'))
    model.init_weights()
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert model.eval()(torch.randn(1, 3, 32, 32)).isfinite().all()
    assert all(not block.conv3_1x1.bn.weight.any() for stage in model.stages for block in stage)


@pytest.mark.parametrize('kwargs', [
    dict(img_size=16), dict(img_size=(64, 31)), dict(output_stride=4), dict(widths=(16, 32)),
    dict(widths=(8, .5, 2, 2)),
])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f'^{next(iter(kwargs))}: got'):
        build(**kwargs)


@pytest.mark.parametrize('wrap', [lambda m: m, torch.jit.script])
def test_bad_images(wrap):
    model = wrap(build().eval())
    for shape in ((1, 3, 31, 64), (1, 3, 64, 8), (3, 64, 64)):
        with pytest.raises((ValueError, torch.jit.Error), match='x: got'):
            model(torch.randn(shape))


def test_scripts_traces_and_exports():
    model = build(partial(Scale), zero_init_last=False).eval()
    x = torch.randn(2, 3, 65, 47)
    want = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), want)
    dims = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(dims,))
    torch.testing.assert_close(program.module()(x), want)


SMALL = [n for f in families() if issubclass(f.model_cls, MixerResNet) for n in f.model_names if n.startswith('test_')]
