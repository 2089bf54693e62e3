"""Backbones as detectors want them: maps of four strides from images of any size."""
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import assert_near, max_error
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse

import elsa_models  # noqa: F401
from elsa_models.dense import DenseBackbone

NAMES = ['test_elsa_swin', 'test_elsa_volo']
SWIN = dict(img_size=64, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)
# the small ELSA-VOLO has patches of 4 pixels, the large ones of 8
VOLO = dict(patch_size=8)


def _args(name):
    return VOLO if 'volo' in name else {}


def _backbone(name='test_elsa_swin', **kwargs):
    kwargs.setdefault('model_args', _args(name))
    return DenseBackbone(name, **kwargs).eval()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('size', [(33, 47), (64, 64), (61, 130)], ids=str)
def test_any_size_gives_four_strides(name, size):
    maps = _backbone(name)(torch.randn(2, 3, *size))
    for stride, m in zip((4, 8, 16, 32), maps):
        assert m.shape[2:] == tuple(-(-s // stride) for s in size)
        assert m.is_contiguous() and m.isfinite().all()


@pytest.mark.parametrize('name', NAMES)
def test_images_do_not_depend_on_their_batch(name):
    model, x = _backbone(name), torch.randn(3, 3, 33, 47)
    for together, alone in zip(model(x), model(x[1:2])):
        assert_near(together[1:2], alone, 1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_norms_are_of_each_map_and_can_be_left_out(name):
    torch.manual_seed(1)
    model = _backbone(name)
    bare = _backbone(name, norms=False)
    bare.load_state_dict({k: x for k, x in model.state_dict().items() if not k.startswith('norm')})
    x = torch.randn(1, 3, 40, 56)
    for i, (normed, raw) in enumerate(zip(model(x), bare(x))):
        expected = F.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2]).permute(0, 3, 1, 2)
        assert_near(normed, expected, 1e-5)
        assert model.channels[i] == raw.shape[1]
        assert f'norm{i}.weight' in model.state_dict()


def test_nhwc():
    model, x = _backbone(), torch.randn(1, 3, 40, 56)
    maps = model(x)
    model.output_fmt = 'NHWC'
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(maps, model(x)))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('stages', [0, 1, 2, 3, 5])
def test_frozen_stages(name, stages):
    model = _backbone(name, frozen_stages=stages).train()
    sum(m.square().sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
    trained = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    stem = {k for k in trained if 'patch_embed' in k}
    assert bool(stem) == (stages < 1)
    for i, groups in enumerate(model._parts()[1]):
        for module in groups:
            frozen = i + 1 < stages
            assert all(p.requires_grad != frozen for p in module.parameters())
            assert module.training != frozen
    assert any(k.startswith('norm3') for k in trained)


@pytest.mark.parametrize('name', NAMES)
def test_checkpointing_changes_nothing(name):
    model, x = _backbone(name).train(), torch.randn(2, 3, 40, 56)
    for m in model.modules():
        if hasattr(m, 'drop_prob'):
            m.drop_prob = 0.
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        assert any(getattr(m, 'grad_checkpointing', False) for m in model.modules()) == enable
        sum(m.square().mean() for m in model(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients):
        assert_near(a, b, 1e-5)


def test_drop_path_reaches_the_backbone():
    model = _backbone(model_args=dict(drop_path_rate=.4))
    assert max(getattr(m, 'drop_prob', 0.) or 0. for m in model.modules()) == pytest.approx(.4)


def test_starts_from_a_classifier(tmp_path):
    classifier = timm.create_model('test_elsa_swin', num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / 'model.pth')
    model = _backbone(checkpoint=str(tmp_path / 'model.pth'))
    weights = classifier.state_dict()
    mine = {k[5:].replace('layers_', 'layers.'): x for k, x in model.state_dict().items() if k.startswith('body.')}
    assert len(mine) > 50 and all(torch.equal(x, weights[k]) for k, x in mine.items())


def test_starts_from_a_relative(tmp_path):
    swin = timm.models.SwinTransformer(**{**SWIN, 'depths': (1, 1, 2, 1), 'mlp_ratio': 3., 'window_size': 2})
    torch.save(swin.state_dict(), tmp_path / 'swin.pth')
    model = _backbone(warm_start=str(tmp_path / 'swin.pth'))
    assert torch.equal(model.body['layers_2'].blocks[1].mlp.fc1.weight, swin.layers[2].blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize('num_classes', [5, 1000])
def test_starts_from_a_relative_and_a_classifier(tmp_path, num_classes):
    swin = timm.models.SwinTransformer(**{**SWIN, 'depths': (1, 1, 2, 1), 'mlp_ratio': 3., 'window_size': 2})
    torch.save(swin.state_dict(), tmp_path / 'swin.pth')
    classifier = timm.create_model('test_elsa_swin', num_classes=num_classes)
    torch.save(classifier.state_dict(), tmp_path / 'model.pth')
    model = _backbone(warm_start=str(tmp_path / 'swin.pth'), checkpoint=str(tmp_path / 'model.pth'))
    block, mine = model.body['layers_2'].blocks[1], classifier.layers[2].blocks[1]
    assert torch.equal(block.mlp.fc1.weight, swin.layers[2].blocks[1].mlp.fc1.weight)
    assert torch.equal(block.attn.attn_logits.weight, mine.attn.attn_logits.weight)  # Swin has none


def test_other_backbones_of_timm():
    model = _backbone('swin_tiny_patch4_window7_224', model_args=SWIN)
    assert [tuple(m.shape[2:]) for m in model(torch.randn(1, 3, 36, 48))] == [(9, 12), (5, 6), (3, 3), (2, 2)]


@pytest.mark.parametrize('message, kwargs', [
    ('output_fmt: got', dict(output_fmt='NCL')),
    ('frozen_stages: got 6', dict(frozen_stages=6)),
    ('frozen_stages: got -1', dict(frozen_stages=-1)),
    ('strides', dict(model_args=dict(patch_size=8))),
])
def test_bad_arguments_are_named(message, kwargs):
    with pytest.raises(ValueError, match=message):
        _backbone(**kwargs)


def test_position_tables_are_not_decayed():
    names = _backbone().no_weight_decay()
    assert names == ('body.layers_3.blocks.0.attn.relative_position_bias_table',)
    assert _backbone('test_elsa_volo').no_weight_decay() == ('body.model.pos_embed',)


# the last stage at sizes that no window divides


def _swin_as_published(block, x, shift):
    """Swin's detection code in its own words: norm, pad, shift, attend under a mask, shift back, crop."""
    B, H, W, C = x.shape
    ws = block.attn.window_size[0]
    attn = WindowAttention(C, block.attn.num_heads, window_size=ws)
    attn.load_state_dict(block.attn.state_dict())
    shortcut, x = x, block.norm1(x)
    x = F.pad(x, (0, 0, 0, -W % ws, 0, -H % ws))
    Hp, Wp = x.shape[1:3]
    mask = None
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
        region = torch.zeros(1, Hp, Wp, 1)
        slices = (slice(0, -ws), slice(-ws, -shift), slice(-shift, None))
        for i, h in enumerate(slices):
            for j, w in enumerate(slices):
                region[:, h, w] = 3 * i + j
        windows = window_partition(region, (ws, ws)).view(-1, ws * ws)
        mask = (windows[:, None] != windows[:, :, None]).float() * -100.
    windows = window_partition(x, (ws, ws)).view(-1, ws * ws, C)
    windows = attn(windows, mask=mask).view(-1, ws, ws, C)
    x = window_reverse(windows, (ws, ws), Hp, Wp)
    if shift:
        x = torch.roll(x, (shift, shift), (1, 2))
    x = shortcut + x[:, :H, :W]
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize('size', [(2, 3), (7, 7), (8, 12), (14, 7), (14, 21), (25, 42)], ids=str)
def test_last_stage_is_that_of_published_detectors(size):
    args = dict(img_size=256, depths=(1, 1, 1, 2), window_size=7)  # for smaller images timm makes windows smaller
    model = _backbone(model_args=args)
    blocks = model.body['layers_3'].blocks
    with torch.no_grad():
        for p in blocks.parameters():
            p.add_(.1 * torch.randn_like(p))
    x = torch.randn(2, *size, 192)
    for block, shift in zip(blocks, (0, 3)):
        assert_near(block(x), _swin_as_published(block, x, shift), 1e-5)
    switched = _backbone(model_args=dict(args, pad_before_shift=False, always_partition=False))
    switched.load_state_dict(model.state_dict())
    block = switched.body['layers_3'].blocks[1]
    same = all(s % 7 == 0 and s > 7 for s in size)
    assert (max_error(block(x), _swin_as_published(block, x, 3)) < 1e-4) == same


def test_the_switch_keeps_the_classifier():
    classifier = timm.create_model('test_elsa_swin', img_size=224, window_size=7, depths=(1, 1, 1, 2)).eval()
    switched = timm.create_model(
        'test_elsa_swin', img_size=224, window_size=7, depths=(1, 1, 1, 2), pad_before_shift=True).eval()
    switched.load_state_dict(classifier.state_dict())
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(classifier(x), switched(x))


@pytest.mark.parametrize('name', NAMES)
def test_exported_backbone_takes_any_size(name):
    model = _backbone(name)
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(1, 3, 96, 128),), dynamic_shapes=(sizes,)).module()
    x = torch.randn(1, 3, 75, 141)
    for a, b in zip(program(x), model(x)):
        assert_near(a, b, 1e-4)
