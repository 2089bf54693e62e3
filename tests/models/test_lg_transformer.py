"""LG-Transformer against its definition, and Swin."""
import numpy as np
import pytest
import torch
from helpers import DATA, assert_near
from keyed import check_record, keyed_state_dict, load, randn
from timm import create_model

import elsa_models
from elsa_models.inspect import count_macs

TINY, SWIN = 'lg_tiny_patch4_window7_224', 'swin_tiny_patch4_window7_224'
SMALL_SWIN = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5)
ONE_PATH = dict(SMALL_SWIN, ratios=((1,), (1,)), window_size=7)


def test_equals_the_definition():
    record = np.load(DATA / 'lg/lg_tiny_224_reconstruction.npz')
    model = load(TINY, keyed_state_dict('lg/keys_lg_tiny_224.tsv'))
    x = randn('image.224x224', (1, 3, 224, 224))
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        check_record(record, model.forward_head(model.norm(maps[-1].permute(0, 2, 3, 1))), maps, 1e-12)


@pytest.mark.parametrize('ratios,parameters,gmacs', [
    (((1,), (1,), (1,), (1,)), 28_288_354, 4.491),
    (((1, 4, 8), (1, 2, 4), (1, 2), (1,)), 32_596_654, 4.779),
    (((1, 2, 8), (1, 2, 4), (1, 2), (1,)), 32_596_654, 4.834),
    (((1, 2, 4), (1, 2, 4), (1, 2), (1,)), 32_596_654, 4.847),
    (((1, 2, 4, 8), (1, 2, 4), (1, 2), (1,)), 32_672_164, 4.852),
])
def test_counts(ratios, parameters, gmacs):
    model = create_model(TINY, ratios=ratios, device='meta')
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count_macs(model) / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.parametrize('size', [(56, 56), (60, 104), (56, 112)])
def test_one_path_is_swin(size):
    swin = create_model(SWIN, img_size=size, dtype=torch.float64, **SMALL_SWIN).eval()
    model = create_model(TINY, img_size=size, dtype=torch.float64, **ONE_PATH).eval()
    model.load_state_dict(
        {k.replace('.attn.', '.attn.paths.0.'): x for k, x in swin.state_dict().items()})
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    assert_near(model(x), swin(x), 1e-12)


def test_warm_start_equals_swin():
    swin = create_model(SWIN, img_size=56, dtype=torch.float64, **SMALL_SWIN).eval()
    model = create_model(
        TINY, img_size=56, dtype=torch.float64, **dict(ONE_PATH, ratios=((1, 2, 4), (1, 2)))).eval()
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    report = elsa_models.warm_start(model, swin)
    assert_near(model(x), swin(x), 1e-12)
    assert report.num_left > 0 and not report.unused
    # the other paths learn
    model.train()
    model(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if '.paths.1.proj.' in n)


def test_warm_start_between_models_of_the_family():
    kwargs = dict(img_size=56, dtype=torch.float64, **dict(ONE_PATH, ratios=((1, 2, 4), (1, 2))))
    source, model = create_model(TINY, **kwargs).eval(), create_model(TINY, **kwargs).eval()
    elsa_models.warm_start(model, source)
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    assert_near(model(x), source(x), 1e-12)


def test_global_path_is_the_default_at_224():
    kwargs = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=5, dtype=torch.float64)
    models = [create_model(TINY, global_path=on, dynamic_img_size=True, **kwargs).eval() for on in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    for size, equal in ((224, True), (256, False)):
        x = torch.randn(1, 3, size, size, dtype=torch.float64)
        assert torch.allclose(models[0](x), models[1](x), atol=1e-12) == equal


def test_weights_move_between_windows():
    model = create_model('test_lg').double().eval()
    other = load('test_lg', model.state_dict(), window_size=5)
    model.set_input_size(window_size=5)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_near(other(x), model(x), 1e-12)


def test_what_is_refused_changes_nothing():
    model = create_model('test_lg')
    with pytest.raises(ValueError, match='always_partition: got True, must be None'):
        model.set_input_size(img_size=96, window_size=5, always_partition=True)
    assert model.patch_embed.img_size == (64, 64) and model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_refused_arguments():
    for kwargs, message in [
            (dict(ratios=((1,), (1,))), 'ratios: got 2'), (dict(ratios=((1, 0), (1,), (1,), (1,))), 'ratios: got 0'),
            (dict(pool='mean'), 'pool'), (dict(upsample='area'), 'upsample')]:
        with pytest.raises(ValueError, match=message):
            create_model('test_lg', device='meta', **kwargs)
