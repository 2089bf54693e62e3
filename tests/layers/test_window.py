"""WindowAttention in its block against timm's block, which is built for one size."""
import pytest
import torch
from helpers import assert_near, max_error
from timm.models.swin_transformer import SwinTransformerBlock

from elsa_models.layers import MixerBlock, WindowAttention

ARGS = dict(dim=8, num_heads=2, window_size=3)


def _block(dim, num_heads, input_resolution, window_size, shift_size=0, dynamic_mask=False, **kwargs):
    mixer = WindowAttention(
        dim, num_heads, input_resolution, window_size, shift_size > 0, dynamic=dynamic_mask, **kwargs)
    return MixerBlock(dim, mixer)


def _like(block, source):
    block.load_state_dict(source.state_dict())
    return block.double().eval()


def _random_block(**kwargs):
    block = _block(**{**ARGS, **kwargs})
    with torch.no_grad():
        for p in block.parameters():
            p.add_(.3 * torch.randn_like(p))
    return block.double().eval()


@pytest.mark.parametrize('shift_size', [0, 1])
@pytest.mark.parametrize('height, width', [(6, 6), (7, 9), (3, 8), (4, 3), (3, 3), (11, 5)])
def test_equals_timms_block_built_for_the_size(height, width, shift_size):
    args = dict(ARGS, shift_size=shift_size, input_resolution=(height, width))
    # built for a size at which it does not shift, and then for any
    dynamic = _random_block(shift_size=shift_size, input_resolution=(3, 3), dynamic_mask=True)
    fixed, timms = _like(_block(**args), dynamic), _like(SwinTransformerBlock(**args), dynamic)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    expected = timms(x)
    assert_near(fixed(x), expected, 1e-12)
    assert_near(dynamic(x), expected, 1e-12)


@pytest.mark.parametrize('height, width', [(1, 1), (2, 5), (1, 7)])
def test_maps_smaller_than_the_window(height, width):
    block = _random_block(shift_size=1, input_resolution=(9, 9), dynamic_mask=True)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    y = block(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert_near(torch.cat([block(x[:1]), block(x[1:])]), y, 1e-12)


def test_shifts_only_where_one_window_does_not_cover_the_map():
    plain = _random_block(shift_size=0, input_resolution=(9, 9), dynamic_mask=True)
    shifted = _like(_block(**ARGS, shift_size=1, input_resolution=(9, 9), dynamic_mask=True), plain)
    x = torch.randn(1, 3, 3, 8, dtype=torch.float64)
    assert torch.equal(plain(x), shifted(x))
    x = torch.randn(1, 6, 3, 8, dtype=torch.float64)
    assert max_error(plain(x), shifted(x)) > .01


@pytest.mark.parametrize('dynamic_mask', [False, True])
def test_script(dynamic_mask):
    block = _random_block(shift_size=1, input_resolution=(6, 7), dynamic_mask=dynamic_mask)
    scripted = torch.jit.script(block)
    for height, width in ((6, 7), (3, 3), (10, 4)) if dynamic_mask else ((6, 7),):
        x = torch.randn(2, height, width, 8, dtype=torch.float64)
        assert_near(scripted(x), block(x), 1e-12)


@pytest.mark.parametrize('shift_size', [0, 1])
@pytest.mark.parametrize('height, width', [(6, 6), (7, 9), (3, 8), (4, 3), (3, 3), (11, 5), (1, 1), (2, 7)])
def test_what_is_compiled_equals_what_is_run(height, width, shift_size, monkeypatch):
    block = _random_block(shift_size=shift_size, input_resolution=(9, 9), dynamic_mask=True)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    expected = block(x)
    for name in ('mixers.window', 'sizes'):
        monkeypatch.setattr(f'elsa_models.layers.{name}.sizes_are_open', lambda: True)
    assert_near(block(x), expected, 1e-12)


def test_exports_to_onnx_for_any_size(tmp_path):
    import onnxruntime
    block = _random_block(shift_size=1, input_resolution=(9, 9), dynamic_mask=True).float()
    sizes = {0: torch.export.Dim('batch'), 1: torch.export.Dim('height'), 2: torch.export.Dim('width')}
    path = str(tmp_path / 'block.onnx')
    torch.onnx.export(block, (torch.randn(2, 8, 10, 8),), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for shape in ((1, 9, 7, 8), (3, 12, 12, 8)):
        x = torch.randn(shape)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert_near(torch.from_numpy(found), block(x).detach(), 1e-5)


@pytest.mark.parametrize('dynamic_mask', [False, True])
def test_no_maps(dynamic_mask):
    block = _random_block(shift_size=1, input_resolution=(6, 7), dynamic_mask=dynamic_mask)
    x = torch.zeros(0, 6, 7, 8, dtype=torch.float64)
    assert block(x).shape == torch.jit.script(block)(x).shape == x.shape


@pytest.mark.parametrize('height, width', [(6, 6), (3, 8), (4, 3), (3, 3), (11, 5), (2, 7)])
def test_shift_of_both_sides_or_none(height, width, monkeypatch):
    # the authors' classifier shifts where one window covers neither side, and timm along every side that one does not
    covered = min(height, width) <= 3
    args = dict(ARGS, shift_size=1, input_resolution=(height, width), shift_each_side=False)
    fixed = _random_block(**args)
    timms = _like(SwinTransformerBlock(
        **ARGS, shift_size=0 if covered else 1, input_resolution=(height, width)), fixed)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    expected = timms(x)
    assert_near(fixed(x), expected, 1e-12)
    if min(height, width) < 3:  # the window of a block for any size is not cut to the map
        return
    dynamic = _like(_block(**dict(args, input_resolution=(9, 9), dynamic_mask=True)), fixed)
    assert_near(dynamic(x), expected, 1e-12)
    assert_near(torch.jit.script(dynamic)(x), expected, 1e-12)
    for name in ('mixers.window', 'sizes'):
        monkeypatch.setattr(f'elsa_models.layers.{name}.sizes_are_open', lambda: True)
    assert_near(dynamic(x), expected, 1e-12)


def test_attention_map():
    block = _random_block(shift_size=1, input_resolution=(7, 8))
    attn, x = block.attn, torch.randn(2, 7, 8, 8, dtype=torch.float64)
    weights = attn.attention_map(x)
    assert weights.shape == (2, 7, 8, 2, 9)
    assert_near(weights.sum(-1), torch.ones(2, 7, 8, 2, dtype=torch.float64), 1e-12)
    # rows and columns of the shifted map that share a window: that of pixel (1, 1) is of pixels 1 to 3
    value = attn.qkv(x)[..., 16:].unflatten(-1, (2, 4))
    seen = value[:, 1:4, 1:4].flatten(1, 2)
    expected = attn.proj(torch.einsum('bgt,btgc->bgc', weights[:, 1, 1], seen).flatten(1))
    assert_near(attn(x)[:, 1, 1], expected, 1e-12)
