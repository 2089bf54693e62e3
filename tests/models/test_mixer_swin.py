"""The network of the study with each of its mixers."""
import copy
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm import create_model

import elsa_models  # noqa: F401
from elsa_models.models.mixer_swin import MIXERS, UNIFIED


@pytest.mark.parametrize('mixer', MIXERS)
def test_every_mixer(mixer):
    torch.manual_seed(1)
    model = create_model('test_mixer_swin', num_classes=5, mixer=mixer, img_size=(40, 56), drop_path_rate=0.).train()
    x = torch.randn(2, 3, 40, 56)
    y = model(x)
    y.backward(torch.randn_like(y))
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    flexible = create_model('test_mixer_swin', num_classes=5, mixer=mixer, img_size=(40, 56), dynamic_img_size=True)
    flexible.load_state_dict(model.state_dict())
    torch.testing.assert_close(flexible.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert flexible(torch.randn(1, 3, 33, 70)).shape == (1, 5)


@pytest.mark.parametrize('mixer', MIXERS)
def test_checkpoint_at_another_size(mixer, tmp_path):
    """A file of 64 pixels and windows of 4 gives what the model gives that is changed to the other size."""
    model = create_model('test_mixer_swin', mixer=mixer).eval()
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    x = torch.randn(1, 3, 96, 96)
    for args in ({}, dict(img_size=96), dict(img_size=96, window_size=3)):
        loaded = create_model(
            'test_mixer_swin', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')),
            mixer=mixer, **args).eval()
        if not args:
            assert all(torch.equal(x, model.state_dict()[k]) for k, x in loaded.state_dict().items())
            continue
        if loaded._ref_window_sizes is None:
            args = dict(img_size=args['img_size'])
        changed = copy.deepcopy(model)
        changed.set_input_size(**args)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), changed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mixer', sorted(UNIFIED))
def test_only_the_mixer_differs(mixer):
    """Names and shapes beside the attention are those of the others."""
    def rest(name):
        model = create_model('test_mixer_swin', device='meta', mixer=name)
        return {k: p.shape for k, p in model.named_parameters() if '.attn.' not in k or '.attn.proj.' in k}

    assert rest(mixer) == rest('window_bias')


def test_window_bias_is_swin():
    ours = create_model('mixer_swin_tiny', num_classes=7).eval()
    swin = timm.create_model('swin_tiny_patch4_window7_224', num_classes=7).eval()
    state = {}
    for name, x in swin.state_dict().items():
        if '.attn.qkv.' in name:
            for letter, part in zip('qkv', x.chunk(3)):
                state[name.replace('.qkv.', f'.{letter}.')] = part
        else:
            state[name] = x
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), swin(x), rtol=1e-4, atol=1e-5)


def test_switches():
    model = create_model('test_mixer_swin', mixer='window_bias', region='neighbourhood', terms=('rk',), border='mask')
    attn = model.layers[0].blocks[0].attn
    assert attn.terms == ('rk',) and attn.border == 'mask' and attn.kernel_size == 5
    for args, words in (
            (dict(mixer='sasas'), "mixer: got 'sasas'"), (dict(mixer='elsa', terms='r'), 'terms: does not apply'),
            (dict(border='mask'), 'border: does not apply to windows'), (dict(region='all'), "region: got 'all'")):
        with pytest.raises(ValueError, match=words):
            create_model('test_mixer_swin', **args)


def test_dropout_of_outputs_is_in_mixers_and_mlps():
    model = create_model('test_mixer_swin', proj_drop_rate=.5)
    for stage in model.layers:
        for block in stage.blocks:
            assert block.attn.proj_drop.p == .5
            assert {m.p for m in block.mlp.modules() if isinstance(m, torch.nn.Dropout)} == {.5}


def test_initial_bias_of_the_classifier():
    assert not create_model('test_mixer_swin', num_classes=5).head.fc.bias.any()
    model = create_model('test_mixer_swin', num_classes=5, weight_init='jax_nlhb')
    assert model.head.fc.bias.tolist() == pytest.approx([-math.log(5)] * 5)
