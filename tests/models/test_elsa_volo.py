"""ELSA-VOLO: equal to VOLO after the first stage, at any size, with features, token labels and clear errors."""
import copy
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm import create_model
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models._input import get_model_args
from timm.models.volo import Transformer

import elsa_models
from elsa_models import ElsaBlock
from elsa_models.models import TokenLabelOutput, _token_labels, token_label_loss

# millions of parameters, the K = 5 column of the table of variants
PARAMS = {
    'elsa_volo_d1_224': '26.672', 'elsa_volo_d1_384': '26.818',
    'elsa_volo_d2_224': '58.721', 'elsa_volo_d2_384': '58.916',
    'elsa_volo_d3_224': '86.382', 'elsa_volo_d3_448': '86.683',
    'elsa_volo_d4_224': '192.723', 'elsa_volo_d4_448': '193.174',
    'elsa_volo_d5_224': '295.097', 'elsa_volo_d5_448': '295.549', 'elsa_volo_d5_512': '295.733',
}
# D1 with one block per stage: real widths and strides, little to compute
SHALLOW = dict(layers=(1, 1, 1, 1), num_classes=7)
SIZES = [(64, 64), (80, 64), (37, 53), (36, 52), (8, 8)]


def small(**kwargs):
    return create_model('test_elsa_volo', **dict(dict(num_classes=10), **kwargs)).eval()


def num_params(model):
    return sum(p.numel() for p in model.parameters())


def bits_equal(a, b):
    assert a.shape == b.shape
    return torch.equal(a, b)


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for k, x in model.state_dict().items():
        assert bits_equal(x, state[k]), k


def clone_state(model):
    return {k: x.clone() for k, x in model.state_dict().items()}


class Constant(nn.Module):
    """A first stage of any kind, as far as what follows it can tell."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, x):
        assert x.shape == self.x.shape
        return self.x


class Tap:
    """The last input and output of a module."""

    def __init__(self, module):
        module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.input, self.output = args[0], output


@pytest.mark.parametrize('name', PARAMS)
def test_parameters_are_those_of_the_table(name):
    model = create_model(name, device='meta')
    assert f'{num_params(model) / 1e6:.3f}' == PARAMS[name]
    assert model.patch_embed.img_size == (int(name[-3:]),) * 2


def test_every_name_is_registered_and_none_claims_weights():
    names = timm.list_models('*elsa_volo*')
    assert sorted(names) == sorted([*PARAMS, 'test_elsa_volo'])
    assert not timm.list_models('*elsa_volo*', pretrained=True)


def test_only_the_first_stage_is_local():
    model = create_model('elsa_volo_d1_224', device='meta')
    blocks = [type(b) for m in model.network if isinstance(m, nn.Sequential) for b in m]
    assert blocks == [ElsaBlock] * 4 + [Transformer] * 14


def test_inferred_settings_are_the_defaults():
    for attn in (b.attn for b in create_model('elsa_volo_d1_224', device='meta').network[0]):
        assert (attn.kernel_size, attn.dilation, attn.num_heads) == (5, 1, 6)
        assert (attn.lam, attn.gamma, attn.qk_scale) == (1, 1., 1.)
        assert attn.split_dims == (128, 128, 192) and attn.attn_conv.groups == 16
        assert attn.qkv.bias is None


def test_settings_of_the_first_stage_can_be_given():
    model = small(
        kernel_size=3, dilation=2, group_width=4, lam=0, gamma=.5, qk_scale=.25, local_qkv_bias=True,
        mlp_ratio=(2, 3, 3, 3))
    for block in model.network[0]:
        attn = block.attn
        assert (attn.kernel_size, attn.dilation, attn.lam, attn.gamma, attn.qk_scale) == (3, 2, 0, .5, .25)
        assert attn.attn_conv.weight.shape[1] == 4 and attn.ghost_mul is None
        assert attn.qkv.bias is not None and block.mlp.fc1.out_features == 96
    assert model.network[2][0].attn.qkv.bias is None
    assert small(qkv_bias=True).network[0][0].attn.qkv.bias is not None
    assert small(qkv_bias=True, local_qkv_bias=False).network[0][0].attn.qkv.bias is None


def drop_path_rates(model):
    return [getattr(b.drop_path1, 'drop_prob', 0.) for m in model.network if isinstance(m, nn.Sequential) for b in m]


def test_drop_path_spares_the_first_stage_unless_given():
    rates = [.25 * i / 5 for i in range(6)]  # two blocks in stage 1, four later
    assert drop_path_rates(small(drop_path_rate=.25)) == pytest.approx([0., 0.] + rates[2:])
    assert drop_path_rates(small(drop_path_rate=.25, local_drop_path_rate=.25)) == pytest.approx(rates)
    assert drop_path_rates(small(local_drop_path_rate=.25)) == pytest.approx(rates[:2] + [0.] * 4)


def test_position_embedding_precedes_the_first_global_stage():
    # two local stages, a second downsampling: nothing depends on the place that VOLO happens to use
    model = small(
        embed_dims=(48, 96, 120, 120), num_heads=(3, 6, 6, 6), downsamples=(True, True, False, False),
        local_stages=(True, True, False, False))
    assert model.pos_embed.shape == (1, 4, 4, 120) and model.pos_index == 4
    assert [f['reduction'] for f in model.feature_info] == [4, 8, 16, 16]
    tap = Tap(model.network[4])
    before = Tap(model.network[3])
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert bits_equal(tap.input, before.output + model.pos_embed)


@pytest.mark.parametrize('training', [False, True])
def test_everything_after_stage_1_equals_volo(training):
    volo = create_model('volo_d1_224').train(training)
    model = create_model('elsa_volo_d1_224').train(training)
    own, shared = model.state_dict(), volo.state_dict()
    assert {k for k in own if not k.startswith('network.0.')} == {k for k in shared if not k.startswith('network.0.')}
    model.load_state_dict({k: x if k.startswith('network.0.') else shared[k] for k, x in own.items()})
    stage_1 = torch.randn(2, 28, 28, 192)
    outs = []
    x = torch.randn(2, 3, 224, 224)
    for m in (volo, model):
        patches = Tap(m.patch_embed)
        m.network[0] = Constant(stage_1)
        class_attention, aux_head = Tap(m.post_network[-1].attn), Tap(m.aux_head)
        with torch.no_grad():
            logits = m(x)
            features, maps = m.forward_intermediates(x)
        patches = patches.output if m is model else patches.output.permute(0, 2, 3, 1)
        outs.append((patches, logits, class_attention.output, aux_head.output, features, *maps))
    assert len(outs[0]) == 9
    for theirs, ours in zip(*outs, strict=True):
        assert bits_equal(theirs, ours)


def test_stage_1_is_used():
    model = small()
    x = torch.randn(1, 3, 64, 64)
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.network[0].parameters())


@pytest.mark.parametrize('size', SIZES)
def test_any_size_is_padded_inside(size):
    model = small(img_size=size)
    H, W = size
    h, w = math.ceil(H / 4), math.ceil(W / 4)
    taps = [Tap(model.network[i]) for i in range(2)]
    x = torch.randn(2, 3, H, W)
    with torch.no_grad():
        y = model(x)
        # by hand: zeros on the right and at the bottom, of the image and of the map to be halved
        patches = model.patch_embed.proj(model.patch_embed.conv(F.pad(x, (0, 4 * w - W, 0, 4 * h - H))))
        halved = F.pad(taps[0].output, (0, 0, 0, w % 2, 0, h % 2)).permute(0, 3, 1, 2)
        halved = model.network[1].proj(halved)
    assert y.shape == (2, 10)
    assert bits_equal(taps[0].input, patches.permute(0, 2, 3, 1))
    assert taps[0].output.shape == (2, h, w, 48)
    assert bits_equal(taps[1].output, halved.permute(0, 2, 3, 1))
    assert model.pos_embed.shape == (1, math.ceil(H / 8), math.ceil(W / 8), 96)


@pytest.mark.parametrize('size', SIZES)
def test_dynamic_size_equals_set_input_size(size):
    dynamic = small(dynamic_img_size=True)
    fixed = small()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(img_size=size)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert bits_equal(dynamic(x), fixed(x))
    assert small(strict_img_size=False)(x).shape == (2, 10)


def test_position_embedding_is_resampled():
    model = small()
    expected = resample_abs_pos_embed_nhwc(model.pos_embed.detach(), [5, 12])
    other = {k: x for k, x in clone_state(model).items() if k != 'pos_embed'}
    model.set_input_size(img_size=(37, 96))
    assert bits_equal(model.pos_embed, expected)
    assert isinstance(model.pos_embed, nn.Parameter) and model.pos_embed.requires_grad
    assert_same_state(model, dict(other, pos_embed=expected))


def test_resized_model_is_built_anew_from_its_arguments():
    model = small()
    model.set_input_size(img_size=(48, 96))
    args = get_model_args(model)
    assert args['img_size'] == (48, 96)
    rebuilt = create_model('test_elsa_volo', **args).eval()
    rebuilt.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 48, 96)
    assert bits_equal(rebuilt(x), model(x))


def test_patch_size_can_change():
    model = small()
    model.set_input_size(img_size=128, patch_size=8)
    assert model.patch_embed.proj.weight.shape[-2:] == (4, 4)
    assert model.patch_embed.grid_size == (16, 16) and model.pos_embed.shape == (1, 8, 8, 96)
    assert [f['reduction'] for f in model.feature_info] == [8, 16, 16, 16]
    fresh = small(img_size=128, patch_size=8)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 128, 128)
    assert bits_equal(fresh(x), model(x))


def test_frozen_model_stays_frozen():
    model = small().requires_grad_(False)
    model.set_input_size(img_size=(48, 96), patch_size=8)
    model.reset_classifier(0)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('kwargs', [
    dict(img_size=7), dict(img_size=(64, 7)), dict(img_size=0), dict(img_size=(64, 64, 64)), dict(img_size=64.5),
    dict(img_size=64.), dict(patch_size=4.), dict(patch_size=5), dict(img_size=8, patch_size=8)])
def test_bad_sizes_are_refused_and_change_nothing(kwargs):
    with pytest.raises(ValueError, match='size: got .*, must be'):
        small(**kwargs)
    model = small()
    state, reductions = clone_state(model), copy.deepcopy(model.feature_info)
    with pytest.raises(ValueError, match='size: got .*, must be'):
        model.set_input_size(**kwargs)
    assert_same_state(model, state)
    assert model.feature_info == reductions and model.patch_embed.img_size == (64, 64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r'input: got 64 x 60 pixels, must be 64 x 64.*dynamic_img_size'):
        small()(torch.randn(1, 3, 64, 60))
    with pytest.raises(ValueError, match=r'input: got 64 x 7 pixels, must be at least 8 x 8'):
        small(dynamic_img_size=True)(torch.randn(1, 3, 64, 7))


def test_checkpoint_moves_between_sizes(tmp_path):
    source = small()
    path = tmp_path / 'weights.pth'
    torch.save(source.state_dict(), path)
    for size in (96, (48, 80), (33, 47)):
        model = small(img_size=size, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10))
        source_at_size = copy.deepcopy(source)
        source_at_size.set_input_size(img_size=size)
        assert_same_state(model, source_at_size.state_dict())


def test_checkpoint_for_other_classes_channels_and_heads(tmp_path):
    source = small()
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': source.state_dict()}, path)
    load = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10))
    model = small(num_classes=3, **load)
    assert bits_equal(model.norm.weight, source.norm.weight) and model.aux_head.weight.shape == (3, 96)
    model = small(in_chans=1, **load)
    torch.testing.assert_close(
        model.patch_embed.conv[0].weight, source.patch_embed.conv[0].weight.sum(dim=1, keepdim=True))
    model = small(use_aux_head=False, **load)
    assert model.aux_head is None and bits_equal(model.head.weight, source.head.weight)
    model = small(features_only=True, out_indices=(0, 3), **load)
    assert bits_equal(model.model.pos_embed, source.pos_embed)


@pytest.mark.parametrize('name', ['elsa_volo_d1_224', 'test_elsa_volo'])
def test_pretrained_says_that_there_are_no_weights(name):
    with pytest.raises(RuntimeError, match=rf'{name}.*none were ever released'):
        create_model(name, pretrained=True)


@pytest.mark.parametrize('size', [(224, 224), (256, 320), (225, 231)])
def test_features_have_their_real_strides(size):
    full = create_model('elsa_volo_d1_224', img_size=size, **SHALLOW).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = full.forward_intermediates(x, intermediates_only=True)
    channels, strides = (192, 384, 384, 384), (8, 16, 16, 16)
    for indices in ((0, 1, 2, 3), (0, 3), (0,), (1,), (-1,)):
        model = create_model(
            'elsa_volo_d1_224', img_size=size, features_only=True, out_indices=indices, **SHALLOW).eval()
        assert model.feature_info.channels() == [channels[i] for i in indices]
        assert model.feature_info.reduction() == [strides[i] for i in indices]
        model.model.load_state_dict({k: x for k, x in full.state_dict().items() if k in model.model.state_dict()})
        with torch.no_grad():
            maps = model(x)
        assert len(maps) == len(indices)
        for i, m in zip(indices, maps, strict=True):
            assert m.shape == (1, channels[i], *(math.ceil(s / strides[i]) for s in size))
            assert bits_equal(m, expected[i])


def test_default_features_are_all_stages():
    model = create_model('elsa_volo_d1_224', features_only=True, device='meta')
    assert model.feature_info.reduction() == [8, 16, 16, 16]


def test_features_resize_after_pruning():
    for indices in ((0,), (0, 1)):
        model = create_model('test_elsa_volo', features_only=True, out_indices=indices).eval()
        model.model.set_input_size(img_size=(37, 53))
        assert [m.shape[-2:] for m in model(torch.randn(1, 3, 37, 53))] == [(10, 14), (5, 7)][:len(indices)]


def test_final_norm_is_for_maps_of_its_width():
    model = small()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, plain = model.forward_intermediates(x)
        _, normed = model.forward_intermediates(x, norm=True)
    assert bits_equal(features, model.forward_features(x))
    assert bits_equal(plain[0], normed[0])
    for p, n in zip(plain[1:], normed[1:], strict=True):
        assert bits_equal(model.norm(p.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n)


def test_no_stage_runs_after_the_last_wanted():
    model = small()
    tap = Tap(model.network[3])
    model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=[1], stop_early=True, intermediates_only=True)
    assert not hasattr(tap, 'input')
    with pytest.raises(ValueError, match="output_fmt: got 'NLC'"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt='NLC')


def test_pruned_features_torchscript():
    for indices in ((0,), (0, 3)):
        model = create_model('test_elsa_volo', features_only=True, out_indices=indices).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_forward_never_mixes_nor_returns_tuples():
    model = small(use_mix_token=True).train()
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    assert isinstance(y, torch.Tensor) and y.shape == (2, 10)
    assert bits_equal(y, small_like(model)(x))


def small_like(model, **kwargs):
    other = small(**kwargs).train(model.training)
    other.load_state_dict(model.state_dict())
    return other


def test_inference_adds_half_of_the_best_token():
    model = small()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(x)
        by_hand = model.head(tokens[:, 0]) + .5 * model.aux_head(tokens[:, 1:]).max(dim=1).values
        assert bits_equal(model(x), by_hand)
        out = model.forward_train(x)
    assert isinstance(out, TokenLabelOutput) and out.box == (0, 0, 0, 0) and out.lam == 1.
    assert bits_equal(out.logits + .5 * out.token_logits.flatten(1, 2).max(dim=1).values, by_hand)


def test_aux_head_can_be_left_out():
    model = small(use_aux_head=False)
    x = torch.randn(2, 3, 64, 64)
    out = model.forward_train(x)
    assert model.aux_head is None and out.token_logits is None
    assert bits_equal(out.logits, model(x))
    assert bits_equal(token_label_loss(out, torch.tensor([1, 2])), F.cross_entropy(out.logits, torch.tensor([1, 2])))


@pytest.mark.parametrize('size,grid', [((64, 96), (8, 12)), ((36, 52), (5, 7))])
def test_mix_token_swaps_a_box_and_swaps_the_token_logits_back(size, grid, monkeypatch):
    model = small(use_mix_token=True, img_size=size).train()
    box = (1, 2, grid[0], 6)
    drawn_for = []
    monkeypatch.setattr(_token_labels, 'rand_bbox', lambda s, lam, scale=1: drawn_for.append((s, scale)) or box)
    stem, stage_1, aux = Tap(model.patch_embed), Tap(model.network[0]), Tap(model.aux_head)
    out = model.forward_train(torch.randn(3, 3, *size))
    assert drawn_for == [((3, *grid), 1)]
    assert out.box == box and out.lam == pytest.approx(1 - (grid[0] - 1) * 4 / (grid[0] * grid[1]))
    H, W = stem.output.shape[1:3]
    for b in range(3):
        for row in range(H):
            for col in range(W):
                inside = 1 <= row // 2 < grid[0] and 2 <= col // 2 < 6
                assert bits_equal(stage_1.input[b, row, col], stem.output[2 - b if inside else b, row, col])
    seen = aux.output.unflatten(1, grid)
    for b in range(3):
        for row in range(grid[0]):
            for col in range(grid[1]):
                inside = 1 <= row < grid[0] and 2 <= col < 6
                assert bits_equal(out.token_logits[b, row, col], seen[2 - b if inside else b, row, col])


def test_mix_token_boxes_vary_and_follow_the_seed():
    model = small(use_mix_token=True).train()
    x = torch.randn(2, 3, 64, 64)
    outs = [model.forward_train(x) for _ in range(8)]
    assert len({o.box for o in outs}) > 4
    for o in outs:
        top, left, bottom, right = o.box
        assert 0 <= top <= bottom <= 8 and 0 <= left <= right <= 8
        assert o.lam == 1 - (bottom - top) * (right - left) / 64
    torch.manual_seed(3)
    first = model.forward_train(x).box
    torch.manual_seed(3)
    assert model.forward_train(x).box == first
    assert model.eval().forward_train(x).box == (0, 0, 0, 0)
    model.train().mix_token = False
    assert model.forward_train(x).box == (0, 0, 0, 0)


def test_mix_token_of_equal_images_changes_nothing():
    x = torch.randn(1, 3, 64, 64).expand(4, -1, -1, -1)
    mixing = small(use_mix_token=True).train()
    plain = small_like(mixing)
    a, b = mixing.forward_train(x), plain.forward_train(x)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.token_logits, b.token_logits)


@pytest.mark.parametrize('dense', ['none', 'indices', 'probabilities'])
@pytest.mark.parametrize('soft', [False, True])
def test_token_label_loss_by_hand(dense, soft):
    B, h, w, C, lam = 3, 2, 4, 5, .625
    logits = torch.randn(B, C, dtype=torch.double)
    token_logits = torch.randn(B, h, w, C, dtype=torch.double)
    target = torch.randn(B, C, dtype=torch.double).softmax(-1) if soft else torch.tensor([4, 0, 2])
    labels = {
        'none': None,
        'indices': torch.randint(C, (B, h, w)),
        'probabilities': torch.randn(B, h, w, C, dtype=torch.double).softmax(-1),
    }[dense]
    loss = token_label_loss(TokenLabelOutput(logits, token_logits, (0, 0, 1, 3), lam), target, labels, .25)

    def label(y, *index):
        y = y[index]
        return y if y.dim() else torch.eye(C, dtype=torch.double)[y]

    expected = 0.
    for b in range(B):
        mixed = lam * label(target, b) + (1 - lam) * label(target, B - 1 - b)
        expected -= (mixed * logits[b].log_softmax(-1)).sum() / B
        for i in range(h):
            for j in range(w):
                y = label(target, b) if labels is None else label(labels, b, i, j)
                expected -= .25 * (y * token_logits[b, i, j].log_softmax(-1)).sum() / (B * h * w)
    torch.testing.assert_close(loss, expected)


def test_dense_training_reaches_every_parameter():
    model = small(use_mix_token=True).train()
    out = model.forward_train(torch.randn(4, 3, 64, 64))
    token_label_loss(out, torch.arange(4), torch.randint(10, (4, 8, 8)), label_smoothing=.1).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_mix_token_refuses_a_batch_of_one():
    model = small(use_mix_token=True).train()
    with pytest.raises(ValueError, match='x: got a batch of 1, must be at least 2 images for MixToken'):
        model.forward_train(torch.randn(1, 3, 64, 64))
    assert model.eval().forward_train(torch.randn(1, 3, 64, 64)).logits.shape == (1, 10)


@pytest.mark.parametrize('shape', [(2, 7, 8), (2, 64), (2, 16, 16), (1, 8, 8), (2, 8, 8, 9), (2, 8, 8, 10, 1)])
def test_dense_labels_of_the_wrong_grid_are_refused(shape):
    out = small().forward_train(torch.randn(2, 3, 64, 64))
    dense = torch.zeros(shape, dtype=torch.long if len(shape) == 3 else torch.float)
    with pytest.raises(ValueError, match=r'dense_target: got shape \(.*\) of (int64|float32), must be \(2, 8, 8\)'):
        token_label_loss(out, torch.tensor([0, 1]), dense)


def test_other_bad_labels_are_refused():
    out = small().forward_train(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r'^target: got shape \(3,\) of int64, must be \(2,\) class'):
        token_label_loss(out, torch.tensor([0, 1, 2]))
    out = small(use_aux_head=False).forward_train(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match='dense_target: the model has no aux head'):
        token_label_loss(out, torch.tensor([0, 1]), torch.zeros(2, 8, 8, dtype=torch.long))


@pytest.mark.parametrize('kwargs,message', [
    (dict(layers=(1, 1)), 'embed_dims: got 4 values, must be one for each of 2'),
    (dict(num_heads=(3, 6)), 'num_heads: got 2 values'),
    (dict(local_stages=(True,) * 4), 'local_stages: got no stage of global attention'),
    (dict(downsamples=(True, False, False, True)), 'downsamples: got True for the last stage'),
    (dict(embed_dims=(48, 96, 120, 120)), 'embed_dims: got 96 and 120 for stages 1 and 2'),
    (dict(global_pool='max'), "global_pool: got 'max', must be one of"),
    (dict(num_class_blocks=0), 'num_class_blocks: got 0'),
    (dict(global_pool='avg', use_mix_token=True), 'use_mix_token: got True'),
    (dict(kernel_size=4), 'kernel_size: got 4'),
    (dict(lam=.5), 'lam: got 0.5'),
])
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_forward_train_needs_a_pool():
    with pytest.raises(ValueError, match='global_pool'):
        small(global_pool='').forward_train(torch.randn(2, 3, 64, 64))


def test_pools_without_class_token():
    model = small(num_class_blocks=0, use_aux_head=False, global_pool='avg')
    x = torch.randn(2, 3, 64, 64)
    assert bits_equal(model(x), model.head(model.forward_features(x).mean(dim=1)))
    assert model.no_weight_decay() == {'pos_embed'}
    with pytest.raises(ValueError, match="global_pool: got 'token'"):
        model.reset_classifier(3, 'token')
    model.reset_classifier(3)
    assert model.global_pool == 'avg' and model(x).shape == (2, 3)


def test_reset_classifier_keeps_pool_and_resets_both_heads():
    model = small().double()
    model.reset_classifier(3)
    assert model.global_pool == 'token' and model.head.out_features == model.aux_head.out_features == 3
    assert model.head.weight.dtype == model.aux_head.weight.dtype == torch.double and not model.aux_head.training
    model.reset_classifier(0)
    assert model.aux_head is None and model(torch.randn(1, 3, 64, 64).double()).shape == (1, 96)
    with pytest.raises(ValueError, match="global_pool: got 'max'"):
        model.reset_classifier(3, 'max')


def test_initialisation_is_elsas_and_volos():
    model = create_model('elsa_volo_d1_224', **SHALLOW)
    attn, block = model.network[0][0].attn, model.network[2][0]
    # ELSA's projections start as convolutions do, uniform up to fan_in ** -0.5; VOLO's linears from N(0, 0.02)
    assert attn.qkv.weight.abs().max() <= 192 ** -.5 and attn.qkv.weight.std().item() == pytest.approx(
        192 ** -.5 / 3 ** .5, rel=.05)
    assert block.attn.qkv.weight.std().item() == pytest.approx(.02, rel=.05)
    for x in (model.pos_embed, model.cls_token, model.head.weight, model.network[0][0].mlp.fc1.weight):
        assert x.std().item() == pytest.approx(.02, rel=.15)
    assert not model.head.bias.any() and not block.mlp.fc1.bias.any()
    assert attn.ghost_mul.std().item() == pytest.approx(1., rel=.1)


def test_layer_decay_groups_cover_the_model():
    from timm.optim import create_optimizer_v2
    model = small()
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=.05, layer_decay=.5)
    rate, decay = {}, {}
    for group in optimizer.param_groups:
        for p in group['params']:
            rate[p], decay[p] = group['lr_scale'], group['weight_decay']
    names = dict(model.named_parameters())
    assert len(rate) == len(names)
    assert decay[names['pos_embed']] == decay[names['cls_token']] == 0.
    assert decay[names['network.0.0.attn.ghost_add']] == .05
    order = [
        'patch_embed.proj.weight', 'network.0.0.mlp.fc1.weight', 'network.1.proj.weight',
        'network.2.0.mlp.fc1.weight', 'network.4.0.mlp.fc1.weight', 'head.weight']
    scales = [rate[names[n]] for n in order]
    assert scales == sorted(scales) and scales[0] < scales[-1] == 1.


def test_scripted_traced_and_compiled_models_take_any_size(fresh_compiler):
    model = small(dynamic_img_size=True, layers=(1, 1, 1, 1))
    forms = [torch.jit.script(model), torch.fx.symbolic_trace(model)]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
    with torch.no_grad():
        for size in SIZES[:4]:
            x = torch.randn(2, 3, *size)
            for form in (*forms, compiled):
                torch.testing.assert_close(form(x), model(x))
    for form in (model, forms[1]):
        with pytest.raises(ValueError, match='must be at least 8 x 8'):
            form(torch.randn(1, 3, 7, 64))
    with pytest.raises(torch.jit.Error, match='must be at least 8 x 8'):
        forms[0](torch.randn(1, 3, 7, 64))


def test_exported_model_takes_any_size():
    model = small(dynamic_img_size=True, layers=(1, 1, 1, 1))
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},))
    with torch.no_grad():
        for size in SIZES[:4]:
            x = torch.randn(3, 3, *size)
            torch.testing.assert_close(program.module()(x), model(x))


LARGE = [n for n in PARAMS if not n.endswith('224')]


@pytest.mark.slow
@pytest.mark.parametrize('name', LARGE)
def test_large_models_train(name):
    model = create_model(name).train()
    model.set_grad_checkpointing()
    size = int(name[-3:])
    loss = model(torch.randn(1, 3, size, size)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


_LIMITS_PLUGIN = '''
def pytest_collection_modifyitems(items):
    for item in items:
        for name in {names!r}:
            setattr(item.module, name, 512)
'''


# what takes memory for activations of a batch of two is for the smaller models
@pytest.mark.slow
@pytest.mark.parametrize('name,lifted,count', [
    ('elsa_volo_d1_384', ('FWD', 'JIT', 'FFEAT', 'FWD_FX', 'BWD', 'BWD_FX'), 9),
    ('elsa_volo_d3_448', ('FWD', 'JIT', 'FFEAT', 'FWD_FX', 'BWD', 'BWD_FX'), 9),
    ('elsa_volo_d5_512', ('FWD', 'JIT', 'FWD_FX'), 4),
])
def test_timm_suite_beyond_its_size_limits(name, lifted, count, tmp_path):
    suite = Path(__file__).resolve().parents[1] / 'timm_suite'
    sys.path.insert(0, str(suite))
    try:
        from timm_peer import TEST_FILE, unpack_tests
    finally:
        sys.path.remove(str(suite))
    root = unpack_tests(tmp_path)
    (tmp_path / 'limits_plugin.py').write_text(_LIMITS_PLUGIN.format(names=[f'MAX_{n}_SIZE' for n in lifted]))
    report = tmp_path / 'report.xml'
    paths = [str(suite), str(tmp_path), str(Path(elsa_models.__file__).resolve().parents[1])]
    env = dict(
        os.environ, PYTHONPATH=os.pathsep.join(paths), ELSA_PEER_MODELS=name, HF_HUB_OFFLINE='1')
    for key in ('GITHUB_ACTIONS', 'PYTEST_ADDOPTS', 'PYTEST_PLUGINS'):
        env.pop(key, None)
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'peer_plugin', '-p', 'limits_plugin', '-p', 'no:cacheprovider', '-q',
         '--disable-warnings', f'--junitxml={report}', TEST_FILE],
        cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    cases = [c for c in ET.parse(report).iter('testcase') if c.find('skipped') is None]
    names = {re.match(r'test_\w+', c.get('name')).group() for c in cases}
    assert len(names) == count, run.stdout[-5000:]


def test_sizes_of_any_integral_type():
    model = small(img_size=np.int64(48), patch_size=np.int32(4), kernel_size=np.int64(3))
    assert model.patch_embed.img_size == (48, 48) and type(model.patch_embed.patch_size) is int
    assert type(model.network[0][0].attn.kernel_size) is int
    torch.jit.script(model)


@pytest.mark.parametrize('target', [
    torch.zeros(2), torch.zeros(2, 10, dtype=torch.int64), torch.zeros(2, dtype=torch.bool),
    torch.zeros(2, dtype=torch.complex64)], ids=lambda x: str(x.dtype))
def test_targets_of_a_wrong_dtype_are_named(target):
    output = TokenLabelOutput(torch.randn(2, 10), None, (0, 0, 0, 0), 1.)
    with pytest.raises(ValueError, match=rf'^target: got .* of {str(target.dtype)[6:]}, must be'):
        elsa_models.token_label_loss(output, target)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32])
def test_targets_of_any_integer_type(dtype):
    output = TokenLabelOutput(torch.randn(2, 10), None, (0, 0, 0, 0), 1.)
    target = torch.tensor([3, 7])
    loss = elsa_models.token_label_loss(output, target.to(dtype))
    assert torch.equal(loss, elsa_models.token_label_loss(output, target))
